"""Triton backend of merging.

Launches: one for the mean of a bank or of a list of banks; for its gradient one, two where scores learn;
one for LoRA, one more for each factor that is a bank. LoRA's gradients are PyTorch's matmuls.
"""

from __future__ import annotations

from array import array

import torch

from ...._triton_utils import launch
from ...._triton_utils import problem as unsupported
from .._wide import lora_backward, wide_dtype
from .experts import merge_banks_kernel, merge_experts_grad_kernel, merge_experts_kernel, merge_scores_grad_kernel
from .lora import merge_lora_kernel
from .sizes import BLOCK, LORA_TILE, MAX_PROGRAMS, SUM_ROWS, grad_block, padded, triton_dtype, unroll

__all__ = ["banks_forward", "experts_backward", "experts_forward", "lora_backward", "lora_forward", "unsupported"]


def experts_forward(bank, scores):
    return _mean(bank, scores, bank.dtype)


def banks_forward(banks, scores):
    banks = [bank.contiguous() for bank in banks]
    outs = [bank.new_empty(bank.shape[1:]) for bank in banks]
    wide = wide_dtype(*scores)
    scores = [None if score is None else score.to(wide).contiguous() for score in scores]
    rows, programs, unit = [], 0, 16 // banks[0].itemsize
    # What has no scores of its own reads none: any tensor serves as the place to count from.
    anchor, score_anchor = banks[0], next((s for s in scores if s is not None), banks[0].new_empty(1, dtype=wide))
    for bank, out, score in zip(banks, outs, scores, strict=True):
        size = out.numel()
        if size == 0:
            continue
        distances = [_distance(anchor, bank), _distance(anchor, out)]
        aligned = all(n % unit == 0 for n in (*distances, size))
        scored = [0, 0] if score is None else [1, _distance(score_anchor, score)]
        rows.append((programs, *distances, *scored, size, bank.shape[0], aligned))
        programs += -(-size // BLOCK)
    if not rows:
        return outs
    most = max(bank.shape[0] for bank in banks)
    launch(
        merge_banks_kernel, (programs,), anchor.device, _table(rows, anchor.device), anchor, score_anchor, len(rows),
        BANKS=padded(len(rows)), PADDED=padded(most), UNROLL=unroll(most), UNIT=unit,
        WIDE=triton_dtype(wide), BLOCK=BLOCK,
    )  # fmt: skip
    return outs


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
    rows, cols = LORA_TILE
    launch(
        merge_lora_kernel, tuple(-(-n // tile) for n, tile in zip(weight.shape, LORA_TILE)), weight.device,
        weight, *factors, out, scaling, *weight.shape,
        OFFSETS=tuple(offsets), PER_GROUP=lora_b.shape[1] // groups, R=lora_b.shape[2], FAN=fan_in_fan_out,
        WIDE=triton_dtype(wide), ROWS=rows, COLS=cols,
    )  # fmt: skip
    return out


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


def _distance(anchor: torch.Tensor, tensor: torch.Tensor) -> int:
    """Elements from the one's first to the other's; both of one dtype."""
    return (tensor.data_ptr() - anchor.data_ptr()) // anchor.itemsize


def _mean(bank, scores, dtype):
    out, experts = bank.new_empty(bank.shape[1:], dtype=dtype), bank.shape[0]
    launch(
        merge_experts_kernel, (-(-out.numel() // BLOCK),), bank.device,
        bank.contiguous(), None if scores is None else scores.contiguous(), out, out.numel(), experts,
        PADDED=padded(experts), UNROLL=unroll(experts), WIDE=triton_dtype(wide_dtype(scores)), BLOCK=BLOCK,
    )  # fmt: skip
    return out
