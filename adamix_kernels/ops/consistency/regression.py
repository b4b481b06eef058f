"""The AdaMix loss of a regression task: differentiable PyTorch on one number a row, the same for every device."""

from __future__ import annotations

import torch

from ..._backends import BackendUnavailableError
from .._checks import fail
from ._arguments import as_mask, check_doubled, check_labels
from ._finite import check_scalar_loss
from ._rows import inverse, keep, wide_dtype


def regression_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: float,
    label_smoothing: float,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    detach_target: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mean (a - y)^2 + weight * mean 1/2 (a - b)^2 over the rows in the mask; the rule is `adamix_loss`'s."""
    layout = "[2B, ..., 1] or [2B, ...], since labels are floating (regression)"
    check_doubled("logits", logits, 1, layout)
    if logits.dim() == labels.dim() + 1:
        if logits.shape[-1] != 1:
            fail("logits", f"shape {tuple(logits.shape)}", layout)
        logits = logits.squeeze(-1)
    check_labels(labels, logits.shape, logits, floating=True)
    mask = as_mask(mask, labels.shape, logits)
    if label_smoothing:
        fail("label_smoothing", label_smoothing, "0, since labels are floating (regression)")
    if backend not in ("auto", "reference"):
        raise BackendUnavailableError(f"backend={backend!r} cannot serve regression: only the reference implements it")

    wide = logits.to(wide_dtype(logits.dtype))
    a, b, y = wide[: labels.shape[0]], wide[labels.shape[0] :], labels.detach().to(wide.dtype)
    rows = wide.new_full((), labels.numel())
    if mask is not None:
        a, b, y = keep(a, mask), keep(b, mask), keep(y, mask)
        rows = mask.sum(dtype=wide.dtype)
    scale = inverse(rows if num_items is None else num_items.to(wide.dtype))
    error = (a - y).square().sum() * scale
    if detach_target:
        consistency = ((a - b.detach()).square() + (b - a.detach()).square()).sum() * (scale / 4)
    else:
        consistency = (a - b).square().sum() * (scale / 2)
    loss = error + weight * consistency
    if not torch.compiler.is_compiling():
        check_scalar_loss(loss, logits, labels, mask)
    return loss, error.detach(), consistency.detach()
