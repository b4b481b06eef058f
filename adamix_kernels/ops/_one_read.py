"""When a routed op's Triton backward reads dy once, for dx and the up side's gradient together, and with which tiles.

Decided by shapes and the GPU alone. Each of the programs, which fill the multiprocessors once, leaves a plane.
"""

from __future__ import annotations

import torch

from .._triton_utils import capability
from ._routed_plan import Plan, power_of_2
from ._row_tiles import KEEPS

# Programs on GPUs whose multiprocessors hold one of 144 KB: those of the largest, see also `_programs`.
PROGRAMS = {80: 108, 90: 128, 100: 144}
# Fewest rows of a program: its plane, written and read, costs as much as dy's second read of some 50 rows.
MIN_ROWS = 128
# Columns of an expert; features: those of the gradient that 8 warps hold in registers, and that fill a product of each.
RANK, MOST, FEWEST = 16, 1024, 128
# Tokens a tile.
ROWS, WARPS = 16, 8


def tiles_a_program(plan: Plan, device: torch.device, itemsize: int, rank: int, *features: int) -> int:
    """Tiles of ROWS tokens that a program takes; 0 where dy is read twice. features: of x and of dy."""
    programs = _programs(device)
    masked = plan.down.masked or plan.up.masked or plan.key is not None or plan.up.experts > 1
    fits = 0 < rank <= RANK and all(n % 8 == 0 and FEWEST <= power_of_2(max(n, 1)) <= MOST for n in features)
    if not KEEPS or masked or not fits or itemsize != 2:
        return 0
    if programs < 2 or plan.batch * plan.span < MIN_ROWS * programs:
        return 0
    return -(-plan.batch * -(-plan.span // ROWS) // programs)


def _programs(device: torch.device) -> int:
    """A program more than there are multiprocessors would run alone."""
    programs = PROGRAMS.get(capability(device), 0)
    if programs and device.type == "cuda":
        return min(programs, torch.cuda.get_device_properties(device).multi_processor_count)
    return programs


def programs_of(plan: Plan, share: int) -> int:
    """How many programs take `share` tiles each."""
    return -(-plan.batch * -(-plan.span // ROWS) // share)


def columns(features: int) -> int:
    """Of a warp, of so many features."""
    return power_of_2(features) // WARPS
