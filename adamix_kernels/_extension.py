"""The compiled C++/CUDA library: whether it is there, what it was built for, and if it cannot be used, why not.

ADAMIX_CUDA_HOST=<shared object> puts another in its place, whose kernels g++ compiled for the CPU
(`python -m adamix_kernels._build --host`): for tests, as TRITON_INTERPRET=1 is for Triton.
ADAMIX_CUDA_LIBRARY=<shared object> puts another in its place that was built for GPUs.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from torch.utils._mode_utils import no_dispatch

from ._limits import UNLIMITED, Extent

_PACKAGE = Path(__file__).parent
_HOST = "ADAMIX_CUDA_HOST"
_OTHER = "ADAMIX_CUDA_LIBRARY"
# Whose stable ABI the library is built on.
OLDEST_TORCH = "2.11"
# kMaxGroups in csrc/common/column_ranges.h.
_GROUPED = UNLIMITED._replace(groups=64)


@functools.cache
def on_host() -> bool:
    """Whether backend="cuda" means kernels that run on the CPU and take its tensors."""
    return bool(os.environ.get(_HOST))


@functools.cache
def library_path() -> Path | None:
    """The shared object: that of ADAMIX_CUDA_HOST or _LIBRARY, else the one built into this package, else None."""
    named = os.environ.get(_HOST) or os.environ.get(_OTHER)
    if named:
        return Path(named)
    found = sorted(_PACKAGE.glob("_C*.so"))
    return found[0] if found else None


def folder() -> Path:
    """Where the library lies, or would: the module of autograd's nodes (ops/_node.py) lies there too."""
    path = library_path()
    return _PACKAGE if path is None else path.parent


@functools.cache
def record() -> dict[str, Any]:
    """What the build wrote down: {"built": True, "architectures", "nvcc", "torch", "sources"}, or {"built": False,
    "reason"}; {} where nothing was written, or for a library that an environment variable names."""
    if on_host() or os.environ.get(_OTHER):
        return {}
    try:
        return json.loads((_PACKAGE / "_C.json").read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def load_problem() -> str | None:
    """Why the library is not loaded into this process, or None: its ops are then in torch.ops.adamix_cuda."""
    path = library_path()
    if path is None:
        reason = record().get("reason")
        return "the C++/CUDA library was not built into this installation" + (f": {reason}" if reason else "")
    if torch.__version__ < OLDEST_TORCH:
        return f"the C++/CUDA library needs torch {OLDEST_TORCH} or newer, this is {torch.__version__}"
    try:
        torch.ops.load_library(str(path))
        built_for = torch.ops.adamix_cuda.build_info()
    except (OSError, AttributeError) as error:
        return f"{path.name} did not load: {error}"
    for name in ("tile_columns", "most_merged"):  # the newest
        if not hasattr(torch.ops.adamix_cuda, name):
            return f"{path.name} is another version's, without {name}(): {_build_again(path)} makes this version's"
    if on_host() != (built_for == "host"):
        return f"{_HOST}: {path} is built for {built_for}" if on_host() else f"{path.name} is built for the CPU"
    return None


def _build_again(path: Path) -> str:
    """The command whose library lies where this one does."""
    named = bool(os.environ.get(_HOST) or os.environ.get(_OTHER))
    variant = next((f" {name}" for name in ("asan", "tsan") if path.stem.endswith(name)), "")
    host, output = f" --host{variant}" * on_host(), f" --output {shlex.quote(str(path))}" * named
    return f"python -m adamix_kernels._build{host}{output}"


@functools.cache
def problem() -> str | None:
    """Why backend="cuda" can be used on no device of this process, or None."""
    found = load_problem()
    if found is not None:
        return found
    if not on_host() and not torch.cuda.is_available():
        return "the C++/CUDA library is loaded, and torch sees no GPU"
    with no_dispatch():
        found = _library().driver_problem()
    if found:
        return f"the C++/CUDA library is loaded, and {found}"
    if on_host():
        return device_problem(0)
    reasons = [_capability_problem(device) for device in range(torch.cuda.device_count())]
    return None if None in reasons else "; ".join(reason for reason in reasons if reason)


@functools.cache
def device_problem(device: int) -> str | None:
    """Why the kernels do not run on this GPU, or None, where the library is loaded: asked once, of the driver.

    One kernel is loaded there, which makes the GPU's context, as any tensor on it has.
    """
    found = None if on_host() else _capability_problem(device)
    if found is None:
        with no_dispatch():
            found = _library().device_problem(device)
        found = f"GPU {device}: {found}" if found else None
    return found


def devices_in_words() -> tuple[bool, str]:
    """Where `problem` is None: whether the kernels run on a GPU; on which, and why not on the others.

    The current GPU is asked, of the others only what torch knows: their contexts cost memory.
    """
    if on_host():
        return True, "ready"
    here = torch.cuda.current_device()
    found = {
        device: device_problem(device) if device == here else _capability_problem(device)
        for device in range(torch.cuda.device_count())
    }
    ready = [str(device) for device, reason in found.items() if reason is None]
    if len(ready) == len(found):
        return True, "ready"
    reasons = "; ".join(reason for reason in found.values() if reason)
    return bool(ready), f"ready on GPU {', '.join(ready)}; {reasons}" if ready else reasons


def _capability_problem(device: int) -> str | None:
    with no_dispatch():
        names = _library().build_info().split(";")
    major, minor = torch.cuda.get_device_capability(device)
    if any(serves(name, 10 * major + minor) for name in names):
        return None
    return f"the C++/CUDA library is built for {', '.join(names)}; GPU {device} is of {major}.{minor}"


def _library() -> Any:
    return torch.ops.adamix_cuda


def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve this device and dtype, or None, where `problem` is None; an op's `unsupported`."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the C++/CUDA kernels compute in float16, bfloat16 and float32, not {dtype}"
    wanted = "cpu" if on_host() else "cuda"
    if device_type != wanted:
        return f"the C++/CUDA kernels are loaded for {wanted!r}, not for {device_type!r}"
    return None


def routed_most(device: torch.device, dtype: torch.dtype) -> Extent:
    """The most that the routed kernels take: a tile's narrow columns stand in a block's shared memory."""
    return _most("columns", _number(device), dtype.itemsize, _stood_for())


def merge_most(device: torch.device, dtype: torch.dtype) -> Extent:
    """The most that merging takes: a bank's shares stand in a block's shared memory."""
    return _most("experts", _number(device), dtype.itemsize, _stood_for())


def grouped_most(device: torch.device, dtype: torch.dtype) -> Extent:
    """The most that the gated kernels take, whose tiles hold a part of the columns where they do not hold all."""
    return _GROUPED


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index or 0


def _stood_for() -> str | None:
    """What the CPU stands for, which the environment says at any time."""
    return os.environ.get("ADAMIX_HOST_SHARED") if on_host() else None


@functools.cache
def _most(what: str, device: int, itemsize: int, _stood_for: str | None) -> Extent:
    with no_dispatch():
        if what == "experts":
            return UNLIMITED._replace(experts=_library().most_merged(device))
        return _GROUPED._replace(columns=_library().tile_columns(device, itemsize))


def serves(name: str, capability: int) -> bool:
    """Whether code built for `name` ("80", "120+PTX") runs on a GPU of 10 * compute capability.

    Machine code runs within its major version, from its own minor version up; PTX on everything newer.
    """
    built = int(name.removesuffix("+PTX"))
    return built <= capability and (built // 10 == capability // 10 or name.endswith("+PTX"))
