"""What the build needs of this machine: torch's headers, nvcc, and the architectures to compile for."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 11)
OLDEST_NVCC = (12, 0)
# 10 * compute capability: what is built for where no GPU is seen, as far as nvcc knows it.
ARCHITECTURES = ("70", "75", "80", "90", "100", "120")
# Where the driver puts its device files: nvidia0, nvidia1, ...
DEVICES = Path("/dev")


class BuildError(RuntimeError):
    """The library cannot be built; the message says what is missing, or what the compiler said."""


@dataclass(frozen=True)
class Torch:
    """An installed torch: its folder, its version, and the CUDA it is built with ("13.0"; None: it has none)."""

    folder: Path
    version: str
    cuda: str | None = None


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: its path, its version ("13.0.88"), and the architectures it knows ("75", "80", ...)."""

    path: Path
    version: str
    architectures: tuple[str, ...]


def find_torch() -> Torch:
    """The torch of this interpreter, not imported, also seen from an isolated build; BuildError: missing, too old."""
    spec = importlib.util.find_spec("torch")
    places = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    places += [Path(sysconfig.get_paths()[name]) / "torch" for name in ("platlib", "purelib")]
    folder = next((p for p in places if (p / "version.py").is_file()), None)
    if folder is None:
        raise BuildError(
            "torch is not installed where this build looks; install it first, then build without isolation "
            "(pip or uv pip install --no-build-isolation, with setuptools and wheel beside torch)"
        )
    text = (folder / "version.py").read_text()
    named = re.search(r"__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)", text)
    if named is None:
        raise BuildError(f"{folder}/version.py names no version")
    if (int(named[2]), int(named[3])) < OLDEST_TORCH:
        raise BuildError(
            f"torch {named[1]} is installed, and the C++/CUDA library needs {_dotted(OLDEST_TORCH)} or newer "
            "(the other backends do not)"
        )
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"{folder} holds no C++ headers (include/torch/csrc/stable/library.h)")
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)", text, re.MULTILINE)
    return Torch(folder, named[1], cuda[1] if cuda else None)


def find_nvcc() -> Nvcc:
    """nvcc of $CUDA_HOME, else $CUDA_PATH, else $PATH, else /usr/local/cuda; BuildError: missing or too old."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = Path(home) / "bin/nvcc" if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if not os.access(path, os.X_OK):
        raise BuildError(f"no nvcc: {path} is not there" + ("" if home else ", nor one in $PATH"))
    release = re.search(r"\bV(\d+)\.(\d+)\.\d+", run(path, "--version"))
    if release is None:
        raise BuildError(f"{path} --version names no version")
    version = release[0][1:]
    if (int(release[1]), int(release[2])) < OLDEST_NVCC:
        raise BuildError(f"{path} is of CUDA {version}, {_dotted(OLDEST_NVCC)} or newer is needed")
    known = re.findall(r"^compute_(\w+)\s*$", run(path, "--list-gpu-arch"), re.MULTILINE)
    return Nvcc(path, version, tuple(known))


def check_pair(torch: Torch, nvcc: Nvcc) -> None:
    """BuildError for an nvcc of a newer major CUDA than torch's or than the driver runs.

    The CUDA runtime of nvcc's version is linked into the library; an older driver refuses its every call.
    """
    limits = {
        f"torch {torch.version} is built with": torch.cuda,
        "the driver of this machine runs up to": driver_cuda(),
    }
    for whose, version in limits.items():
        if version and _major(version) < _major(nvcc.version):
            raise BuildError(
                f"{nvcc.path} is of CUDA {nvcc.version}, and {whose} CUDA {version}; point CUDA_HOME at a toolkit of "
                f"CUDA {_major(version)}"
            )


def driver_cuda() -> str | None:
    """The newest CUDA that the driver runs ("12.4"), as nvidia-smi tells; None where it tells nothing."""
    found = re.search(r"CUDA (?:\w+ )?Version\s*:\s*(\d+\.\d+)", _nvidia_smi())
    return found[1] if found else None


def has_gpu() -> bool:
    """Whether nvidia-smi lists an NVIDIA GPU, or the driver has a device file for one."""
    return "GPU " in _nvidia_smi("-L") or any(re.fullmatch(r"nvidia\d+", path.name) for path in DEVICES.glob("nvidia*"))


def wanted_architectures(nvcc: Nvcc) -> list[str]:
    """What to compile for, ascending; "+PTX" marks those whose PTX is kept, the newest where none is marked.

    $ADAMIX_ARCHITECTURES, as "75;80;90+PTX" (8.0 means 80) or "all"; unset, those of the GPUs in this machine;
    without a GPU, and for "all", those of ARCHITECTURES that nvcc knows. BuildError: one that nvcc does not know.
    """
    text = os.environ.get("ADAMIX_ARCHITECTURES", "").strip()
    if text and text != "all":
        names = [name.replace(".", "") for name in re.split(r"[;,\s]+", text) if name]
    else:
        names = ([] if text else visible_gpus()) or [name for name in ARCHITECTURES if name in nvcc.architectures]
    unknown = [name for name in names if name.removesuffix("+PTX") not in nvcc.architectures]
    if unknown or not names:
        refused = ", ".join(unknown) or repr(text)
        hint = "; compute capability 7.0 (V100) needs nvcc 12" if any(n.startswith("70") for n in unknown) else ""
        raise BuildError(f"nvcc {nvcc.version} compiles for {', '.join(nvcc.architectures)}, not for {refused}{hint}")
    marked = {name.removesuffix("+PTX") for name in names if name.endswith("+PTX")}
    plain = sorted({name.removesuffix("+PTX") for name in names}, key=int)
    return [name + "+PTX" if name in (marked or plain[-1:]) else name for name in plain]


def visible_gpus() -> list[str]:
    """10 * compute capability of this machine's GPUs, as nvidia-smi tells; [] where it shows none."""
    found = re.findall(
        r"^(\d+)\.(\d+)\s*$", _nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader"), re.MULTILINE
    )
    return sorted({major + minor for major, minor in found}, key=int)


def _nvidia_smi(*options: str) -> str:
    """What it prints; "" where it is not there or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=30, check=True)
        return done.stdout
    return ""


def gencode(names: Sequence[str]) -> list[str]:
    """nvcc's options for architectures as `wanted_architectures` returns them."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def run(*command: str | Path) -> str:
    """What the command printed; BuildError, with the command and all it printed, when it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{words[0]} does not run: {error}") from None
    if done.returncode:
        raise BuildError(f"status {done.returncode} from\n{shlex.join(words)}\n{done.stdout}")
    return done.stdout


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
