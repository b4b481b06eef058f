"""How a call with gates is cut into programs: decided by shapes alone."""

from __future__ import annotations

from typing import Any

import torch

from ...._triton_utils import capability
from ..._routed_plan import MAX_WIDTH, Plan, Side, power_of_2, same_ids
from ...routed_lora.triton_impl.plan import MAX_RANK, MAX_ROWS, Call

# Most slots of a tile of all experts, which looks at one after the other.
MAX_SLOTS = 16


def in_one_tile(lora_a, lora_b, a_index, b_index, slots: int, mix: str) -> bool:
    """Whether a tile holds all experts' columns, each with one gate on either side."""
    banks, packed = (lora_a.shape[0], lora_b.shape[0]), lora_a.shape[1]
    if power_of_2(max(banks)) * power_of_2(packed) > MAX_WIDTH or packed > MAX_RANK:
        return False
    dense = a_index is None and b_index is None
    apart = min(banks) > 1 and mix == "outputs" and not same_ids(a_index, b_index)
    return dense or not (slots > MAX_SLOTS or apart)


def tile_call(x, lora_a, lora_b, a_index, b_index, gates, offsets, width: int) -> Call:
    """All rows as one span, and all experts of either bank side by side; width: the output's columns."""
    batch, tokens, _ = x.shape
    banks, packed = (lora_a.shape[0], lora_b.shape[0]), lora_a.shape[1]
    rp = max(power_of_2(packed), 16 if max(banks) == 1 else 1)
    div = tokens if gates.dim() == 2 else 1
    wide, one = max(power_of_2(max(banks)), 16 // rp), max(1, 16 // rp)
    sides = (
        Side(None if i is None else i.contiguous(), div, m > 1, m, wide if m > 1 else one)
        for i, m in zip((a_index, b_index), banks, strict=True)
    )
    plan = Plan(1, batch * tokens, rp, *sides, None, 1)
    return Call(batch, tokens, plan, *_sizes(x, lora_a, lora_b, offsets, width, 1), gates.shape[-1])


def rows_call(x, lora_a, lora_b, a_index, b_index, gates, offsets, width: int) -> Call:
    """A row for each slot of each row of x, in groups of one expert on either side."""
    batch, tokens, _ = x.shape
    slots, banks = gates.shape[-1], (lora_a.shape[0], lora_b.shape[0])
    if a_index is None and b_index is None:
        every = torch.arange(slots, device=x.device).expand(batch, tokens, slots)
        a_index, b_index = (every if m > 1 else None for m in banks)
    same = same_ids(a_index, b_index)
    indices: list[torch.Tensor | None] = []
    key, keys = None, 1
    for number, (index, m) in enumerate(zip((a_index, b_index), banks, strict=True)):
        if index is not None:
            index = (index.unsqueeze(1) if index.dim() == 2 else index).expand(batch, tokens, slots)
            index = index.reshape(batch * tokens, slots).contiguous()
        indices.append(index)
        if index is not None and m > 1 and not (number and same):
            # A wrong id goes with the nearest right one: the kernels tell them apart.
            ids = index.flatten().long().clamp(0, m - 1)
            key, keys = (ids, m) if key is None else (key * m + ids, keys * m)
    rp = max(16, power_of_2(lora_a.shape[1]))
    sides = (Side(index, 1, False, m, 1) for index, m in zip(indices, banks, strict=True))
    plan = Plan(1, batch * tokens * slots, rp, *sides, key, keys)
    return Call(batch * tokens, slots, plan, *_sizes(x, lora_a, lora_b, offsets, width, slots), 0, slots)


def _sizes(x, lora_a, lora_b, offsets, width: int, slots: int) -> tuple[dict[str, Any], torch.dtype, int]:
    rows = x.shape[0] * x.shape[1] * slots
    if rows > MAX_ROWS:
        raise ValueError(f"x: got {rows} rows (times slots), expected at most {MAX_ROWS} for the Triton kernels")
    per_group, rank = lora_b.shape[1] // len(offsets), lora_b.shape[2]
    sizes = dict(K=x.shape[2], RANK=rank, NG=per_group, OFFSETS=tuple(offsets), WIDTH=width)
    return sizes, x.dtype, capability(x.device)


def constants(kernel, call: Call, like: str, columns: int, gates, mix: str):
    """(constants, grid, rows' order) of a kernel of gates, in blocks of the kernel `like` it without them."""
    meta, grid, order = call.tiles(like, columns)
    meta |= dict(SLOTS=gates.shape[-1], BY_SAMPLE=gates.dim() == 2, WEIGHTS=mix == "weights")
    names = {*kernel.arg_names, "num_warps", "num_stages", "maxnreg"}
    return {name: value for name, value in meta.items() if name in names}, grid, order
