"""Launches of the weight gradients: how the rows are split on either side, planes over the splits, then their sum."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ...._triton_utils import launch, memory
from ..._routed_plan import MIN_SPAN, Side, fits, per_row, power_of_2, sort_rows
from .plan import MIN_PROGRAMS, Call, padded_rank
from .plane_sum import lora_sum_kernel
from .tables import config
from .weight_grad import lora_grads_kernel

# Fewest rows of a split in tiles, rows of a split whose plane costs little beside them (for narrow columns), and most
# splits; whole samples that one program may sum, and samples among which it looks for them, a power of two.
MIN_TILES, ROWS, COLUMN_ROWS, MAX_SPLITS, MAX_SAMPLES, WINDOW = 2, 256, 8, 64, 16, 128
# With gates planes are of all experts: rows for each narrow column, and programs that are enough.
GATED_ROWS, GATED_PROGRAMS = 10, 192
# Elements that a program of the sum of the planes takes, and planes that it asks for at once: as a rule, where few
# experts of many have planes, and of more than MAX_SPLITS.
SUM_BLOCK, WIDE_SUM_BLOCK, MANY_BLOCK = 512, 2048, 256
SUM_AHEAD, MANY_AHEAD = 8, 32


class Rows(NamedTuple):
    """How one side's rows are split, and find their expert (`mode`: weight_grad.py).

    index, perm, edges: what the kernel reads for that. share: rows of a split, or samples of a program. slots: planes
    of a split, 1 or the experts. rp, padded: narrow columns of an expert, and experts held side by side.
    """

    mode: str
    index: torch.Tensor | None
    perm: torch.Tensor | None
    edges: torch.Tensor | None
    share: int
    splits: int
    slots: int
    rp: int
    padded: int

    @property
    def programs(self) -> int:
        """Of one block of features."""
        return self.splits * (self.slots if self.mode == "sorted" else 1)

    def planes(self, experts: int) -> int:
        """How many there are (plane_sum.py tells which)."""
        if self.mode == "samples":
            shares = -(-WINDOW // self.share)
            return -(-self.splits // WINDOW) * experts * shares if experts * shares < WINDOW else self.splits
        return self.splits * self.slots

    @property
    def direct(self) -> bool:
        """Whether the one split's planes are the gradients themselves."""
        return self.splits == 1 and self.mode not in ("parts", "samples")


