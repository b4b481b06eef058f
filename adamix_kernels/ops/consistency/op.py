"""The consistency losses' dispatcher ops: schemas, fakes, backend selection."""

from __future__ import annotations

from types import ModuleType

import torch

from ..._backends import select
from .. import _checks
from .._checks import OutOfRangeError, fail
from .._library import define
from ._finite import check_linear_loss, check_pair_loss, checking
from ._rows import span_of, wide_dtype


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


def _consistency(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    reduction: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    module = select("consistency", backend, logits_a.device, logits_a.dtype, logits_a.shape[-1])
    return checked_consistency(module, logits_a, logits_b, mask, detach_target, reduction)


def checked_consistency(
    module: ModuleType,
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The module's forward, whose loss is checked with ADAMIX_CHECK=1."""
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    out = module.forward(logits_a, logits_b, mask, detach_target, reduction)
    check_pair_loss(out[0], (("logits_a", logits_a), ("logits_b", logits_b)), mask)
    return out


def _consistency_fake(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    reduction: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    select("consistency", backend, logits_a.device, logits_a.dtype)
    rows = logits_a.shape[:-1]
    dtype = wide_dtype(logits_a.dtype)
    loss = logits_a.new_empty(rows if reduction == "none" else (), dtype=dtype)
    stats = logits_a.new_empty((4 if detach_target else 6, *rows), dtype=dtype)
    return loss, stats, logits_a.new_empty((), dtype=dtype)


def _consistency_backward(
    grad: torch.Tensor,
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    stats: torch.Tensor,
    scale: torch.Tensor,
    detach_target: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return select("consistency", backend, logits_a.device, logits_a.dtype, logits_a.shape[-1]).backward(
        grad, logits_a, logits_b, mask, stats, scale, detach_target
    )


def _consistency_backward_fake(
    grad: torch.Tensor,
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    stats: torch.Tensor,
    scale: torch.Tensor,
    detach_target: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return logits_a.new_empty(logits_a.shape), logits_b.new_empty(logits_b.shape)


def _adamix(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_labels(labels, mask, ignore_index, logits.shape[-1])
    module = select("consistency", backend, logits.device, logits.dtype, logits.shape[-1])
    return checked_adamix(
        module, logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target
    )  # fmt: skip


def checked_adamix(
    module: ModuleType,
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As checked_consistency."""
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    out = module.adamix_forward(
        logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target
    )  # fmt: skip
    if checking():
        half, counted = labels.shape[0], labels != ignore_index
        passes = ("logits", logits[:half]), ("logits", logits[half:])
        check_pair_loss(out[0], passes, counted if mask is None else mask, torch.where(counted, labels, -1))
    return out


def _adamix_fake(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    select("consistency", backend, logits.device, logits.dtype)
    dtype = wide_dtype(logits.dtype)
    loss, cross_entropy, consistency = (logits.new_empty((), dtype=dtype) for _ in range(3))
    stats = logits.new_empty((2 if detach_target else 3, *logits.shape[:-1]), dtype=dtype)
    return loss, cross_entropy, consistency, stats, logits.new_empty(2, dtype=dtype)


def _adamix_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    stats: torch.Tensor,
    scales: torch.Tensor,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    backend: str,
) -> torch.Tensor:
    return select("consistency", backend, logits.device, logits.dtype, logits.shape[-1]).adamix_backward(
        grad, logits, labels, mask, stats, scales, weight, ignore_index, label_smoothing, detach_target
    )


def _adamix_backward_fake(
    grad: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    stats: torch.Tensor,
    scales: torch.Tensor,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    backend: str,
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _linear(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_labels(labels, mask, ignore_index, lm_head_weight.shape[0])
    out = select("consistency", backend, hidden.device, hidden.dtype, lm_head_weight.shape[0]).linear_forward(
        hidden,
        lm_head_weight,
        bias,
        labels,
        mask,
        num_items,
        weight,
        ignore_index,
        label_smoothing,
        detach_target,
        chunk_rows,
        need_hidden,
        need_weight,
        need_bias,
    )
    if checking():
        check_linear_loss(out[0], hidden, lm_head_weight, bias, labels != ignore_index if mask is None else mask)
    return out


def _linear_fake(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    select("consistency", backend, hidden.device, hidden.dtype)
    dtype = wide_dtype(hidden.dtype)
    loss, cross_entropy, consistency, scale = (hidden.new_empty((), dtype=dtype) for _ in range(4))
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    d_weight = hidden.new_empty(lm_head_weight.shape if need_weight else 0, dtype=dtype)
    d_bias = hidden.new_empty(lm_head_weight.shape[0] if need_bias else 0, dtype=dtype)
    return loss, cross_entropy, consistency, d_hidden, d_weight, d_bias, scale


# Returns (loss, row statistics [4 or 6, ...], scale): maxima and log-sums of a and b, then E_p[d], E_q[d]
# unless detached. scale: one over the number of rows for "batchmean", else 1.
consistency_op = define(
    "consistency(Tensor logits_a, Tensor logits_b, Tensor? mask, bool detach_target, str reduction, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _consistency,
    _consistency_fake,
)
# grad: 0-dim, or one per row for "none". Returns the gradients of both logits.
consistency_backward_op = define(
    "consistency_backward(Tensor grad, Tensor logits_a, Tensor logits_b, Tensor? mask, Tensor stats, Tensor scale, "
    "bool detach_target, str backend) -> (Tensor, Tensor)",
    _consistency_backward,
    _consistency_backward_fake,
)
# Returns (loss, cross-entropy, consistency, row statistics [2 or 3, 2B, ...], scales [2]).
adamix_loss_op = define(
    "adamix_loss(Tensor logits, Tensor labels, Tensor? mask, Tensor? num_items, float weight, int ignore_index, "
    "float label_smoothing, bool detach_target, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _adamix,
    _adamix_fake,
)
# Returns the gradient of the logits.
adamix_loss_backward_op = define(
    "adamix_loss_backward(Tensor grad, Tensor logits, Tensor labels, Tensor? mask, Tensor stats, Tensor scales, "
    "float weight, int ignore_index, float label_smoothing, bool detach_target, str backend) -> Tensor",
    _adamix_backward,
    _adamix_backward_fake,
)
# Returns (loss, cross-entropy, consistency, d_hidden, d_weight, d_bias, scale): the gradients, still to be
# multiplied by scale and the incoming gradient; what is not needed is an empty tensor.
linear_adamix_loss_op = define(
    "linear_adamix_loss(Tensor hidden, Tensor lm_head_weight, Tensor? bias, Tensor labels, Tensor? mask, "
    "Tensor? num_items, float weight, int ignore_index, float label_smoothing, bool detach_target, int chunk_rows, "
    "bool need_hidden, bool need_weight, bool need_bias, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear,
    _linear_fake,
)
