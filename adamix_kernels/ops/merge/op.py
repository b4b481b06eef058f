"""Merging's dispatcher ops: fakes and backend selection."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..._backends import select
from ..._limits import Extent
from .._direct import PLAIN, may_be_direct
from .._library import define
from ._results import Results
from .signatures import Banks, Experts, ExpertsBackward, LoRA, LoRABackward, LoRAs


def _runs(name: str) -> Callable[[Any, str], Any]:
    """What the backend's function of that name gives; the first tensor decides which backend, and a bank's experts."""

    def run(a: Any, backend: str) -> Any:
        first = a[0][0] if isinstance(a[0], list) else a[0]
        extent = _extent(a.bank, a.scores) if "bank" in a._fields else None
        return getattr(_select(first, backend, extent), name)(*a)

    return run


def _experts_forward_fake(a: Experts, backend: str) -> torch.Tensor:
    _select(a.bank, backend)
    return a.bank.new_empty(a.bank.shape[1:])


def _experts_backward_fake(a: ExpertsBackward, backend: str) -> tuple[torch.Tensor, ...]:
    dbank, needs = a.bank.new_empty(a.bank.shape if a.need_bank else 0), a.need_scores
    return dbank, a.bank.new_empty(0) if a.scores is None or not needs else a.scores.new_empty(a.scores.shape)


def _banks_forward(a: Banks, backend: str) -> list[torch.Tensor]:
    alike: dict[tuple[ModuleType, torch.device, torch.dtype], list[int]] = {}
    for n, bank in enumerate(a.banks):
        module = _select(bank, backend, _extent(bank, a.scores[n]))
        alike.setdefault((module, bank.device, bank.dtype), []).append(n)
    merged = list(a.banks)
    for (module, _, _), which in alike.items():
        outs = module.banks_forward([a.banks[n] for n in which], [a.scores[n] for n in which])
        for n, out in zip(which, outs, strict=True):
            # What an op returns shares no memory.
            merged[n] = out if out.untyped_storage().nbytes() == out.numel() * out.itemsize else out.clone()
    return merged


class _Known(NamedTuple):
    """A list of banks that was checked. guard: whether tensors are like its banks and scores, in class, shape, strides,
    dtype and device; scored: which banks have scores, none for no bank; extent: of the largest."""

    guard: Callable[..., bool]
    scored: tuple[bool, ...]
    device: torch.device
    dtype: torch.dtype
    extent: Extent
    results: Results


# Those looked at before, by the number of tensors.
_KNOWN: dict[int, list[_Known]] = {}
_MOST_KNOWN = 16
# torch.compile's own: one call looks at all tensors.
_Guards: Any = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)


def banks_directly(
    banks: list[torch.Tensor], scores: list[torch.Tensor | None], backend: str, check: Callable[[], None]
) -> list[torch.Tensor] | None:
    """merge_banks without the dispatcher, of plain tensors of one dtype and device; None where that cannot be.

    check: called where the tensors are other than those of earlier calls. The results share memory.
    """
    if not banks or len(scores) != len(banks) or not may_be_direct():
        return None
    tensors = banks
    scored: tuple[bool, ...] = ()
    if any(map(operator.is_not, scores, itertools.repeat(None))):
        scored = tuple([score is not None for score in scores])
        tensors = [*banks, *(score for score in scores if score is not None)]
    for known in _KNOWN.get(len(tensors), ()):
        if known.scored == scored and known.guard(*tensors):
            break
    else:
        found = _look_at(banks, scores, scored, tensors, check)
        if found is None:
            return None
        known = found
    module = select("merge", backend, known.device, known.dtype, extent=known.extent)
    with torch.no_grad(), torch._C._DisableAutocast():
        return module.banks_forward(banks, scores, known.results)


def _look_at(
    banks: list[torch.Tensor],
    scores: list[torch.Tensor | None],
    scored: tuple[bool, ...],
    tensors: list[torch.Tensor],
    check: Callable[[], None],
) -> _Known | None:
    """A list that is known from now on; None where the dispatcher must see it."""
    if _Guards is None or not PLAIN.issuperset(map(type, tensors)):
        return None
    check()
    dtype, device = banks[0].dtype, banks[0].device
    # A guard knows no tensor that comes twice.
    once = len(set(map(id, tensors))) == len(tensors)
    if not once or any(bank.dtype != dtype or bank.device != device for bank in banks):
        return None
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    guard = _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    results = Results([bank.shape[1:] for bank in banks], dtype, device)
    known = _Known(guard, scored, device, dtype, max(map(_extent, banks, scores)), results)
    if sum(map(len, _KNOWN.values())) >= _MOST_KNOWN:
        _KNOWN.clear()
    _KNOWN.setdefault(len(tensors), []).append(known)
    return known


def lora_banks_directly(
    layers: list[list[torch.Tensor]], scores: list[list[torch.Tensor]], options: Sequence[Any], backend: str
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]] | None:
    """(merged weights, means of A, means of B) of layers that are alike, in one launch and past the dispatcher; None
    where that cannot be. layers: weights, banks A, banks B. scores: of A and of B, none or as many as layers."""
    tensors = [tensor for each in (*layers, *scores) for tensor in each]
    if not may_be_direct() or not PLAIN.issuperset(map(type, tensors)):
        return None
    forward = getattr(_select(layers[0][0], backend), "lora_banks_forward", None)
    if forward is None:
        return None
    with torch._C._DisableAutocast():
        made = forward(*layers, *scores, *options)
    if made is None:
        return None
    weights, *means = made
    a, b = (
        mean.unbind() if bank[0].shape[0] > 1 else [one[0] for one in bank]
        for mean, bank in zip(means, layers[1:], strict=True)
    )
    return weights.unbind(), a, b


def _banks_forward_fake(a: Banks, backend: str) -> list[torch.Tensor]:
    return [_experts_forward_fake(Experts(*pair), backend) for pair in zip(*a, strict=True)]


def _lora_forward_fake(a: LoRA, backend: str) -> torch.Tensor:
    _select(a.weight, backend)
    return a.weight.new_empty(a.weight.shape)


def _loras_forward_fake(a: LoRAs, backend: str) -> torch.Tensor:
    _select(a.weights[0], backend)
    return a.weights[0].new_empty((len(a.weights), *a.weights[0].shape))


def _lora_backward_fake(a: LoRABackward, backend: str) -> tuple[torch.Tensor, ...]:
    banks = (a.lora_a, a.need_a), (a.lora_b, a.need_b)
    return tuple(bank.new_empty(bank.shape if needed else 0) for bank, needed in banks)


def _select(tensor: torch.Tensor, backend: str, extent: Extent | None = None) -> ModuleType:
    return select("merge", backend, tensor.device, tensor.dtype, extent=extent)


def _extent(bank: torch.Tensor, scores: torch.Tensor | None) -> Extent:
    """A slice, for a bank of no dimension. Shares in float64 take twice the room."""
    twice = scores is not None and scores.dtype == torch.float64
    return Extent(experts=bank.shape[:1].numel() * (2 if twice else 1))


# Returns bank's shape without the first axis.
merge_experts_op = define("merge_experts", Experts, "Tensor", _runs("experts_forward"), _experts_forward_fake)
# Returns (d bank, d scores); what is not needed is an empty tensor.
merge_experts_backward_op = define(
    "merge_experts_backward", ExpertsBackward, "(Tensor, Tensor)", _runs("experts_backward"), _experts_backward_fake
)
# merge_experts of every bank with its scores; banks of one device and dtype together. No derivative.
merge_banks_op = define("merge_banks", Banks, "Tensor[]", _banks_forward, _banks_forward_fake)
merge_lora_op = define("merge_lora", LoRA, "Tensor", _runs("lora_forward"), _lora_forward_fake)
# merge_lora of every layer: [layers, ...]. No derivative.
merge_loras_op = define("merge_loras", LoRAs, "Tensor", _runs("loras_forward"), _loras_forward_fake)
# Returns (d lora_a, d lora_b); what is not needed is an empty tensor.
merge_lora_backward_op = define(
    "merge_lora_backward", LoRABackward, "(Tensor, Tensor)", _runs("lora_backward"), _lora_backward_fake
)
