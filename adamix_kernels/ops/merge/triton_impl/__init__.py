"""Triton backend of merging.

Launches: one for the mean of a bank or of a list of banks; for its gradient one, two where scores learn;
one for LoRA, one more for each factor that is a bank. LoRA's gradients are PyTorch's matmuls.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from ...._triton_utils import dot_dtype, launch
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

__all__ = ["banks_forward", "experts_backward", "experts_forward", "lora_backward", "lora_forward", "unsupported"]


def experts_forward(bank, scores):
    return _mean(bank, scores, bank.dtype)


def banks_forward(banks, scores, results=None):
    if results is None:
        results = Results([bank.shape[1:] for bank in banks], banks[0].dtype, banks[0].device)
    plan, banks, scores = _banks_plan(banks, scores, results)
    memory = results.allocate()
    if plan.programs:
        launch(
            merge_banks_kernel, (plan.programs,), results.device,
            plan.table, banks[0], memory, next((s for s in scores if s is not None), plan.no_scores), plan.banks,
            **plan.meta,
        )  # fmt: skip
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
    wide = wide_dtype(lora_a)
    weight, out = weight.contiguous(), weight.new_empty(weight.shape)
    factors = [bank[0].contiguous() if bank.shape[0] == 1 else _mean(bank, None, wide) for bank in (lora_a, lora_b)]
    # The mean of 16-bit factors has more digits than they.
    dot = torch.promote_types(*(factor.dtype for factor in factors))
    rows, cols = lora_tile(dot)
    launch(
        merge_lora_kernel, (-(-weight.shape[0] // rows) * -(-weight.shape[1] // cols),), weight.device,
        weight, *factors, out, scaling, *weight.shape,
        OFFSETS=tuple(offsets), PER_GROUP=lora_b.shape[1] // groups, R=lora_b.shape[2], FAN=fan_in_fan_out,
        WIDE=triton_dtype(wide), DOT=tl.float64 if dot == torch.float64 else dot_dtype(dot),
        RANKS=lora_ranks(lora_b.shape[2]), ROWS=rows, COLS=cols,
    )  # fmt: skip
    return out


@dataclass
class _BanksPlan:
    """What one launch for a list of banks needs beside them. no_scores: any tensor of the scores' dtype."""

    table: torch.Tensor | None
    no_scores: torch.Tensor | None
    programs: int
    banks: int
    meta: dict[str, Any]


def _banks_plan(banks, scores, results):
    """(plan, banks, scores as the kernel reads them): that of the last call with the same memory, if there is one.

    It depends on what `results` stands for (shapes, dtype, device), on addresses, and on the stream that the table
    was sent in. What was sent while a graph is captured arrives at its replay alone, so that nothing is kept then.
    """
    given = [score for score in scores if score is not None]
    wide = wide_dtype(*given)
    ready = all(map(torch.Tensor.is_contiguous, banks)) and all(s.dtype == wide and s.is_contiguous() for s in given)
    if not ready:
        banks = [bank.contiguous() for bank in banks]
        scores = [None if score is None else score.to(wide).contiguous() for score in scores]
    stream, capturing = _stream(results.device)
    places = tuple(map(torch.Tensor.data_ptr, banks))
    score_places = tuple(None if score is None else score.data_ptr() for score in scores) if given else (None,)
    key = stream, wide, places, score_places
    plan = results.plans.get(key)
    if plan is None:
        plan = _new_plan(banks, places, score_places if given else (None,) * len(banks), wide, results)
        if ready and not capturing:
            if len(results.plans) >= MAX_PLANS:
                results.plans.clear()
            results.plans[key] = plan
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
    """int64 [columns, rows] on the device, from pinned memory: the host does not wait, and a graph may capture it."""
    columns = array("q", (value for column in zip(*rows, strict=True) for value in column))
    table = torch.frombuffer(columns, dtype=torch.int64).view(-1, len(rows))
    if device.type != "cuda":
        return table
    pinned = table.pin_memory()
    if torch.cuda.is_current_stream_capturing():
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
