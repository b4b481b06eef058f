"""What the build finds on a machine, and what it refuses: torch, nvcc, the driver, GPUs and their architectures."""

import re
import types
from pathlib import Path

import pytest
import tiny_csrc

from adamix_kernels import _build, _extension
from adamix_kernels._build import BuildError, toolchain


def _find_torch_in(folder, monkeypatch):
    """And not where this interpreter has it."""
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: {"platlib": folder, "purelib": folder})


def test_nvcc_is_taken_from_cuda_home_and_must_be_new_enough(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", tiny_csrc.nvcc(tmp_path / "new", "12.6.85", "70 80"))
    found = toolchain.find_nvcc()
    assert (found.version, found.architectures) == ("12.6.85", ("70", "80"))
    assert found.path == tmp_path / "new/bin/nvcc"
    monkeypatch.setenv("CUDA_HOME", tiny_csrc.nvcc(tmp_path / "old", "11.8.89"))
    with pytest.raises(BuildError, match=r"nvcc is of CUDA 11\.8\.89, 12\.0 or newer is needed"):
        toolchain.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert "no nvcc: " in _build.obstacle(asked=True)


@pytest.mark.parametrize(
    ("cuda", "driver", "words"),
    [
        ("12.8", "13.0", r"is of CUDA 13\.0\.88, and torch 2\.13\.0 is built with CUDA 12\.8; .* toolkit of CUDA 12"),
        ("13.0", "12.4", r"is of CUDA 13\.0\.88, and the driver of this machine runs up to CUDA 12\.4; .* of CUDA 12"),
        ("13.2", "13.0", None),
        ("13.0", "14.1", None),
    ],
)
def test_an_nvcc_newer_than_torch_or_the_driver_is_refused(tmp_path, monkeypatch, cuda, driver, words):
    site = tiny_csrc.torch(tmp_path, cuda=cuda)
    monkeypatch.setenv("CUDA_HOME", tiny_csrc.nvcc(tmp_path, "13.0.88"))
    monkeypatch.setenv("PATH", tiny_csrc.nvidia_smi(tmp_path, "9.0", driver))
    _find_torch_in(site, monkeypatch)
    monkeypatch.delenv("ADAMIX_ARCHITECTURES", raising=False)
    for asked in (False, True):
        found = _build.obstacle(asked)
        assert found is None if words is None else re.search(words, found)
    if words:
        with pytest.raises(BuildError, match=words):
            _build.build_cuda(tmp_path / "x.so")


def test_only_where_a_gpu_could_run_it_is_the_library_built_unasked(tmp_path, monkeypatch):
    site = tiny_csrc.torch(tmp_path, "2.13.0+cpu", None)
    monkeypatch.setenv("CUDA_HOME", tiny_csrc.nvcc(tmp_path, "13.0.88"))
    _find_torch_in(site, monkeypatch)
    monkeypatch.setattr(toolchain, "DEVICES", tmp_path / "dev")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "no NVIDIA GPU in this machine (ADAMIX_CUDA=1" in _build.obstacle()
    assert _build.obstacle(asked=True) is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert "no NVIDIA GPU" in _build.obstacle()
    (tmp_path / "dev/nvidia0").touch()
    assert "torch 2.13.0+cpu is made without CUDA (ADAMIX_CUDA=1" in _build.obstacle()
    monkeypatch.setenv("PATH", tiny_csrc.nvidia_smi(tmp_path, "7.5 9.0", "13.1"))
    assert (toolchain.has_gpu(), toolchain.visible_gpus(), toolchain.driver_cuda()) == (True, ["75", "90"], "13.1")


def test_a_library_is_not_loaded_into_an_older_torch(monkeypatch, tmp_path):
    from torch.torch_version import TorchVersion

    monkeypatch.setattr(_extension, "library_path", lambda: tmp_path / "x.so")
    monkeypatch.setattr(_extension.torch, "__version__", TorchVersion("2.10.0+cu128"))
    problem = _extension.load_problem.__wrapped__()
    assert problem == "the C++/CUDA library needs torch 2.11 or newer, this is 2.10.0+cu128"


def test_a_library_of_an_older_version_is_built_anew(monkeypatch, tmp_path):
    library = types.SimpleNamespace(build_info=lambda: "90", tile_columns=None)
    monkeypatch.setattr(_extension, "library_path", lambda: tmp_path / "x.so")
    monkeypatch.setattr(_extension.torch, "ops", types.SimpleNamespace(load_library=str, adamix_cuda=library))
    problem = _extension.load_problem.__wrapped__()
    assert problem == (
        "x.so is another version's, without most_merged(): python -m adamix_kernels._build makes this version's"
    )
    library.most_merged = None
    assert _extension.load_problem.__wrapped__() is None


@pytest.mark.parametrize(("host", "flags"), [(False, ""), (True, " --host")])
def test_another_version_that_a_variable_names_is_built_anew_in_its_place(monkeypatch, tmp_path, host, flags):
    library = types.SimpleNamespace(build_info=lambda: "host" if host else "90")
    monkeypatch.setenv("ADAMIX_CUDA_HOST" if host else "ADAMIX_CUDA_LIBRARY", str(tmp_path / "x.so"))
    monkeypatch.setattr(_extension, "on_host", lambda: host)
    monkeypatch.setattr(_extension, "library_path", lambda: tmp_path / "x.so")
    monkeypatch.setattr(_extension.torch, "ops", types.SimpleNamespace(load_library=str, adamix_cuda=library))
    problem = _extension.load_problem.__wrapped__()
    assert f": python -m adamix_kernels._build{flags} --output {tmp_path}/x.so makes" in problem


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
        ("2.10.1", True, "torch 2.10.1 is installed, and the C.* library needs 2.11 or newer"),
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
    _find_torch_in(tmp_path, monkeypatch)
    with pytest.raises(BuildError, match=words):
        toolchain.find_torch()


def test_machine_code_serves_its_major_version_and_ptx_all_newer():
    assert [c for c in (75, 80, 86, 90, 120) if _extension.serves("80", c)] == [80, 86]
    assert [c for c in (75, 80, 86, 90, 120) if _extension.serves("86", c)] == [86]
    assert [c for c in (75, 80, 86, 90, 120) if _extension.serves("80+PTX", c)] == [80, 86, 90, 120]
