"""Installing: the library where nvcc is, a package without it where not, and always the reason."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tiny_csrc

from adamix_kernels._build import BuildError, toolchain

EDITABLE = "from setuptools import build_meta; print(build_meta.build_editable('dist'))"
WHEEL = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
FACTS = "import json; from adamix_kernels.commands import env; print(json.dumps(env.describe()))"
HEADER = Path(sysconfig.get_paths()["include"], "Python.h")
NODE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_node"};
PyMODINIT_FUNC PyInit__node() { return PyModule_Create(&definition); }
"""


def _nvcc_problem():
    try:
        toolchain.find_nvcc()
    except BuildError as error:
        return str(error)
    return None


NVCC_PROBLEM = _nvcc_problem()
needs_nvcc = pytest.mark.skipif(NVCC_PROBLEM is not None, reason=str(NVCC_PROBLEM))


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
    wheel, names, printed = _wheel(project, CUDA_HOME="/nowhere", PATH=tiny_csrc.nvidia_smi(project))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]
    assert "adamix_kernels/csrc/doubling/doubling.cu" in names
    assert "built without the C++/CUDA library: no nvcc: /nowhere/bin/nvcc is not there" in printed
    facts = _facts(_installed(wheel, tmp_path_factory.mktemp("installed")))
    for words in (facts["cuda_library"]["problem"], facts["backends"]["cuda"]["reason"]):
        assert "not built into this installation: no nvcc: /nowhere/bin/nvcc is not there" in words
    assert facts["backends"]["reference"]["usable"]


@pytest.mark.skipif(shutil.which("g++") is None or not HEADER.is_file(), reason="no g++, or no Python.h")
def test_without_nvcc_gxx_builds_autograds_nodes_where_a_gpu_is(project, tmp_path_factory):
    found = {"PATH": tiny_csrc.nvidia_smi(project), "CUDA_HOME": "/nowhere"}
    found["PYTHONPATH"] = f"{tiny_csrc.torch(project)}{os.pathsep}{project}"
    node = project / "csrc/autograd/module.cpp"
    node.parent.mkdir()
    node.write_text("#error not today\n")
    wheel, names, printed = _wheel(project, **found)
    assert "autograd's nodes stay in Python: status 1 from" in printed
    assert "python -m adamix_kernels._build --node" in printed
    assert not [name for name in names if name.endswith(".so")]
    node.write_text(NODE)
    wheel, names, printed = _wheel(project, **found)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert f"adamix_kernels/_node-2.13.0{suffix}" in names
    assert "none-any" not in wheel.name
    assert "nodes stay in Python" not in printed
    _, names, printed = _wheel(project, **found, ADAMIX_CUDA="0")
    assert "autograd's nodes stay in Python: ADAMIX_CUDA=0" in printed


def test_a_library_that_was_asked_for_and_cannot_be_built_is_an_error(project):
    done = tiny_csrc.run(WHEEL, project, ADAMIX_CUDA="1", CUDA_HOME="/nowhere")
    assert done.returncode != 0
    assert "ADAMIX_CUDA=1, but the C++/CUDA library cannot be built: no nvcc" in done.stderr
    done = tiny_csrc.run(WHEEL, project, ADAMIX_CUDA="yes")
    assert done.returncode != 0
    assert "ADAMIX_CUDA: got 'yes', expected one of auto, 0, 1" in done.stderr
    assert not list(project.glob("dist/*.whl"))


@pytest.mark.nightly
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
    site = tiny_csrc.torch(project)
    found = {"PATH": tiny_csrc.nvidia_smi(project, "7.5"), "PYTHONPATH": f"{site}{os.pathsep}{project}"}
    wheel, names, printed = _wheel(project, **found)
    assert 'identifier "nobody" is undefined' in printed
    assert "adamix_kernels/_C.abi3.so" not in names
    problem = _facts(_installed(wheel, tmp_path_factory.mktemp("installed")))["cuda_library"]["problem"]
    assert "not built into this installation: " in problem
    assert problem.endswith('error: identifier "nobody" is undefined')


