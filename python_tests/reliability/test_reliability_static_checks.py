"""The static checks in their small size, and that each of them can fail."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adamix_kernels._build import BuildError
from reliability import static_checks


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_every_figure_is_as_expected():
    figures = list(static_checks.run("small"))
    assert len(figures) == 2
    wrong = [f"{figure.about}: {figure.value}, expected {figure.expected}" for figure in figures if not figure.passed]
    assert not wrong


def test_a_long_file_must_say_why(tmp_path):
    lines = "x = 1\n" * 400
    (tmp_path / "exact.py").write_text(lines)
    (tmp_path / "long.py").write_text(lines + "y = 2\n")
    (tmp_path / "excused.py").write_text("# more than 400 lines because it is a table\n" + lines)
    assert static_checks.too_long(tmp_path, static_checks.sources(tmp_path)) == ["long.py"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    ("line", "warning"), [("int unused;", "unused"), ("unsigned n = 1; if (v < n) return 1;", "sign")]
)
def test_a_warning_fails_the_compilation(line, warning, tmp_path):
    source = tmp_path / "x.cpp"
    source.write_text(f"int f(int v) {{ {line} return v; }}\n")
    with pytest.raises(BuildError, match=warning):
        static_checks.compile_strictly(source, tmp_path / "x.o")


def test_modules_that_mypy_spares_are_told():
    strict = "\n[tool.mypy]\nstrict = true\n"
    assert static_checks.not_strict("\n[tool.ruff]\n") == ["adamix_kernels.*"]
    assert static_checks.not_strict(strict) == []
    spared = (
        strict
        + '\n[[tool.mypy.overrides]]\nmodule = ["adamix_kernels.a", "adamix_kernels.b.*"]\nignore_errors = true\n'
    )
    assert static_checks.not_strict(spared) == ["adamix_kernels.a", "adamix_kernels.b.*"]


def test_mypy_refuses_what_has_no_types(tmp_path):
    (tmp_path / "x.py").write_text("def f(a):\n    return a\n")
    config = static_checks.ROOT / "pyproject.toml"
    pytest.importorskip("mypy")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(config),
        "--cache-dir",
        str(tmp_path),
        str(tmp_path / "x.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "no-untyped-def" in done.stdout, done.stdout + done.stderr


def test_an_import_upward_fails_the_imports_test(tmp_path):
    shutil.copytree(
        static_checks.ROOT / "adamix_kernels", tmp_path / "adamix_kernels", ignore=shutil.ignore_patterns("*.so")
    )
    room = Path("python_tests", "project")
    (tmp_path / room).mkdir(parents=True)
    shutil.copy(static_checks.ROOT / room / "test_imports.py", tmp_path / room)
    with open(tmp_path / "adamix_kernels" / "routing" / "draws.py", "a") as file:
        file.write("from ..models import config\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "downward and draws.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert re.search(r"\b1 failed", done.stdout), done.stdout
