"""Dispatcher ops that write the logits' gradient together with the loss, and that set it right in the backward.

They serve eager mode alone: a traced graph has the two steps of op.py.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from ..._backends import select
from .._library import define
from ._finite import checking
from ._rows import wide_dtype
from .op import _adamix, _adamix_fake, _check_labels, _consistency, _consistency_fake


def writes_gradient(logits: torch.Tensor, backend: str) -> bool:
    """Whether the forward writes the gradient too: a plain tensor, so not while tracing, and a backend that can."""
    plain = type(logits) in (torch.Tensor, torch.nn.Parameter)
    return plain and logits.dtype in _select(logits, backend).GRADIENT_DTYPES


def _select(logits: torch.Tensor, backend: str) -> ModuleType:
    return select("consistency", backend, logits.device, logits.dtype)


def _consistency_grad(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    reduction: str,
    da: torch.Tensor | None,
    db: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if checking():
        # Before anything is overwritten.
        _consistency(logits_a, logits_b, mask, detach_target, reduction, backend)
    module = _select(logits_a, backend)
    return module.forward_grad(logits_a, logits_b, mask, detach_target, reduction, da, db)


def _consistency_grad_fake(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    detach_target: bool,
    reduction: str,
    da: torch.Tensor | None,
    db: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out = _consistency_fake(logits_a, logits_b, mask, detach_target, reduction, backend)
    return *out, logits_a.new_empty((), dtype=wide_dtype(logits_a.dtype))


def _consistency_correct(
    grad: torch.Tensor,
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    mask: torch.Tensor | None,
    stats: torch.Tensor,
    scale: torch.Tensor,
    detach_target: bool,
    da: torch.Tensor | None,
    db: torch.Tensor | None,
    backend: str,
) -> None:
    _select(logits_a, backend).backward(grad, logits_a, logits_b, mask, stats, scale, detach_target, (da, db))


def _adamix_grad(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    d_logits: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = weight, ignore_index, label_smoothing, detach_target
    if checking():
        _adamix(logits, labels, mask, num_items, *options, backend)
    _check_labels(labels, mask, ignore_index, logits.shape[-1])
    return _select(logits, backend).adamix_forward_grad(logits, labels, mask, num_items, *options, d_logits)


def _adamix_grad_fake(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    num_items: torch.Tensor | None,
    weight: float,
    ignore_index: int,
    label_smoothing: float,
    detach_target: bool,
    d_logits: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out = _adamix_fake(
        logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target, backend
    )  # fmt: skip
    return *out, logits.new_empty((), dtype=wide_dtype(logits.dtype))


def _adamix_correct(
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
    d_logits: torch.Tensor,
    backend: str,
) -> None:
    options = weight, ignore_index, label_smoothing, detach_target
    _select(logits, backend).adamix_backward(grad, logits, labels, mask, stats, scales, *options, d_logits)


def _rescale(gradient: torch.Tensor, factor: torch.Tensor, backend: str) -> None:
    _select(gradient, backend).rescale(gradient, factor)


def _nothing_fake(*_: Any) -> None:
    return None


# As `consistency`, and da, db are written (None: not wanted); reduction is not "none". Last comes what the gradients
# were divided by, 1 but for float16. They may be the logits themselves.
consistency_grad_op = define(
    "consistency_grad(Tensor logits_a, Tensor logits_b, Tensor? mask, bool detach_target, str reduction, "
    "Tensor(a!)? da, Tensor(b!)? db, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _consistency_grad,
    _consistency_grad_fake,
)
# da, db hold the gradients for an incoming one of 1: rewritten for another, left alone for that.
consistency_correct_op = define(
    "consistency_correct(Tensor grad, Tensor logits_a, Tensor logits_b, Tensor? mask, Tensor stats, Tensor scale, "
    "bool detach_target, Tensor(a!)? da, Tensor(b!)? db, str backend) -> ()",
    _consistency_correct,
    _nothing_fake,
)
# As `adamix_loss`, and d_logits is written, which may be logits; last, what it was divided by.
adamix_loss_grad_op = define(
    "adamix_loss_grad(Tensor logits, Tensor labels, Tensor? mask, Tensor? num_items, float weight, int ignore_index, "
    "float label_smoothing, bool detach_target, Tensor(a!) d_logits, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _adamix_grad,
    _adamix_grad_fake,
)
# As `consistency_correct`, for d_logits.
adamix_loss_correct_op = define(
    "adamix_loss_correct(Tensor grad, Tensor logits, Tensor labels, Tensor? mask, Tensor stats, Tensor scales, "
    "float weight, int ignore_index, float label_smoothing, bool detach_target, Tensor(a!) d_logits, str backend) "
    "-> ()",
    _adamix_correct,
    _nothing_fake,
)
# gradient *= factor, a 0-dim tensor; left alone where that is exactly 1.
loss_rescale_op = define("loss_rescale(Tensor(a!) gradient, Tensor factor, str backend) -> ()", _rescale, _nothing_fake)