@needs_nvcc
def test_an_editable_installation_builds_in_place_and_is_not_undone(project):
    done = tiny_csrc.run(EDITABLE, project, ADAMIX_CUDA="1", ADAMIX_ARCHITECTURES="75")
    assert done.returncode == 0, done.stderr
    built = _facts(project)["cuda_library"]
    assert built["path"] == str(project / "adamix_kernels/_C.abi3.so")
    assert (built["problem"], built["architectures"]) == (None, ["75+PTX"])
    assert not (project / "adamix_kernels/csrc").exists()
    assert tiny_csrc.run(EDITABLE, project, ADAMIX_CUDA="0").returncode == 0
    assert _facts(project)["cuda_library"] == built


def test_an_editable_installation_without_a_library_says_why(project):
    assert tiny_csrc.run(EDITABLE, project, ADAMIX_CUDA="0").returncode == 0
    assert _facts(project)["cuda_library"]["problem"].endswith("not built into this installation: ADAMIX_CUDA=0")


@pytest.mark.nightly
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
        "['purelib', 'platlib'], '/nowhere'); import _build; print(_build.obstacle(asked=True))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch is not installed where this build looks; install it first" in done.stdout


def test_a_gpu_that_is_seen_is_what_is_built_for(project, tmp_path_factory):
    """All that an installation does by itself, up to an nvcc that compiles nothing."""
    site = tiny_csrc.torch(project)
    found = {
        "PATH": tiny_csrc.nvidia_smi(project, "9.0"),
        "PYTHONPATH": f"{site}{os.pathsep}{project}",
        "CUDA_HOME": tiny_csrc.nvcc(project, "13.0.88"),
        "MAX_JOBS": "1",
    }
    wheel, names, printed = _wheel(project, **found)
    assert "csrc/ is compiled for compute capability 90+PTX with nvcc 13.0.88, torch 2.13.0" in printed
    assert "compiling 2 of 2 files, 1 at a time" in printed
    assert "built without the C++/CUDA library: csrc/ does not compile: status 1" in printed
    assert "adamix_kernels/_C.abi3.so" not in names
    wheel, names, printed = _wheel(project, **found | {"CUDA_HOME": tiny_csrc.nvcc(project, "14.0.1")})
    assert "built without the C++/CUDA library: " in printed
    facts = _facts(_installed(wheel, tmp_path_factory.mktemp("installed")))
    assert "is of CUDA 14.0.1, and torch 2.13.0 is built with CUDA 13.0" in facts["cuda_library"]["problem"]
    done = tiny_csrc.run(WHEEL, project, ADAMIX_CUDA="1", **found)
    assert done.returncode != 0
    assert "ADAMIX_CUDA=1, but the C++/CUDA library cannot be built: " in done.stderr
    assert "is of CUDA 14.0.1" in done.stderr


def test_an_older_torch_makes_the_pure_package_and_is_told(project, tmp_path_factory):
    found = {"PATH": tiny_csrc.nvidia_smi(project), "CUDA_HOME": tiny_csrc.nvcc(project, "12.6.85")}
    site = tiny_csrc.torch(project, "2.8.0+cu126", "12.6")
    wheel, _, printed = _wheel(project, **found, PYTHONPATH=f"{site}{os.pathsep}{project}")
    words = "torch 2.8.0+cu126 is installed, and the C++/CUDA library needs 2.11 or newer (the other backends do not)"
    assert wheel.name.endswith("-py3-none-any.whl")
    assert f"built without the C++/CUDA library: {words}" in printed
    assert _facts(_installed(wheel, tmp_path_factory.mktemp("installed")))["cuda_library"]["problem"].endswith(words)


def test_ninja_comes_into_an_isolated_build_of_the_library_alone(project):
    code = "from setuptools import build_meta; print(build_meta.get_requires_for_build_wheel())"
    nowhere = {"PATH": str(project / "nothing"), "CUDA_HOME": tiny_csrc.nvcc(project, "13.0.88")}
    beside = [] if shutil.which("ninja", path=sysconfig.get_path("scripts")) else ["ninja>=1.10"]
    for mode, wanted in (("0", []), ("auto", []), ("1", beside)):
        done = tiny_csrc.run(code, project, ADAMIX_CUDA=mode, **nowhere)
        assert done.stdout.strip().splitlines()[-1:] == [str(wanted)], done.stderr
