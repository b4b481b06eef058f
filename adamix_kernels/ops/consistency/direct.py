"""Calls of the consistency losses past the dispatcher (ops/_direct.py).

A backend that serves them has an object `direct` in its module, whose `adamix` and `consistency` have

    find(*arguments)   a plan for a forward, of a call that `make` was given before, or None
    make(*arguments)   the same for arguments that api.py has checked; None where the call cannot be planned

adamix: logits, labels, mask, num_items, whether the gradient is wanted, then weight to expected. consistency: logits_a,
logits_b, mask, which gradients are wanted, then detach_target, reduction (not "none") and expected. A plan takes the
tensors and gives what the module's forward of that name gives, and behind it, in new dense memory, the gradients that
are wanted, for an incoming `expected`; or None: not for these addresses.

    adamix_backward(grad, logits, labels, mask, stats, scales, d_logits, weight to detach_target, expected)
    consistency_backward(grad, logits_a, logits_b, mask, stats, scale, da, db, detach_target, expected)

do what the module's functions do, and give a tuple, or None where nothing was done.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _checks
from .._direct import below_autograd, served
from .autograd import apply_adamix, apply_consistency
from .op import _check_labels

_NUMBERS = (int, float)


def adamix(*arguments: Any, checked: bool) -> tuple[torch.Tensor, ...] | None:
    """(loss, cross-entropy, consistency); None: the call must go through api.py's checks and the dispatcher.

    checked: whether it went through the checks, so that what is found out about the arguments may be kept.
    """
    logits, labels, mask, num_items, weight, ignore_index, label_smoothing, detach_target, backend, expected = arguments
    try:
        if not (_plain(weight, math.inf) and _plain(label_smoothing, 1) and _plain_expected(expected)):
            return None
        if ignore_index.__class__ is not int or detach_target.__class__ is not bool or isinstance(num_items, int):
            return None
        tensors = logits, labels, mask, num_items
        direct = served("consistency", backend, tensors, checked)
        if direct is None or not _selects(mask) or (num_items is not None and num_items.requires_grad):
            return None
        needed = logits.requires_grad and torch.is_grad_enabled()
        ahead = needed and direct.writes_gradient(logits.device.type, logits.dtype, expected)
        expected = None if expected is None else float(expected)
        options = float(weight), ignore_index, float(label_smoothing), detach_target, _or_one(expected, needed)
        plan = direct.adamix.find(*tensors, ahead, *options)
        if plan is None and checked:
            plan = direct.adamix.make(*tensors, ahead, *options)
        if plan is None:
            return None
        if logits.is_cpu and _checks.values_at_hand(logits):
            _check_labels(labels, mask, ignore_index, logits.shape[-1])
        if not needed:
            made: tuple[torch.Tensor, ...] | None = plan(*tensors)
            return None if made is None else made[:3]
        if below_autograd():
            return None
        parts: list[torch.Tensor] = []
        loss = apply_adamix(logits, labels, mask, (backend, num_items, *options[:4], expected), parts, (plan, ahead))
        return loss, *parts
    except (AttributeError, TypeError, RuntimeError):
        # Not a tensor, or sizes that a plan with checks of its own refuses: api.py has the words for it.
        if checked:
            raise
        return None


def consistency(*arguments: Any, checked: bool) -> torch.Tensor | None:
    """The loss; None and `checked` as for `adamix`."""
    logits_a, logits_b, mask, detach_target, reduction, backend, expected = arguments
    try:
        if reduction == "none" or detach_target.__class__ is not bool or not _plain_expected(expected):
            return None
        tensors = logits_a, logits_b, mask
        direct = served("consistency", backend, tensors, checked)
        if direct is None or not _selects(mask):
            return None
        grads = torch.is_grad_enabled()
        need_a, need_b = grads and logits_a.requires_grad, grads and logits_b.requires_grad
        needed = need_a or need_b
        ahead = needed and direct.writes_gradient(logits_a.device.type, logits_a.dtype, expected)
        expected = None if expected is None else float(expected)
        options = ahead and need_a, ahead and need_b, detach_target, reduction, _or_one(expected, needed)
        plan = direct.consistency.find(*tensors, *options)
        if plan is None and checked:
            plan = direct.consistency.make(*tensors, *options)
        if plan is None:
            return None
        if not needed:
            made: tuple[torch.Tensor, ...] | None = plan(*tensors)
            return None if made is None else made[0]
        if below_autograd():
            return None
        return apply_consistency(*tensors, (backend, detach_target, reduction, expected), (plan, ahead))
    except (AttributeError, TypeError, RuntimeError):
        if checked:
            raise
        return None


def _plain(value: float, high: float) -> bool:
    """0 <= value <= high and finite; of other classes, and of a zero that is negative, a key is not worth having."""
    return value.__class__ in _NUMBERS and 0 <= value <= high and value < math.inf and math.copysign(1, value) > 0


def _plain_expected(expected: float | None) -> bool:
    return expected is None or (expected.__class__ in _NUMBERS and 0 < expected < math.inf)


def _or_one(expected: float | None, needed: bool) -> float:
    return 1.0 if expected is None or not needed else expected


def _selects(mask: torch.Tensor | None) -> bool:
    return mask is None or mask.dtype is torch.bool
