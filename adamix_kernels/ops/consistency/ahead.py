"""The logits' gradient together with the loss, for the incoming one that is expected, and what sets it right.

Eager mode on plain tensors alone has this, without the dispatcher: a traced graph has the two steps of op.py.
"""

from __future__ import annotations

from types import ModuleType

import torch

from ..._backends import select
from ._finite import checking
from .op import _check_labels, checked_adamix, checked_consistency

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def writer_of(backend: str, expected: float | None, *logits: torch.Tensor) -> ModuleType | None:
    """The backend's module, if its forward writes the gradient on these: plain tensors that nothing traces or
    intercepts. None: two steps.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    for t in logits:
        if type(t) not in _PLAIN:
            return None
    module = select("consistency", backend, t.device, t.dtype, t.shape[-1])
    return module if module.writes_gradient(t.device.type, t.dtype, expected) else None


def consistency_grad(
    module: ModuleType,
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    reduction: str,
    expected: float | None,
    da: torch.Tensor | None,
    db: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op `consistency`, and da and db are written (None: not wanted), which may be the logits."""
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        if checking():
            # Before anything is overwritten.
            checked_consistency(module, logits_a, logits_b, mask, detach_target, reduction)
        return module.forward_grad(logits_a, logits_b, mask, detach_target, reduction, expected or 1.0, da, db)


def adamix_grad(
    module: ModuleType,
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    expected: float | None,
    d_logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op `adamix_loss`, and d_logits is written, which may be logits."""
    args = logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        _check_labels(labels, mask, ignore_index, logits.shape[-1])
        if checking():
            checked_adamix(module, *args)
        return module.adamix_forward_grad(*args, expected or 1.0, d_logits)


def consistency_write(
    module: ModuleType,
    grad: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    detach_target: bool,
    out: tuple[torch.Tensor | None, torch.Tensor | None],
    expected: float | None,
) -> None:
    """The gradients for `grad` into out, which may be the logits; left alone where out holds them for `expected`."""
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        module.backward(grad, *saved, detach_target, out, expected)


def adamix_write(
    module: ModuleType,
    grad: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    options: tuple[float, int, float, bool],
    out: torch.Tensor,
    expected: float | None,
) -> None:
    """As consistency_write, for logits, labels, mask, statistics and scales."""
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        module.adamix_backward(grad, *saved, *options, out, expected)
