"""Public consistency_loss and adamix_loss (and linear_adamix_loss): documentation and argument checks."""

from __future__ import annotations

import torch

from ..._backends import check_request
from .._checks import check_choice, check_flag, check_tensor, fail
from .._direct import may_be_direct
from .._passes import looked
from . import _few, direct
from ._arguments import (
    as_expected,
    as_mask,
    as_num_items,
    check_doubled,
    check_labels,
    check_options,
    overwrites,
)
from .autograd import adamix, consistency
from .inplace import inplace_adamix_loss, inplace_consistency
from .linear_api import linear_adamix_loss
from .output import AdaMixLossOutput
from .regression import regression_loss

__all__ = ["AdaMixLossOutput", "adamix_loss", "consistency_loss", "linear_adamix_loss"]

REDUCTIONS = ("batchmean", "sum", "none")


def consistency_loss(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    detach_target: bool = True,
    reduction: str = "batchmean",
    inplace: bool = False,
    expected_grad: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """J = 1/2 [KL(b||a) + KL(a||b)] = 1/2 sum_v (p - q)(log p - log q), p = softmax(a), q = softmax(b).

    Args:
        logits_a, logits_b: [..., V], floating, one dtype; all leading dims are rows. V >= 1. A class that
            is -inf in both adds nothing and gets a zero gradient.
        mask: [...], bool (or integers 0 and 1), the rows that count, or None for all. Other rows may hold
            anything, NaN included, and get a zero gradient.
        detach_target: each KL takes its target as a constant: dJ/da = 1/2 (p - q), dJ/db its opposite.
            False differentiates J itself: with d = log p - log q, dJ/da = 1/2 [p (d - E_p d) + p - q] and
            dJ/db = 1/2 [-q (d - E_q d) - (p - q)]. The value is the same.
        reduction: "batchmean" (sum over the rows that count, divided by their number), "sum", or "none"
            ([...], 0 where masked).
        inplace: the gradient may overwrite logits_a and logits_b, those of them that require one, so that it
            needs no memory of its own; not with "none". They hold no logits after the call: what reads them
            later reads gradients, and what saved them for its own backward (their producer, such as a
            softmax, or another loss) fails there with autograd's error about in-place changes. Backward runs
            once. A slice of a larger tensor gains nothing, its own backward copies. Not while torch.compile traces.
        expected_grad: the gradient that will come in to the loss: the loss scale, 1 / accumulation steps, or their
            product; a number > 0. The forward writes the logits' gradient for it. None stands for 1, but float16
            then waits for the incoming one. Where another comes in, the backward writes anew (inplace: rescales,
            one more rounding): it costs time, and the results are the same. Not under torch.compile, which has no use.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        float32 (float64 for float64 logits) in nats, differentiable once in both logits. With no row that
        counts the loss is 0 and so are the gradients. A NaN in a row that counts gives NaN. An incoming gradient
        that is exactly the expected one costs nothing more; another, a second pass over the logits.

    Memory at the peak, in bytes beyond the arguments, for R rows of V logits of e bytes in each argument, gradients
    included; a few numbers a row are left out:
        triton, cuda: forward `2 * e * R * V`, backward `0`; under torch.compile, and for float16 without
            expected_grad, the other way round; inplace, none at all.
        reference, 4 or 2 bytes, P rows at once: forward `2 * e * R * V + 24 * P * V`, backward `0`
        reference, 4 or 2 bytes, detach_target=False: forward `2 * e * R * V + 28 * P * V`, backward `0`
    P is at most R, on a CPU 2^17 // V rows (at least one) for each thread, on a GPU 2^26 // V. There, under
    torch.compile and for float16 without expected_grad the reference has the first term in the backward.

    The maths is float32 or float64 whatever the logits' dtype; autocast changes nothing.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong; the message names it.
        FloatingPointError: with ADAMIX_CHECK=1, the loss is not finite; the message names argument, pass and row.
        BackendUnavailableError: an explicit backend cannot serve the call.

    Source: AdaMix (arXiv 2205.12410), section 3.2, consistency regularisation; `symmetric_KL_loss` of the
    reference project, whose mask compaction gives the same value.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> round(consistency_loss(a, b).item(), 4)
        0.1155
        >>> consistency_loss(a, a).item()
        0.0
    """
    looked()
    directly = not inplace and may_be_direct()
    if directly:
        known = None
        if mask is None and detach_target is True and reduction == "batchmean":
            known = _few.pair(logits_a, logits_b, backend, expected_grad)
        if known is None:
            known = direct.consistency(
                logits_a, logits_b, mask, detach_target, reduction, backend, expected_grad, checked=False
            )  # fmt: skip
        if known is not None:
            return known
    check_tensor("logits_a", logits_a)
    check_tensor("logits_b", logits_b, logits_a)
    if logits_a.dim() < 1 or logits_a.shape[-1] < 1:
        fail("logits_a", f"shape {tuple(logits_a.shape)}", "[..., V] with V >= 1")
    if logits_b.shape != logits_a.shape:
        fail("logits_b", f"shape {tuple(logits_b.shape)}", f"{tuple(logits_a.shape)}, the shape of logits_a")
    mask = as_mask(mask, logits_a.shape[:-1], logits_a)
    check_choice("reduction", reduction, REDUCTIONS)
    check_flag("detach_target", detach_target)
    check_flag("inplace", inplace)
    check_request(backend)
    expected_grad = as_expected(expected_grad)
    args = logits_a, logits_b, mask, bool(detach_target), reduction, backend, expected_grad
    if inplace and reduction == "none":
        fail("inplace", inplace, 'False with reduction="none", whose gradient depends on the incoming one')
    if inplace and overwrites(logits_a=logits_a, logits_b=logits_b):
        return inplace_consistency(*args)
    loss = direct.consistency(*args, checked=True) if directly else None
    return consistency(*args) if loss is None else loss


def adamix_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mask: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
    detach_target: bool = True,
    inplace: bool = False,
    expected_grad: float | None = None,
    backend: str = "auto",
) -> AdaMixLossOutput:
    """loss = CE(logits[:B], labels) + weight * J(logits[:B], logits[B:]), J as in `consistency_loss`.

    Args:
        logits: [2B, ..., V], floating: pass 1 of the whole batch, then pass 2. Nothing is shifted here: a
            causal model's caller passes logits[:, :-1] and labels[:, 1:].
        labels: [B, ...], int32 or int64 classes; or floating for regression, below.
        weight: of the consistency, a finite number >= 0.
        ignore_index: a row with this label has no cross-entropy.
        label_smoothing: in [0, 1], of the cross-entropy only, as torch.nn.functional.cross_entropy defines it.
        mask: [B, ...], bool (or integers 0 and 1), rows that count, or None for the labelled ones. The
            cross-entropy takes the rows that are in the mask and labelled, the consistency all rows in the
            mask, so unlabelled rows can serve the consistency alone. Rows outside may hold NaN.
        num_items: an int or 0-dim tensor that replaces both numbers of rows as the divisor (the labelled
            rows of a whole accumulated batch, not doubled). 0 gives a loss of 0.
        detach_target, inplace, expected_grad: as in `consistency_loss`; in place there is no second [2B, ..., V]
            tensor.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        An AdaMixLossOutput of loss, cross_entropy and consistency, scalars of float32 (float64 for float64
        logits). The last two are the unweighted means and not differentiable. A part without
        rows is 0, with zero gradients.

    Memory at the peak, in bytes beyond the arguments, for R rows a pass of V logits of e bytes, the gradient included;
    a few numbers a row are left out:
        triton, cuda: forward `2 * e * R * V`, backward `0`; under torch.compile, and for float16 without
            expected_grad, the other way round; inplace, none at all.
        reference, 4 or 2 bytes, P rows at once: forward `2 * e * R * V + 24 * P * V`, backward `0`
        reference, 4 or 2 bytes, detach_target=False: forward `2 * e * R * V + 28 * P * V`, backward `0`
    P is at most R, on a CPU 2^17 // V rows (at least one) for each thread, on a GPU 2^26 // V. There, under
    torch.compile and for float16 without expected_grad the reference has the first term in the backward.

    Regression: with floating labels [B, ...] and logits [2B, ..., 1] or [2B, ...], cross_entropy is the
    mean of (a - y)^2 over pass 1 and consistency the same symmetric KL, between unit-variance Gaussians
    centred on the predictions: 1/2 [(a - b)^2 / 2 + (b - a)^2 / 2] = 1/2 (a - b)^2, with constant targets
    a gradient of 1/2 (a - b) on a and its opposite on b. (The softmax KL of one logit is identically 0,
    so the reference project has no consistency here.) ignore_index, inplace and expected_grad play no part and
    label_smoothing must be 0. It has one implementation: backend must be "auto" or "reference".

    The maths is float32 or float64 whatever the logits' dtype; autocast changes nothing.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong; the message names it.
        FloatingPointError: with ADAMIX_CHECK=1, the loss is not finite; the message names argument, pass and row.
        IndexError: a label that counts is outside [0, V) (always on the CPU; on a GPU with ADAMIX_CHECK=1).
        BackendUnavailableError: an explicit backend cannot serve the call.

    Source: AdaMix (arXiv 2205.12410), section 3.2; the reference project's training forward, there as two
    sequential passes.

    Example:
        >>> rows = [[2.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 2.0]]  # B = 2, two passes
        >>> logits = torch.tensor(rows, requires_grad=True)
        >>> out = adamix_loss(logits, torch.tensor([0, 1]))
        >>> round(out.cross_entropy.item(), 4), round(out.consistency.item(), 4)
        (0.1269, 0.0374)
        >>> out.loss.backward()
    """
    looked()
    directly = not inplace and may_be_direct()
    if directly:
        known = None
        if mask is None and num_items is None and detach_target is True and _is_zero(label_smoothing):
            known = _few.doubled(logits, labels, weight, ignore_index, backend, expected_grad)
        if known is None:
            known = direct.adamix(
                logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target, backend,
                expected_grad, checked=False,
            )  # fmt: skip
        if known is not None:
            return AdaMixLossOutput(*known)
    check_tensor("logits", logits)
    check_request(backend)
    check_options(weight, ignore_index, label_smoothing, detach_target)
    check_flag("inplace", inplace)
    expected_grad = as_expected(expected_grad)
    num_items = as_num_items(num_items, logits)
    if isinstance(labels, torch.Tensor) and labels.is_floating_point():
        return AdaMixLossOutput(
            *regression_loss(logits, labels, weight, label_smoothing, mask, num_items, detach_target, backend)
        )
    check_doubled("logits", logits, 2, "[2B, ..., V]")
    if logits.shape[-1] < 1:
        fail("logits", f"shape {tuple(logits.shape)}", "[2B, ..., V] with V >= 1")
    check_labels(labels, logits.shape[:-1], logits)
    mask = as_mask(mask, labels.shape, logits)
    options = float(weight), ignore_index, float(label_smoothing), bool(detach_target), backend, expected_grad
    if inplace and overwrites(logits=logits):
        return AdaMixLossOutput(*inplace_adamix_loss(logits, labels, mask, num_items, *options))
    args = logits, labels, mask, num_items, *options
    losses = direct.adamix(*args, checked=True) if directly else None
    return AdaMixLossOutput(*(adamix(*args) if losses is None else losses))


def _is_zero(value: object) -> bool:
    return value.__class__ in (int, float) and value == 0
