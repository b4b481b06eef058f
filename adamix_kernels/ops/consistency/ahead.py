"""The logits' gradient together with the loss, for the incoming one that is expected, and what sets it right.

Eager mode on plain tensors alone has this, without the dispatcher: a traced graph has the two steps of op.py.
"""

from __future__ import annotations

from types import ModuleType

import torch

from ._finite import checking
from .op import _check_labels, checked_adamix, checked_consistency, module_of
from .signatures import AdaMix, Consistency

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
    module = module_of(backend, t)
    return module if module.writes_gradient(t.device.type, t.dtype, expected) else None


def consistency_grad(
    module: ModuleType, a: Consistency, expected: float | None, da: torch.Tensor | None, db: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """As the op `consistency`, and da and db are written (None: not wanted), which may be the logits."""
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        if checking():
            # Before anything is overwritten.
            checked_consistency(module, a)
        out: tuple[torch.Tensor, ...] = module.forward_grad(*a, expected or 1.0, da, db)
        return out


def adamix_grad(
    module: ModuleType, a: AdaMix, expected: float | None, d_logits: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """As the op `adamix_loss`, and d_logits is written (None: not wanted), which may be logits."""
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        _check_labels(a.labels, a.mask, a.ignore_index, a.logits.shape[-1])
        if checking():
            checked_adamix(module, a)
        out: tuple[torch.Tensor, ...] = module.adamix_forward_grad(*a, expected or 1.0, d_logits)
        return out


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
