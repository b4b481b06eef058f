"""The API reference: pdoc builds it without a warning, and every public name is in it with its docstring."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adamix_kernels

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("adamix_kernels", "adamix_kernels.compat", "adamix_kernels.peft", "adamix_kernels.tasks")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    pytest.importorskip("pdoc")
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-W", "error::UserWarning", "-m", "pdoc", "--docformat", "google"]
    done = subprocess.run(
        [*command, "-o", str(folder), *MODULES], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("warn", done.stderr, flags=re.IGNORECASE), done.stderr
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}


def test_every_public_name_is_described(pages):
    page = pages["adamix_kernels.html"]
    for name in adamix_kernels.__all__:
        if name == "__version__":
            continue
        assert inspect.getdoc(getattr(adamix_kernels, name)), name
        assert f'id="{name}"' in page, name
    assert set(pages) >= {"adamix_kernels/compat.html", "adamix_kernels/tasks.html"}


def test_arguments_become_lists(pages):
    start = pages["adamix_kernels.html"].index('<section id="double_batch">')
    section = pages["adamix_kernels.html"][start:].partition("</section>")[0]
    assert re.search(r"<h6[^>]*>Arguments:</h6>.*<strong>inputs:</strong>", section, flags=re.DOTALL)
    assert "Raises:" in section
