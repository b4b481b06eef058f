"""The consistency losses' dispatcher ops: fakes and backend selection."""

from __future__ import annotations

from types import ModuleType

import torch

from ..._backends import select
from .. import _checks
from .._checks import OutOfRangeError, fail
from .._library import define
from ._finite import check_linear_loss, check_pair_loss, checking
from ._rows import span_of, wide_dtype
from .signatures import AdaMix, AdaMixBackward, Consistency, ConsistencyBackward, Linear


def module_of(backend: str, logits: torch.Tensor) -> ModuleType:
    return select("consistency", backend, logits.device, logits.dtype, logits.shape[-1])


def _check_labels(labels: torch.Tensor, mask: torch.Tensor | None, ignore_index: int, num_classes: int) -> None:
    """Checked where the values exist and reading them costs no synchronisation (or ADAMIX_CHECK=1)."""
    if not _checks.values_at_hand(labels):
        return
    low, high = span_of(labels)
    if low >= 0 and high < num_classes:
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    wrong = wrong if mask is None else wrong & mask
    if wrong.any():
        bad = int(labels[wrong][0])
        fail("labels", f"class {bad}", f"0 <= class < {num_classes}, or ignore_index {ignore_index}", OutOfRangeError)


def _consistency(a: Consistency, backend: str) -> tuple[torch.Tensor, ...]:
    return checked_consistency(module_of(backend, a.logits_a), a)


def checked_consistency(module: ModuleType, a: Consistency) -> tuple[torch.Tensor, ...]:
    """The module's forward, whose loss is checked with ADAMIX_CHECK=1."""
    out: tuple[torch.Tensor, ...] = module.forward(*a)
    check_pair_loss(out[0], (("logits_a", a.logits_a), ("logits_b", a.logits_b)), a.mask)
    return out


def _consistency_fake(a: Consistency, backend: str) -> tuple[torch.Tensor, ...]:
    like = a.logits_a
    select("consistency", backend, like.device, like.dtype)
    rows, dtype = like.shape[:-1], wide_dtype(like.dtype)
    loss = like.new_empty(rows if a.reduction == "none" else (), dtype=dtype)
    stats = like.new_empty((4 if a.detach_target else 6, *rows), dtype=dtype)
    return loss, stats, like.new_empty((), dtype=dtype)


def _consistency_backward(a: ConsistencyBackward, backend: str) -> tuple[torch.Tensor, ...]:
    grads: tuple[torch.Tensor, ...] = module_of(backend, a.logits_a).backward(*a)
    return grads


def _consistency_backward_fake(a: ConsistencyBackward, backend: str) -> tuple[torch.Tensor, ...]:
    return a.logits_a.new_empty(a.logits_a.shape), a.logits_b.new_empty(a.logits_b.shape)


def _adamix(a: AdaMix, backend: str) -> tuple[torch.Tensor, ...]:
    _check_labels(a.labels, a.mask, a.ignore_index, a.logits.shape[-1])
    return checked_adamix(module_of(backend, a.logits), a)


def checked_adamix(module: ModuleType, a: AdaMix) -> tuple[torch.Tensor, ...]:
    """As checked_consistency."""
    out: tuple[torch.Tensor, ...] = module.adamix_forward(*a)
    if checking():
        half, counted = a.labels.shape[0], a.labels != a.ignore_index
        passes = ("logits", a.logits[:half]), ("logits", a.logits[half:])
        check_pair_loss(out[0], passes, counted if a.mask is None else a.mask, torch.where(counted, a.labels, -1))
    return out


def _adamix_fake(a: AdaMix, backend: str) -> tuple[torch.Tensor, ...]:
    select("consistency", backend, a.logits.device, a.logits.dtype)
    dtype = wide_dtype(a.logits.dtype)
    losses = (a.logits.new_empty((), dtype=dtype) for _ in range(3))
    stats = a.logits.new_empty((2 if a.detach_target else 3, *a.logits.shape[:-1]), dtype=dtype)
    return *losses, stats, a.logits.new_empty(2, dtype=dtype)


def _adamix_backward(a: AdaMixBackward, backend: str) -> torch.Tensor:
    grad: torch.Tensor = module_of(backend, a.logits).adamix_backward(*a)
    return grad


def _adamix_backward_fake(a: AdaMixBackward, backend: str) -> torch.Tensor:
    return a.logits.new_empty(a.logits.shape)


def _linear(a: Linear, backend: str) -> tuple[torch.Tensor, ...]:
    classes = a.lm_head_weight.shape[0]
    _check_labels(a.labels, a.mask, a.ignore_index, classes)
    out: tuple[torch.Tensor, ...]
    out = select("consistency", backend, a.hidden.device, a.hidden.dtype, classes).linear_forward(*a)
    if checking():
        rows = a.labels != a.ignore_index if a.mask is None else a.mask
        check_linear_loss(out[0], a.hidden, a.lm_head_weight, a.bias, rows)
    return out


def _linear_fake(a: Linear, backend: str) -> tuple[torch.Tensor, ...]:
    select("consistency", backend, a.hidden.device, a.hidden.dtype)
    dtype, weight = wide_dtype(a.hidden.dtype), a.lm_head_weight
    *losses, scale = (a.hidden.new_empty((), dtype=dtype) for _ in range(4))
    d_hidden = a.hidden.new_empty(a.hidden.shape if a.need_hidden else 0)
    d_weight = a.hidden.new_empty(weight.shape if a.need_weight else 0, dtype=dtype)
    d_bias = a.hidden.new_empty(weight.shape[0] if a.need_bias else 0, dtype=dtype)
    return *losses, d_hidden, d_weight, d_bias, scale


# Returns (loss, row statistics [4 or 6, ...], scale): maxima and log-sums of a and b, then E_p[d], E_q[d]
# unless detached. scale: one over the number of rows for "batchmean", else 1.
consistency_op = define("consistency", Consistency, "(Tensor, Tensor, Tensor)", _consistency, _consistency_fake)
# Returns the gradients of both logits.
consistency_backward_op = define(
    "consistency_backward", ConsistencyBackward, "(Tensor, Tensor)", _consistency_backward, _consistency_backward_fake
)
# Returns (loss, cross-entropy, consistency, row statistics [2 or 3, 2B, ...], scales [2]).
adamix_loss_op = define("adamix_loss", AdaMix, "(Tensor, Tensor, Tensor, Tensor, Tensor)", _adamix, _adamix_fake)
# Returns the gradient of the logits.
adamix_loss_backward_op = define(
    "adamix_loss_backward", AdaMixBackward, "Tensor", _adamix_backward, _adamix_backward_fake
)
# Returns (loss, cross-entropy, consistency, d_hidden, d_weight, d_bias, scale): the gradients, still to be
# multiplied by scale and the incoming gradient; what is not needed is an empty tensor.
linear_adamix_loss_op = define(
    "linear_adamix_loss", Linear, "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _linear, _linear_fake
)
