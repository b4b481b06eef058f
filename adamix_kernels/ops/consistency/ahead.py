"""The logits' gradient together with the loss, for the incoming one that is expected, and what sets it right.

Eager mode on plain tensors alone has this, without the dispatcher: a traced graph has the two steps of op.py.
"""

from __future__ import annotations

from types import ModuleType

import torch

from ..._backends import select
from ._finite import checking
from .op import _adamix, _check_labels, _consistency


def is_eager(*logits: torch.Tensor) -> bool:
    """Whether these are plain tensors that nothing traces or intercepts."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in logits)
    )


def module_of(logits: torch.Tensor, backend: str) -> ModuleType:
    return select("consistency", backend, logits.device, logits.dtype)


def writes_gradient(backend: str, expected: float | None, *logits: torch.Tensor) -> bool:
    """Whether a forward on these writes the gradient too: eager mode, and a backend that does."""
    return is_eager(*logits) and all(
        module_of(t, backend).writes_gradient(t.device.type, t.dtype, expected) for t in logits
    )


def consistency_grad(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    reduction: str,
    backend: str,
    expected: float | None,
    da: torch.Tensor | None,
    db: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op `consistency`, and da and db are written (None: not wanted), which may be the logits."""
    if checking():
        # Before anything is overwritten.
        _consistency(logits_a, logits_b, mask, detach_target, reduction, backend)
    forward = module_of(logits_a, backend).forward_grad
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        return forward(logits_a, logits_b, mask, detach_target, reduction, expected or 1.0, da, db)


def adamix_grad(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    backend: str,
    expected: float | None,
    d_logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op `adamix_loss`, and d_logits is written, which may be logits."""
    options = weight, ignore_index, label_smoothing, detach_target
    if checking():
        _adamix(logits, labels, mask, num_items, *options, backend)
    _check_labels(labels, mask, ignore_index, logits.shape[-1])
    forward = module_of(logits, backend).adamix_forward_grad
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        return forward(logits, labels, mask, num_items, *options, expected or 1.0, d_logits)


def consistency_write(
    grad: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    detach_target: bool,
    backend: str,
    out: tuple[torch.Tensor | None, torch.Tensor | None],
    expected: float | None,
) -> None:
    """The gradients for `grad` into out, which may be the logits; left alone where out holds them for `expected`."""
    backward = module_of(saved[0], backend).backward
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        backward(grad, *saved, detach_target, out, expected)


def adamix_write(
    grad: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    options: tuple[float, int, float, bool],
    backend: str,
    out: torch.Tensor,
    expected: float | None,
) -> None:
    """As consistency_write, for logits, labels, mask, statistics and scales."""
    backward = module_of(saved[0], backend).adamix_backward
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        backward(grad, *saved, *options, out, expected)


def rescale(gradient: torch.Tensor, factor: torch.Tensor, backend: str) -> None:
    """gradient *= factor, a 0-dim tensor; left alone where that is exactly 1."""
    module_of(gradient, backend).rescale(gradient, factor)
