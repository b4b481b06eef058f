"""How a call with gates is cut into programs: decided by shapes alone."""

from __future__ import annotations

from typing import Any

from ...._triton_utils import capability
from ..._routed_plan import Plan, Side, power_of_2
from ...routed_lora.triton_impl.plan import Call


def make_call(batch: int, tokens: int, lora_a, lora_b, a_index, b_index, gates, offsets, width: int) -> Call:
    """All rows as one span, and all experts of either bank side by side; width: the output's columns."""
    groups, (_, packed, k), (_, per_group, rank) = len(offsets), lora_a.shape, lora_b.shape
    banks = lora_a.shape[0], lora_b.shape[0]
    rp = max(power_of_2(packed), 16 if max(banks) == 1 else 1)
    div = tokens if gates.dim() == 2 else 1
    sides = (
        Side(None if i is None else i.contiguous(), div, m > 1, m, max(power_of_2(m), 16 // rp))
        for i, m in zip((a_index, b_index), banks, strict=True)
    )
    sizes = dict(K=k, RANK=rank, NG=per_group // groups, OFFSETS=tuple(offsets), WIDTH=width)
    plan = Plan(1, batch * tokens, rp, *sides, None, 1)
    return Call(batch, tokens, plan, sizes, lora_a.dtype, capability(lora_a.device), gates.shape[-1])


def constants(call: Call, kernel: str, columns: int, gates, mix: str) -> tuple[dict[str, Any], tuple[int, int]]:
    """Constants and grid of a kernel of gates, in blocks of the kernel without them that is named."""
    meta, grid, _ = call.tiles(kernel, columns)
    del meta["CHUNKS"]
    return meta | dict(SLOTS=call.slots, BY_SAMPLE=gates.dim() == 2, WEIGHTS=mix == "weights"), grid