def weight_grads(
    x, grad_out, dt, t, keys, da, db, threshold: int, inv_keep: float, scaling: float, call: Call, b_planes=None
) -> None:
    """Fills da and db; None for one that is not needed. b_planes: dB's, where an earlier launch has made them."""
    sizes, plan = call.sizes, call.plan
    width = max(_narrow(plan.down, call.packed, call)[1:], _narrow(plan.up, sizes["RANK"], call)[1:], key=math.prod)
    width = math.prod(width)
    chosen = config("lora_grads_kernel", call.capability, call.dtype.itemsize, width)
    wanted = {
        "A": (plan.down, call.packed, -(-sizes["K"] // chosen.cols), da),
        "B": (plan.up, sizes["RANK"], len(sizes["OFFSETS"]) * -(-sizes["NG"] // chosen.cols), db),
    }
    features = sum(blocks for *_, blocks, grad in wanted.values() if grad is not None)
    sides, planes, programs = {}, {}, {}
    for name, (side, columns, blocks, grad) in wanted.items():
        rows = sides[name] = split_rows(call, side, columns, chosen.rows, features)
        if name == "B" and b_planes is not None:
            sides[name] = rows._replace(mode="all", splits=b_planes.shape[0], slots=1)
            planes[name], programs[name] = b_planes, 0
            continue
        planes[name], programs[name] = None, blocks * -(-columns // rows.rp) * rows.programs if grad is not None else 0
        if programs[name]:
            shape = rows.planes(side.experts), *grad.shape[1:]
            planes[name] = grad if rows.direct else memory(grad, *shape, dtype=torch.float32)
    a, b = sides["A"], sides["B"]
    b_here = planes["B"] if programs["B"] else None
    launch(
        lora_grads_kernel, (sum(programs.values()),), x.device,
        x, grad_out, dt, t, *a[1:4], *b[1:4], keys, planes["A"], b_here,
        da if a.mode == "samples" else None, db if b.mode == "samples" else None, call.rows, call.batch, call.tokens,
        plan.down.div, a.share, a.splits, programs["A"], plan.up.div, b.share, b.splits, threshold, inv_keep, scaling,
        **sizes, A_MODE=a.mode, A_EXPERTS=plan.down.experts, A_PADDED=a.padded, A_RP=a.rp,
        B_MODE=b.mode, B_EXPERTS=plan.up.experts, B_PADDED=b.padded, B_RP=b.rp,
        BLOCK_M=chosen.rows, SLOTS=call.slots or 1, EACH=call.each, WINDOW=WINDOW, **call.block(chosen),
    )  # fmt: skip
    _sum(x, sides, planes, {"A": da, "B": db}, call)


def _sum(x, sides: dict[str, Rows], planes, grads, call: Call) -> None:
    arguments: dict[str, tuple[Any, ...]] = {}
    constants: dict[str, Any] = {}
    programs = {}
    chosen = [name for name, grad in grads.items() if grad is not None and sides[name].mode == "samples"]
    wide = sum(grads[name].numel() for name in chosen) >= 2 * MIN_PROGRAMS * WIDE_SUM_BLOCK
    block, ahead = WIDE_SUM_BLOCK if wide else SUM_BLOCK, SUM_AHEAD
    if sides["B"].mode == "all" and sides["B"].splits > MAX_SPLITS:
        block, ahead = MANY_BLOCK, MANY_AHEAD
    for name, grad in grads.items():
        rows, left = sides[name], planes[name] is not None and planes[name] is not grad
        size, experts = (grad[0].numel(), grad.shape[0]) if left else (0, 1)
        programs[name] = experts * -(-size // block)
        # Splits of a sample, or samples of a program.
        share = -(-call.tokens // rows.share) if rows.mode == "parts" else rows.share
        index = rows.index if rows.mode == "parts" or rows.mode == "samples" else None
        arguments[name] = (planes[name], index, grad, share, rows.splits) if left else (None, None, None, 1, 1)
        constants |= {f"{name}_SIZE": size, f"{name}_MODE": rows.mode if left else "all", f"{name}_EXPERTS": experts}
    a, b = arguments["A"], arguments["B"]
    launch(
        lora_sum_kernel, (sum(programs.values()),), x.device,
        a[0], b[0], a[1], b[1], a[2], b[2], call.batch, *a[3:], programs["A"], *b[3:],
        **constants, BLOCK=block, AHEAD=ahead, WINDOW=WINDOW, num_warps=4,
    )  # fmt: skip


def _narrow(side: Side, columns: int, call: Call) -> tuple[str, int, int]:
    """(mode, narrow columns of an expert, experts side by side) of a side of `columns` narrow columns."""
    unmasked = max(16, padded_rank(columns)), 1
    if call.slots and side.experts > 1:
        rp = power_of_2(columns)
        return "gated", rp, max(power_of_2(side.experts), 16 // rp)
    if side.index is None or side.experts == 1:
        return "all", *unmasked
    if side.index.dim() == 1 and call.tokens >= MIN_SPAN:
        return "samples", *unmasked
    if fits(side.experts, columns):
        rp = power_of_2(columns)
        return "tokens", rp, max(power_of_2(side.experts), 16 // rp)
    return "sorted", *unmasked


def split_rows(call: Call, side: Side, columns: int, tile: int, features: int) -> Rows:
    """The side's rows in parts, from sizes and the tile alone; features: blocks of them in all.

    The tile is that of the GPU's architecture: there the same inputs give the same bits, on another one perhaps not.
    """
    mode, rp, padded = _narrow(side, columns, call)
    experts, rows = side.experts, call.rows
    written = columns * (experts if mode in ("tokens", "gated") else 1)
    # Enough programs, and planes that are small beside the rows they sum.
    column_rows, programs = (GATED_ROWS, GATED_PROGRAMS) if mode == "gated" else (COLUMN_ROWS, MIN_PROGRAMS)
    few = rows // -(-programs // max(features, 1))
    share = max(-(-rows // MAX_SPLITS), min(max(ROWS, column_rows * written), max(MIN_TILES * tile, few)))
    share = -(-share // tile) * tile
    if mode == "samples":
        index = side.index
        if call.tokens >= share:
            part = -(-call.tokens // (call.tokens // share) // tile) * tile
            return Rows("parts", index, None, None, part, call.batch * -(-call.tokens // part), 1, rp, padded)
        several = min(share // call.tokens, MAX_SAMPLES)
        return Rows(mode, index, None, None, several, call.batch, 1, rp, padded)
    if mode == "sorted":
        perm, edges = sort_rows(per_row(side.index, call.batch, call.tokens), experts)
        return Rows(mode, None, perm, edges, share, max(1, rows // (experts * share)), experts, rp, padded)
    slots = experts if mode in ("tokens", "gated") else 1
    return Rows(mode, side.index, None, None, share, -(-rows // share), slots, rp, padded)
