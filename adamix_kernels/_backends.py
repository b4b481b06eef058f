"""Which backend serves which op, and why.

Selection is a pure function of (op, request, device, dtype, sizes) and of the table that "auto" looks into (_auto.py):
no tensor value is read, so it is the same while tracing, under CUDA-graph capture and in eager mode.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from . import _auto
from ._limits import UNLIMITED, Extent, refusal

OPS = ("routed_adapter", "routed_lora", "gated_adapter", "gated_lora", "router", "mixture_lora", "merge", "consistency")
REQUESTS = ("auto", "reference", "triton", "cuda")
_MODULES = {"reference": "reference", "triton": "triton_impl", "cuda": "cuda_impl"}


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot serve this call; the message says why.

    Example:
        >>> try:
        ...     merge_experts(torch.ones(2, 3), backend="triton")
        ... except BackendUnavailableError as error:
        ...     print(error)  # doctest: +ELLIPSIS
        backend...triton...
    """


@dataclass(frozen=True)
class BackendState:
    """State of one backend in this process.

    usable: whether at least one op can run on it here.
    ops: the ops it implements in this build.
    reason: why it is usable or not, in words.
    verdicts: what `verify` found out about it on this machine's GPUs (adamix_kernels.verifying.Verdict), if anything.

    Example:
        >>> state = backends()["reference"]
        >>> state.usable, "routed_lora" in state.ops
        (True, True)
    """

    name: str
    usable: bool
    ops: tuple[str, ...]
    reason: str
    verdicts: tuple[Any, ...] = ()


def _implements(op: str, backend: str) -> bool:
    return importlib.util.find_spec(f".ops.{op}.{_MODULES[backend]}", __package__) is not None


def _implemented_ops(backend: str) -> tuple[str, ...]:
    return tuple(op for op in OPS if _implements(op, backend))


@functools.cache
def _environment_problem(backend: str) -> str | None:
    """Why this machine cannot run `backend` at all, or None."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton compiles for GPUs and torch sees none (TRITON_INTERPRET=1 interprets kernels, for tests)"
    if backend == "cuda":
        from . import _extension

        return _extension.problem()
    return None


def _device_problem(backend: str, device: torch.device) -> str | None:
    """Why `backend`, which this machine can run, cannot run on this very device, or None."""
    if backend == "triton":
        from . import _triton_utils

        return _triton_utils.device_problem(device)
    if backend != "cuda":
        return None
    from . import _extension

    if _extension.on_host():
        return None
    return None if device.index is None else _extension.device_problem(device.index)


@functools.cache
def _problem(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve `op` on this device and dtype, or None."""
    if not _implements(op, backend):
        return f"this build has no {backend} implementation of {op}; backend='reference' computes it on every device"
    problem = _environment_problem(backend)
    if problem is not None or backend == "reference":
        return problem
    return _load(op, backend).unsupported(device.type, dtype) or _device_problem(backend, device)


@functools.cache
def _load(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f".ops.{op}.{_MODULES[backend]}", __package__)


def select(
    op: str,
    request: str,
    device: torch.device | str,
    dtype: torch.dtype,
    size: int = 0,
    extent: Extent | None = None,
) -> ModuleType:
    """The module that serves `op` on this device: an explicit request is met or refused, "auto" looks it up.

    size: what the class of shapes goes by (_auto.SHAPES); "auto" alone asks for it. extent: where it exceeds what the
    kernels take, "auto" takes the reference. A device without a number, such as "cuda", stands for all of its type;
    with an extent it has one. Raises ValueError for an unknown request and BackendUnavailableError, with the reason,
    for an explicit request that cannot be met.
    """
    module = (
        _selected(op, request, device, dtype, size, _auto.table)
        if request == "auto"
        else _asked(op, request, device, dtype)
    )
    if extent is None or not hasattr(module, "most"):
        return module
    device = device if isinstance(device, torch.device) else torch.device(device)
    most = most_of(module, device, dtype)
    if not extent.exceeds(most):
        return module
    if request == "auto":
        return _load(op, "reference")
    raise BackendUnavailableError(
        f"backend={request!r} cannot serve this call of {op}: {refusal(request, device, dtype, extent, most)}"
    )


def most_of(module: ModuleType, device: torch.device, dtype: torch.dtype) -> Extent:
    """The most that a backend's module takes, by its own word: most(device, dtype)."""
    most = getattr(module, "most", None)
    found: Extent = UNLIMITED if most is None else most(device, dtype)
    return found


@functools.cache
def _asked(op: str, request: str, device: torch.device | str, dtype: torch.dtype) -> ModuleType:
    check_request(request)
    device = torch.device(device)
    problem = _problem(op, request, device, dtype)
    if problem is not None:
        raise BackendUnavailableError(
            f"backend={request!r} cannot serve {op} on device {str(device)!r} with {dtype}: {problem}"
        )
    return _load(op, request)


@functools.lru_cache(4096)
def _selected(
    op: str, request: str, device: torch.device | str, dtype: torch.dtype, size: int, table: _auto.Table
) -> ModuleType:
    device = torch.device(device)
    chosen = table.backend(op, device, dtype, size)
    if chosen != "reference" and _problem(op, chosen, device, dtype) is not None:
        chosen = "reference"
    return _load(op, chosen)


def check_request(request: str) -> None:
    """Raises ValueError unless `request` is a backend name or "auto"."""
    if request not in REQUESTS:
        raise ValueError(f"backend: got {request!r}, expected one of {', '.join(map(repr, REQUESTS))}")


def problem(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve `op` on this device and dtype, or None."""
    return _problem(op, backend, device, dtype)


def backends() -> dict[str, BackendState]:
    """The state of every backend: name -> BackendState(usable, ops, reason), without verdicts (see verifying).

    Nothing is launched and no optional package is imported that is not installed.
    """
    states = {}
    for name in _MODULES:
        ops = _implemented_ops(name)
        usable, reason = _state(name)
        if not ops:
            usable, reason = False, "this build has no kernels for it" + ("" if usable else f"; also, {reason}")
        states[name] = BackendState(name, usable, ops, reason)
    return states


def _state(backend: str) -> tuple[bool, str]:
    """Whether this machine runs `backend` on one device at least, and on which, or why not."""
    problem = _environment_problem(backend)
    if problem is not None:
        return False, problem
    if backend == "cuda":
        from . import _extension

        return _extension.devices_in_words()
    return True, "runs on any device" if backend == "reference" else "ready"
