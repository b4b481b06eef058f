"""Triton backend of merging.

Launches: one for the mean of a bank or of a list of banks; for its gradient one, two where scores learn;
one for LoRA, and for a list of layers that are alike, one more for each factor that is a bank, but none where the means
of 16 bits are rounded (`lora_banks_forward`). LoRA's gradients are PyTorch's matmuls.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from ...._triton_utils import LAUNCHER_IS_KNOWN, Ready, current_stream, dot_dtype, launch, ready
from ...._triton_utils import problem as unsupported
from .._results import Results
from .._wide import lora_backward, wide_dtype
from .experts import merge_banks_kernel, merge_experts_grad_kernel, merge_experts_kernel, merge_scores_grad_kernel
from .lora import merge_lora_kernel
from .sizes import (
    BLOCK,
    MAX_PLANS,
    MAX_PROGRAMS,
    SUM_ROWS,
    grad_block,
    lora_ranks,
    lora_tile,
    padded,
    triton_dtype,
    unroll,
)

__all__ = [
    "banks_forward",
    "experts_backward",
    "experts_forward",
    "lora_backward",
    "lora_banks_forward",
    "lora_forward",
    "loras_forward",
    "unsupported",
]


def experts_forward(bank, scores):
    return _mean(bank, scores, bank.dtype)


def banks_forward(banks, scores, results=None):
    if results is None:
        results = Results([bank.shape[1:] for bank in banks], banks[0].dtype, banks[0].device)
    plan, banks, scores = _banks_plan(banks, scores, results)
    memory = results.allocate()
    if not plan.launches_past_the_jit(memory) and plan.programs:
        scored = next((s for s in scores if s is not None), plan.no_scores)
        arguments = plan.table, banks[0], memory, scored, plan.banks
        launch(merge_banks_kernel, (plan.programs,), results.device, *arguments, **plan.meta)
        if plan.kept and plan.ready is None and LAUNCHER_IS_KNOWN:
            # First, as another thread launches once it sees the other.
            plan.places = plan.table.data_ptr(), banks[0].data_ptr(), 0 if scored is None else scored.data_ptr()
            plan.ready = ready(merge_banks_kernel, (plan.programs,), results.device, *arguments, **plan.meta)
    return results.split(memory)


def experts_backward(grad_out, bank, scores, need_bank, need_scores):
    wide, experts, size = wide_dtype(scores), bank.shape[0], grad_out.numel()
    bank_grad = bank.new_empty(bank.shape if need_bank else 0)
    scores_grad = scores.new_empty(scores.shape) if need_scores else bank.new_empty(0)
    if scores is not None:
        scores = scores.contiguous()
    meta = dict(PADDED=padded(experts), WIDE=triton_dtype(wide))
    block = grad_block(experts)
    programs = min(-(-size // block), MAX_PROGRAMS)
    plane = torch.empty(programs, meta["PADDED"], dtype=wide, device=bank.device) if need_scores else None
    if need_bank or need_scores:
        launch(
            merge_experts_grad_kernel, (programs,), bank.device,
            grad_out.contiguous(), bank.contiguous(), scores, bank_grad if need_bank else None, plane, size, experts,
            BLOCK=block, **meta,
        )  # fmt: skip
    if need_scores:
        launch(
            merge_scores_grad_kernel, (1,), bank.device, plane, scores, scores_grad, programs, experts,
            ROWS=max(1, SUM_ROWS // meta["PADDED"]), **meta,
        )  # fmt: skip
    return bank_grad, scores_grad


def lora_forward(weight, lora_a, lora_b, scaling, groups, offsets, fan_in_fan_out):
    weight, out = weight.contiguous(), weight.new_empty(weight.shape)
    factors = [[_factor(bank, wide_dtype(lora_a))] for bank in (lora_a, lora_b)]
    _merge_lora([weight], *factors, out, scaling, offsets, lora_b.shape[1] // groups, fan_in_fan_out)
    return out


def loras_forward(weights, lora_a, lora_b, scaling, groups, offsets, fan_in_fan_out):
    weights = [weight.contiguous() for weight in weights]
    out = weights[0].new_empty((len(weights), *weights[0].shape))
    factors = [[_factor(bank, wide_dtype(lora_a[0])) for bank in banks] for banks in (lora_a, lora_b)]
    _merge_lora(weights, *factors, out, scaling, offsets, lora_b[0].shape[1] // groups, fan_in_fan_out)
    return out


def lora_banks_forward(
    weights, lora_a, lora_b, a_scores, b_scores, scaling, groups, offsets, fan_in_fan_out
):  # fmt: skip
    """Of banks of 16 bits (every program reads its part of a bank, which of float32 costs more than it saves), with
    scores of float32, as modules have them."""
    if lora_a[0].itemsize != 2 or any(s.dtype != torch.float32 for s in (*a_scores[:1], *b_scores[:1])):
        return None
    weights, lora_a, lora_b, a_scores, b_scores = (
        [t.contiguous() for t in tensors] for tensors in (weights, lora_a, lora_b, a_scores, b_scores)
    )
    out = weights[0].new_empty((len(weights), *weights[0].shape))
    means = [
        banks[0].new_empty((len(banks), *banks[0].shape[1:]) if len(banks[0]) > 1 else 0) for banks in (lora_a, lora_b)
    ]
    if out.numel() == 0 or any(len(banks[0]) > 1 and mean.numel() == 0 for banks, mean in zip((lora_a, lora_b), means)):
        return None
    per_group = lora_b[0].shape[1] // groups
    _merge_lora(
        weights, lora_a, lora_b, out, scaling, offsets, per_group, fan_in_fan_out, (a_scores, b_scores), means
    )  # fmt: skip
    return out, *means


def _factor(bank, wide):
    return bank[0].contiguous() if bank.shape[0] == 1 else _mean(bank, None, wide)


def _merge_lora(
    weights, lora_a, lora_b, out, scaling, offsets, per_group, fan_in_fan_out, scores=((), ()), means=(None, None)
):
    """Contiguous weights and factors, or banks, of layers that are alike into out [layers, height, width], or of one
    alone. scores: a bank's are left out where the mean is uniform; means: where those of banks go."""
    (weight, *_), (a, *_), (b, *_) = weights, lora_a, lora_b
    # The mean of 16-bit factors has more digits than they, if it is not rounded.
    dot = torch.promote_types(a.dtype, b.dtype)
    ma, mb = (bank.shape[0] if bank.dim() == 3 else 1 for bank in (a, b))
    scores = [each if experts > 1 else () for each, experts in zip(scores, (ma, mb), strict=True)]
    rows, cols, warps, registers = lora_tile(dot, max(ma, mb))
    places, units = None, (1,) * 5
    if len(weights) > 1:
        places, units = _places(weights, lora_a, lora_b, *(each or lora_b for each in scores))
    launch(
        merge_lora_kernel, (-(-weight.shape[0] // rows) * -(-weight.shape[1] // cols), len(weights)), weight.device,
        weight, a, b, out, places, scaling, *weight.shape, *(each[0] if each else None for each in scores),
        *(mean if experts > 1 else None for mean, experts in zip(means, (ma, mb), strict=True)),
        OFFSETS=tuple(offsets), PER_GROUP=per_group, R=b.shape[-1], FAN=fan_in_fan_out,
        WIDE=triton_dtype(wide_dtype(a)), DOT=tl.float64 if dot == torch.float64 else dot_dtype(dot),
        RANKS=lora_ranks(b.shape[-1]), ROWS=rows, COLS=cols, MA=ma, MB=mb, UNITS=units, num_warps=warps,
        maxnreg=registers,
    )  # fmt: skip


def _places(*lists):
    """([layers, lists] on the device: how many units each tensor lies behind the first of its list, those units in
    elements: 16 bytes where all distances are multiples, so that loads of 16 bytes may be)."""
    apart = [[t.data_ptr() - tensors[0].data_ptr() for t in tensors] for tensors in lists]
    aligned = all(distance % 16 == 0 for distances in apart for distance in distances)
    units = tuple(16 // tensors[0].element_size() if aligned else 1 for tensors in lists)
    steps = [unit * tensors[0].element_size() for unit, tensors in zip(units, lists, strict=True)]
    rows = [tuple(distance // step for distance in distances) for distances, step in zip(apart, steps, strict=True)]
    table = _table(list(zip(*rows, strict=True)), lists[0][0].device)
    if _stream(table.device)[1]:
        # The graph reads it at every replay.
        _CAPTURED.append(table)
    return table, units


@dataclass
class _BanksPlan:
    """What one launch for a list of banks needs beside them. no_scores: any tensor of the scores' dtype.

    kept: for calls with the same addresses. ready: the launch, once it was made; places: the table's address, the first
    bank's, the scores'.
    """

    table: torch.Tensor | None
    no_scores: torch.Tensor | None
    programs: int
    banks: int
    meta: dict[str, Any]
    kept: bool = False
    ready: Ready | None = None
    places: tuple[int, int, int] = (0, 0, 0)

    def launches_past_the_jit(self, memory: torch.Tensor) -> bool:
        """Whether the launch is known, and was made."""
        to = memory.data_ptr()
        stream = current_stream(memory.device.index or 0) if self.ready is not None and to % 16 == 0 else None
        if self.ready is None or stream is None:
            return False
        table, bank, scores = self.places
        self.ready(stream, table, bank, to, scores, self.banks)
        return True


def _banks_plan(banks, scores, results):
    """(plan, banks, scores as the kernel reads them): that of the last call with the same memory, if there is one.

    It depends on what `results` stands for (shapes, dtype, device), on addresses, and on the stream that the table
    was sent in. What was sent while a graph is captured arrives at its replay alone, so that nothing is kept then; but
    the plan of a call before the capture, in whichever stream, is taken: a capture begins when that work is done.
    """
    given = [score for score in scores if score is not None]
    wide = wide_dtype(*given)
    as_they_are = results.plans.get("as they are")
    if as_they_are is None:
        tensors = all(map(torch.Tensor.is_contiguous, banks)) and all(map(torch.Tensor.is_contiguous, given))
        as_they_are = results.plans["as they are"] = tensors and all(score.dtype == wide for score in given)
    if not as_they_are:
        banks = [bank.contiguous() for bank in banks]
        scores = [None if score is None else score.to(wide).contiguous() for score in scores]
    stream, capturing = _stream(results.device)
    places = tuple(map(torch.Tensor.data_ptr, banks))
    score_places = tuple(None if score is None else score.data_ptr() for score in scores) if given else (None,)
    key = stream, wide, places, score_places
    plan = results.plans.get(key)
    if plan is None and capturing:
        plan = next((made for known, made in list(results.plans.items()) if known[1:] == key[1:]), None)
    if plan is None:
        plan = _new_plan(banks, places, score_places if given else (None,) * len(banks), wide, results)
        if as_they_are and not capturing:
            if len(results.plans) >= MAX_PLANS:
                results.plans.clear()
            results.plans[key], plan.kept = plan, True
    if capturing:
        # The graph reads it at every replay.
        _CAPTURED.append(plan.table)
    return plan, banks, scores


def _new_plan(banks, places, score_places, wide, results):
    rows, programs, unit = [], 0, 16 // results.dtype.itemsize
    # What has no scores of its own reads none.
    anchor = next((place for place in score_places if place is not None), 0)
    for bank, place, score, offset in zip(banks, places, score_places, results.offsets, strict=True):
        experts, size = bank.shape[0], bank.numel() // bank.shape[0]
        if size == 0:
            continue
        distance = (place - places[0]) // results.dtype.itemsize
        aligned = all(n % unit == 0 for n in (distance, offset, size))
        scored = [0, 0] if score is None else [1, (score - anchor) // wide.itemsize]
        rows.append((programs, distance, offset, *scored, size, experts, aligned))
        programs += -(-size // BLOCK)
    most = max(bank.shape[0] for bank in banks)
    meta = dict(
        BANKS=padded(len(rows)) if rows else 1, PADDED=padded(most), UNROLL=unroll(most), UNIT=unit,
        WIDE=triton_dtype(wide), BLOCK=BLOCK,
    )  # fmt: skip
    none = banks[0].new_empty(1, dtype=wide) if anchor == 0 else None
    return _BanksPlan(_table(rows, results.device) if rows else None, none, programs, len(rows), meta)


def _stream(device: torch.device) -> tuple[int, bool]:
    """The current stream of a GPU, and whether a graph is being captured."""
    if device.type != "cuda":
        return 0, False
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index), torch.cuda.is_current_stream_capturing()


# A captured graph copies its table from the host at every replay: what it copies stays.
_CAPTURED: list[torch.Tensor] = []


def _table(rows: list[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    """int64 [columns, rows] on the device, from pinned memory: the host does not wait, and a graph may capture it.

    Raises RuntimeError where torch gives no such memory while a graph is captured: an older one asks for events then,
    which a capture forbids.
    """
    columns = array("q", (value for column in zip(*rows, strict=True) for value in column))
    table = torch.frombuffer(columns, dtype=torch.int64).view(-1, len(rows))
    if device.type != "cuda":
        return table
    capturing = torch.cuda.is_current_stream_capturing()
    try:
        pinned = table.pin_memory()
    except RuntimeError as error:
        if not capturing:
            raise
        raise RuntimeError(
            "merge: got these banks for the first time while a CUDA graph is captured, when this torch gives no pinned "
            "memory, expected a call with the same banks before the capture"
        ) from error
    if capturing:
        _CAPTURED.append(pinned)
    return pinned.to(device, non_blocking=True)


def _mean(bank, scores, dtype):
    out, experts = bank.new_empty(bank.shape[1:], dtype=dtype), bank.shape[0]
    launch(
        merge_experts_kernel, (-(-out.numel() // BLOCK),), bank.device,
        bank.contiguous(), None if scores is None else scores.contiguous(), out, out.numel(), experts,
        PADDED=padded(experts), UNROLL=unroll(experts), WIDE=triton_dtype(wide_dtype(scores)), BLOCK=BLOCK,
    )  # fmt: skip
    return out
