"""Installing: the library where nvcc is, a package without it where not, and always the reason."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny_csrc

from adamix_kernels import _build, _extension
from adamix_kernels._build import BuildError, objects, toolchain

WHEEL = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
FACTS = "import json; from adamix_kernels.commands import env; print(json.dumps(env.describe()))"


def _nvcc_problem():
    try:
        toolchain.find_nvcc()
    except BuildError as error:
        return str(error)
    return None


needs_nvcc = pytest.mark.skipif(_nvcc_problem() is not None, reason=str(_nvcc_problem()))


@pytest.fixture
def project(tmp_path):
    return tiny_csrc.project(tmp_path)


def _wheel(project, **variables):
    """(the wheel's path, its files, all that was printed)."""
    done = tiny_csrc.run(WHEEL, project, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    path = project / "dist" / done.stdout.strip().splitlines()[-1]
    with zipfile.ZipFile(path) as file:
        return path, set(file.namelist()), done.stdout + done.stderr


def _installed(wheel, folder):
    """A folder to import the wheel's package from."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def _facts(folder, **variables):
    done = tiny_csrc.run(FACTS, folder, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_nvcc
def test_a_wheel_holds_a_library_for_every_python_and_builds_itself_anew(project, tmp_path_factory):
    wheel, names, _ = _wheel(project, ADAMIX_CUDA="1", ADAMIX_ARCHITECTURES="8.0, 75")
    assert "-cp310-abi3-linux_" in wheel.name
    assert {"adamix_kernels/_C.abi3.so", "adamix_kernels/csrc/doubling/doubling.cu"} <= names
    folder = _installed(wheel, tmp_path_factory.mktemp("installed"))
    facts = _facts(folder)
    library = facts["cuda_library"]
    assert library["problem"] is None
    assert library["architectures"] == ["75", "80+PTX"]
    assert not library["csrc_changed"]
    assert "torch sees no GPU" in facts["backends"]["cuda"]["reason"]

    (folder / "adamix_kernels/csrc/common/words.h").open("a").write("\n")
    assert _facts(folder)["cuda_library"]["csrc_changed"]
    code = "import runpy, sys; sys.argv[1:] = []; runpy.run_module('adamix_kernels._build', run_name='__main__')"
    done = tiny_csrc.run(code, folder, ADAMIX_ARCHITECTURES="75+PTX")
    assert done.returncode == 0, done.stderr
    again = _facts(folder)["cuda_library"]
    assert (again["problem"], again["architectures"], again["csrc_changed"]) == (None, ["75+PTX"], False)


def test_without_nvcc_the_package_is_pure_python_and_says_why(project, tmp_path_factory):
    wheel, names, printed = _wheel(project, CUDA_HOME="/nowhere")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]
    assert "adamix_kernels/csrc/doubling/doubling.cu" in names
    assert "built without the C++/CUDA library: no nvcc: /nowhere/bin/nvcc is not there" in printed
    facts = _facts(_installed(wheel, tmp_path_factory.mktemp("installed")))
    for words in (facts["cuda_library"]["problem"], facts["backends"]["cuda"]["reason"]):
        assert "not built into this installation: no nvcc: /nowhere/bin/nvcc is not there" in words
    assert facts["backends"]["reference"]["usable"]


def test_a_library_that_was_asked_for_and_cannot_be_built_is_an_error(project):
    done = tiny_csrc.run(WHEEL, project, ADAMIX_CUDA="1", CUDA_HOME="/nowhere")
    assert done.returncode != 0
    assert "ADAMIX_CUDA=1, but the C++/CUDA library cannot be built: no nvcc" in done.stderr
    done = tiny_csrc.run(WHEEL, project, ADAMIX_CUDA="yes")
    assert done.returncode != 0
    assert "ADAMIX_CUDA: got 'yes', expected one of auto, 0, 1" in done.stderr
    assert not list(project.glob("dist/*.whl"))


@needs_nvcc
def test_what_the_compiler_says_is_shown(project, tmp_path_factory):
    source = project / "csrc/doubling/doubling.cu"
    source.write_text(source.read_text() + "\nint broken = nobody;\n")
    done = tiny_csrc.run(WHEEL, project, ADAMIX_CUDA="1", ADAMIX_ARCHITECTURES="75")
    assert done.returncode != 0
    assert 'identifier "nobody" is undefined' in done.stderr
    # What an earlier build left behind is not taken for this one's.
    (stale,) = project.glob("build/lib*/adamix_kernels")
    (stale / "_C.abi3.so").write_bytes(b"old")
    wheel, names, printed = _wheel(project, ADAMIX_ARCHITECTURES="75")
    assert 'identifier "nobody" is undefined' in printed
    assert "adamix_kernels/_C.abi3.so" not in names
    problem = _facts(_installed(wheel, tmp_path_factory.mktemp("installed")))["cuda_library"]["problem"]
    assert "not built into this installation: " in problem
    assert problem.endswith('error: identifier "nobody" is undefined')


@needs_nvcc
def test_an_editable_installation_builds_in_place_and_is_not_undone(project):
    code = "from setuptools import build_meta; print(build_meta.build_editable('dist'))"
    done = tiny_csrc.run(code, project, ADAMIX_CUDA="1", ADAMIX_ARCHITECTURES="75")
    assert done.returncode == 0, done.stderr
    built = _facts(project)["cuda_library"]
    assert built["path"] == str(project / "adamix_kernels/_C.abi3.so")
    assert (built["problem"], built["architectures"]) == (None, ["75+PTX"])
    assert not (project / "adamix_kernels/csrc").exists()
    assert tiny_csrc.run(code, project, ADAMIX_CUDA="0").returncode == 0
    assert _facts(project)["cuda_library"] == built


def test_an_editable_installation_without_a_library_says_why(project):
    code = "from setuptools import build_meta; print(build_meta.build_editable('dist'))"
    assert tiny_csrc.run(code, project, ADAMIX_CUDA="0").returncode == 0
    assert _facts(project)["cuda_library"]["problem"].endswith("not built into this installation: ADAMIX_CUDA=0")


def test_a_library_for_the_cpu_takes_the_place_of_the_other(project):
    build = "from adamix_kernels import _build; print(_build.build_host('plain'))"
    done = tiny_csrc.run(build, project)
    assert done.returncode == 0, done.stderr
    library = done.stdout.strip()
    code = (
        "from adamix_kernels import _extension as e; import torch;"
        "print(e.on_host(), e.problem(), e.problem() or torch.ops.adamix_cuda.doubled(21))"
    )
    done = tiny_csrc.run(code, project, ADAMIX_CUDA_HOST=library)
    assert done.stdout.split() == ["True", "None", "42"], done.stdout + done.stderr
    missing = tiny_csrc.run(code, project, ADAMIX_CUDA_HOST="/nowhere/x.so").stdout
    assert "x.so did not load" in missing
    assert "x.so is built for the CPU" in tiny_csrc.run(code, project, ADAMIX_CUDA_LIBRARY=library).stdout.replace(
        Path(library).name, "x.so"
    )
    # Where the other is expected, it is refused.
    shutil.copy(library, project / "adamix_kernels/_C.abi3.so")
    assert "_C.abi3.so is built for the CPU" in tiny_csrc.run(code, project).stdout


def test_the_build_needs_nothing_but_the_standard_library(project):
    code = (
        "import sys, sysconfig; sys.path.append('adamix_kernels'); sysconfig.get_paths = lambda: dict.fromkeys("
        "['purelib', 'platlib'], '/nowhere'); import _build; print(_build.obstacle())"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch is not installed; install it first" in done.stdout


def test_nvcc_is_taken_from_cuda_home_and_must_be_new_enough(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", tiny_csrc.nvcc(tmp_path / "new", "12.6.85", "70 80"))
    found = toolchain.find_nvcc()
    assert (found.version, found.architectures) == ("12.6.85", ("70", "80"))
    assert found.path == tmp_path / "new/bin/nvcc"
    monkeypatch.setenv("CUDA_HOME", tiny_csrc.nvcc(tmp_path / "old", "11.8.89"))
    with pytest.raises(BuildError, match=r"nvcc is of CUDA 11\.8\.89, 12\.0 or newer is needed"):
        toolchain.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert "no nvcc: " in _build.obstacle()


@pytest.mark.parametrize(
    ("text", "gpus", "names"),
    [
        ("75;80;90", [], ["75", "80", "90+PTX"]),
        ("9.0+PTX 8.0 120 8.0", ["75"], ["80", "90+PTX", "120"]),
        ("", ["90"], ["90+PTX"]),
        ("", ["75", "120"], ["75", "120+PTX"]),
        ("all", ["90"], ["70", "75", "80", "90", "100", "120+PTX"]),
        ("", [], ["70", "75", "80", "90", "100", "120+PTX"]),
    ],
)
def test_architectures_come_from_the_variable_then_the_gpus_then_all(monkeypatch, text, gpus, names):
    nvcc = toolchain.Nvcc(Path("nvcc"), "12.9.86", ("70", "75", "80", "90", "100", "120"))
    monkeypatch.setenv("ADAMIX_ARCHITECTURES", text)
    monkeypatch.setattr(toolchain, "visible_gpus", lambda: gpus)
    assert toolchain.wanted_architectures(nvcc) == names


def test_an_architecture_that_nvcc_does_not_know_is_named(monkeypatch):
    nvcc = toolchain.Nvcc(Path("nvcc"), "13.0.88", ("75", "80"))
    monkeypatch.setenv("ADAMIX_ARCHITECTURES", "70;80")
    with pytest.raises(BuildError, match=r"compiles for 75, 80, not for 70; .*\(V100\) needs nvcc 12"):
        toolchain.wanted_architectures(nvcc)
    monkeypatch.setenv("ADAMIX_ARCHITECTURES", "ninety")
    with pytest.raises(BuildError, match="not for ninety"):
        toolchain.wanted_architectures(nvcc)


def test_machine_code_and_ptx_have_their_options():
    assert toolchain.gencode(["80", "90+PTX"]) == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90,code=[sm_90,compute_90]"),
    ]


@pytest.mark.parametrize(
    ("version", "header", "words"),
    [
        ("2.10.1", True, "torch 2.10.1 is installed, 2.11 or newer"),
        ("2.13.0", False, "holds no C"),
        (None, False, "not installed"),
    ],
)
def test_what_torch_lacks_is_named(tmp_path, monkeypatch, version, header, words):
    if version:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    if header:
        (tmp_path / "torch/include/torch/csrc/stable").mkdir(parents=True)
        (tmp_path / "torch/include/torch/csrc/stable/library.h").write_text("")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: {"platlib": tmp_path, "purelib": tmp_path})
    with pytest.raises(BuildError, match=words):
        toolchain.find_torch()


def test_only_what_changed_is_compiled_again(tmp_path):
    csrc, kept = tmp_path / "csrc", tmp_path / "objects"
    (csrc / "op").mkdir(parents=True)
    kept.mkdir()
    (csrc / "a.h").write_text('#include "b.h"\n')
    (csrc / "b.h").write_text("int b();\n")
    (csrc / "op/one.cpp").write_text('#include "a.h"\nint one() { return 1; }\n')
    (csrc / "op/two.cpp").write_text("int two() { return 2; }\n")

    def compile_all(*flags):
        made = []
        for source in objects.sources(csrc):
            read = objects.with_includes(source, csrc)
            made.append(objects.compile_one(["g++"], ["-c", f"-I{csrc}", *flags], source, read, kept, ("1",)).object)
        assert len(list(kept.glob("*.o"))) == 2
        return [(path, path.stat().st_mtime_ns) for path in made]

    one, two = compile_all()
    assert compile_all() == [one, two]
    (csrc / "b.h").write_text("int b(int);\n")
    changed, same = compile_all()
    assert changed[0] != one[0]
    assert same == two
    assert {path for path, _ in compile_all("-O2")}.isdisjoint({changed[0], two[0]})


def test_a_failed_build_leaves_the_old_file_and_no_other(tmp_path):
    output = tmp_path / "x.so"
    output.write_text("old")
    with pytest.raises(BuildError, match=r"status \d+ from\n.*g\+\+"):
        objects.link(["g++", "-shared"], [objects.Compiled(output, tmp_path / "none.o", "")], [], output)
    assert output.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.so"]


def test_machine_code_serves_its_major_version_and_ptx_all_newer():
    assert [c for c in (75, 80, 86, 90, 120) if _extension.serves("80", c)] == [80, 86]
    assert [c for c in (75, 80, 86, 90, 120) if _extension.serves("86", c)] == [86]
    assert [c for c in (75, 80, 86, 90, 120) if _extension.serves("80+PTX", c)] == [80, 86, 90, 120]


def test_no_job_is_not_a_number_of_jobs(capsys):
    from adamix_kernels._build.__main__ import main

    with pytest.raises(SystemExit):
        main(["--jobs", "0"])
    assert "--jobs: got 0, expected at least 1" in capsys.readouterr().err
