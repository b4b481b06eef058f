"""Which backend serves which op, and why.

Selection is a pure function of (op, request, device, dtype): no tensor value is read, so it is
the same while tracing, under CUDA-graph capture and in eager mode.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import torch

OPS = ("routed_adapter", "routed_lora", "merge", "consistency")
REQUESTS = ("auto", "reference", "triton", "cuda")
# "auto" takes the first of these that can serve the call. A kernel backend joins once its tests have passed on a
# GPU and a committed measurement says that it wins; until then it serves explicit requests.
_PREFERENCE = ("reference",)
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

    Example:
        >>> state = backends()["reference"]
        >>> state.usable, "routed_lora" in state.ops
        (True, True)
    """

    name: str
    usable: bool
    ops: tuple[str, ...]
    reason: str


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
        return f"this build has no {backend} implementation of {op}"
    problem = _environment_problem(backend)
    if problem is not None or backend == "reference":
        return problem
    return _load(op, backend).unsupported(device.type, dtype) or _device_problem(backend, device)


@functools.cache
def _load(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f".ops.{op}.{_MODULES[backend]}", __package__)


@functools.cache
def select(op: str, request: str, device: torch.device | str, dtype: torch.dtype) -> ModuleType:
    """The module that serves `op` on this device: an explicit request is met or refused, "auto" falls back.

    A device without a number, such as "cuda", stands for all of its type. Raises ValueError for an unknown request and
    BackendUnavailableError, with the reason, for an explicit request that cannot be met.
    """
    check_request(request)
    device = torch.device(device)
    if request != "auto":
        problem = _problem(op, request, device, dtype)
        if problem is not None:
            raise BackendUnavailableError(
                f"backend={request!r} cannot serve {op} on device {str(device)!r} with {dtype}: {problem}"
            )
        return _load(op, request)
    chosen = next(b for b in _PREFERENCE if _problem(op, b, device, dtype) is None)
    return _load(op, chosen)


def check_request(request: str) -> None:
    """Raises ValueError unless `request` is a backend name or "auto"."""
    if request not in REQUESTS:
        raise ValueError(f"backend: got {request!r}, expected one of {', '.join(map(repr, REQUESTS))}")


def backends() -> dict[str, BackendState]:
    """The state of every backend: name -> BackendState(usable, ops, reason).

    Nothing is launched and no optional package is imported that is not installed.

    Example:
        >>> list(backends())
        ['reference', 'triton', 'cuda']
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
