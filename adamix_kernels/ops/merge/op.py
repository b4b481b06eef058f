"""Merging's dispatcher ops: schema, fake, backend selection."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..._backends import select
from .._direct import may_be_direct
from .._library import define
from ._results import Results


def _experts_forward(bank: torch.Tensor, scores: torch.Tensor | None, backend: str) -> torch.Tensor:
    return _select(bank, backend).experts_forward(bank, scores)


def _experts_forward_fake(bank: torch.Tensor, scores: torch.Tensor | None, backend: str) -> torch.Tensor:
    _select(bank, backend)
    return bank.new_empty(bank.shape[1:])


def _experts_backward(
    grad_out: torch.Tensor,
    bank: torch.Tensor,
    scores: torch.Tensor | None,
    need_bank: bool,
    need_scores: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _select(bank, backend).experts_backward(grad_out, bank, scores, need_bank, need_scores)


def _experts_backward_fake(
    grad_out: torch.Tensor,
    bank: torch.Tensor,
    scores: torch.Tensor | None,
    need_bank: bool,
    need_scores: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    dbank = bank.new_empty(bank.shape if need_bank else 0)
    return dbank, bank.new_empty(0) if scores is None or not need_scores else scores.new_empty(scores.shape)


def _banks_forward(banks: list[torch.Tensor], scores: list[torch.Tensor | None], backend: str) -> list[torch.Tensor]:
    alike: dict[tuple[ModuleType, torch.device, torch.dtype], list[int]] = {}
    for n, bank in enumerate(banks):
        alike.setdefault((_select(bank, backend), bank.device, bank.dtype), []).append(n)
    merged = list(banks)
    for (module, _, _), which in alike.items():
        outs = module.banks_forward([banks[n] for n in which], [scores[n] for n in which])
        for n, out in zip(which, outs, strict=True):
            # What an op returns shares no memory.
            merged[n] = out if out.untyped_storage().nbytes() == out.numel() * out.itemsize else out.clone()
    return merged


# What was looked at before, and where the results of such lists lie.
_KNOWN: dict[Any, Results] = {}
_MOST_KNOWN = 16
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_shape_of = operator.attrgetter("shape")


def banks_directly(
    banks: list[torch.Tensor], scores: list[torch.Tensor | None], backend: str, check: Callable[[], None]
) -> list[torch.Tensor] | None:
    """merge_banks without the dispatcher, of plain tensors of one dtype and device; None where that cannot be.

    check: called where shapes, dtypes or devices are other than those of earlier calls. The results share memory.
    """
    given = [score for score in scores if score is not None]
    plain = _PLAIN.issuperset(map(type, banks)) and _PLAIN.issuperset(map(type, given))
    if not banks or not plain or not may_be_direct():
        return None
    # As the optimisers of torch do: {(device, dtype): ...}.
    groups = torch._C._group_tensors_by_device_and_dtype([[*banks]], False)
    if len(groups) > 1:
        return None
    ((device, dtype),) = groups
    facts = tuple([None if s is None else (s.shape, s.dtype, s.device) for s in scores]) if given else ()
    key = len(scores), dtype, device, tuple(map(_shape_of, banks)), facts
    results = _KNOWN.get(key)
    if results is None:
        check()
        results = Results([bank.shape[1:] for bank in banks], dtype, device)
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = results
    module = select("merge", backend, device, dtype)
    with torch.no_grad(), torch._C._DisableAutocast():
        return module.banks_forward(banks, scores, results)


def _banks_forward_fake(
    banks: list[torch.Tensor], scores: list[torch.Tensor | None], backend: str
) -> list[torch.Tensor]:
    return [_experts_forward_fake(bank, score, backend) for bank, score in zip(banks, scores, strict=True)]


def _lora_forward(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    groups: int,
    offsets: list[int],
    fan_in_fan_out: bool,
    backend: str,
) -> torch.Tensor:
    return _select(weight, backend).lora_forward(weight, lora_a, lora_b, scaling, groups, offsets, fan_in_fan_out)


def _lora_forward_fake(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    groups: int,
    offsets: list[int],
    fan_in_fan_out: bool,
    backend: str,
) -> torch.Tensor:
    _select(weight, backend)
    return weight.new_empty(weight.shape)


def _loras_forward(
    weights: list[torch.Tensor],
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    scaling: float,
    groups: int,
    offsets: list[int],
    fan_in_fan_out: bool,
    backend: str,
) -> torch.Tensor:
    module = _select(weights[0], backend)
    return module.loras_forward(weights, lora_a, lora_b, scaling, groups, offsets, fan_in_fan_out)


def _loras_forward_fake(
    weights: list[torch.Tensor],
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    scaling: float,
    groups: int,
    offsets: list[int],
    fan_in_fan_out: bool,
    backend: str,
) -> torch.Tensor:
    _select(weights[0], backend)
    return weights[0].new_empty((len(weights), *weights[0].shape))


def _lora_backward(
    grad_out: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    need_a: bool,
    need_b: bool,
    scaling: float,
    groups: int,
    offsets: list[int],
    fan_in_fan_out: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _select(grad_out, backend).lora_backward(
        grad_out, lora_a, lora_b, need_a, need_b, scaling, groups, offsets, fan_in_fan_out
    )


def _lora_backward_fake(
    grad_out: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    need_a: bool,
    need_b: bool,
    scaling: float,
    groups: int,
    offsets: list[int],
    fan_in_fan_out: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return lora_a.new_empty(lora_a.shape if need_a else 0), lora_b.new_empty(lora_b.shape if need_b else 0)


def _select(tensor: torch.Tensor, backend: str) -> ModuleType:
    return select("merge", backend, tensor.device, tensor.dtype)


# Returns bank's shape without the first axis. scores None: the uniform mean.
merge_experts_op = define(
    "merge_experts(Tensor bank, Tensor? scores, str backend) -> Tensor", _experts_forward, _experts_forward_fake
)
# Returns (d bank, d scores); what is not needed is an empty tensor.
merge_experts_backward_op = define(
    "merge_experts_backward(Tensor grad_out, Tensor bank, Tensor? scores, bool need_bank, bool need_scores, "
    "str backend) -> (Tensor, Tensor)",
    _experts_backward,
    _experts_backward_fake,
)
# merge_experts of every bank with its scores; banks of one device and dtype together. No derivative.
merge_banks_op = define(
    "merge_banks(Tensor[] banks, Tensor?[] scores, str backend) -> Tensor[]", _banks_forward, _banks_forward_fake
)
# lora_a [Ma, groups*r, K] and lora_b [Mb, groups*Ng, r] are banks, of one expert for plain factors.
merge_lora_op = define(
    "merge_lora(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, int groups, int[] offsets, "
    "bool fan_in_fan_out, str backend) -> Tensor",
    _lora_forward,
    _lora_forward_fake,
)
# merge_lora of layers whose weights, and whose factors, are alike; [layers, ...]. No derivative.
merge_loras_op = define(
    "merge_loras(Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, float scaling, int groups, int[] offsets, "
    "bool fan_in_fan_out, str backend) -> Tensor",
    _loras_forward,
    _loras_forward_fake,
)
# Returns (d lora_a, d lora_b); what is not needed is an empty tensor. The weight's gradient is grad_out itself.
merge_lora_backward_op = define(
    "merge_lora_backward(Tensor grad_out, Tensor lora_a, Tensor lora_b, bool need_a, bool need_b, float scaling, "
    "int groups, int[] offsets, bool fan_in_fan_out, str backend) -> (Tensor, Tensor)",
    _lora_backward,
    _lora_backward_fake,
)
