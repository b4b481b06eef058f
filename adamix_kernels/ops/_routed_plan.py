"""Which rows a tile of a routed op's Triton kernels holds and which experts it may meet: decided by shapes alone,
values stay on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._limits import UNLIMITED, Extent

# Fewer tokens a sample than this and a tile takes its rows from several samples.
MIN_SPAN = 16
# Narrow columns of all experts that one tile may hold; beyond, the rows are grouped by expert.
MAX_WIDTH = 256
# An expert's columns lie in one tile whole; these widths are compiled ahead of time for every GPU.
_WIDEST = UNLIMITED._replace(columns=MAX_WIDTH)


class Side(NamedTuple):
    """How one side is routed: row n by index[n // div], index None for expert 0; that of a bank of one shows wrong ids.

    masked: a tile's rows differ in expert, and its narrow tile holds all `experts` of the bank padded to `padded`.
    """

    index: torch.Tensor | None  # type: ignore[assignment]
    div: int
    masked: bool
    experts: int
    padded: int


class Plan(NamedTuple):
    """spans of `span` rows that tiles do not cross; rp: columns of one expert; key: group rows by it, below `keys`."""

    batch: int
    span: int
    rp: int
    down: Side
    up: Side
    key: torch.Tensor | None
    keys: int

    @property
    def width(self) -> int:
        return self.rp * max(self.down.padded, self.up.padded)


class Groups(NamedTuple):
    """Rows in order of their group (ties in row order), where each tile of them starts, and where its group stops."""

    perm: torch.Tensor | None
    start: torch.Tensor | None
    stop: torch.Tensor | None
    tiles: int


def widest(device: torch.device, dtype: torch.dtype) -> Extent:
    """The most that an adapter's kernels take."""
    return _WIDEST


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def fits(experts: int, r: int) -> bool:
    """Whether all experts' narrow columns fit in one tile."""
    return power_of_2(experts) * power_of_2(r) <= MAX_WIDTH


def make_plan(
    batch: int,
    tokens: int,
    r: int,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    md: int,
    mu: int,
) -> Plan:
    """The plan of a call of batch * tokens rows and both banks of md and mu experts of rank r; an index, [batch] or
    [batch, tokens], may be None for a bank of one.
    """
    given, banks = (down_index, up_index), (md, mu)
    routed = [index if m > 1 else None for index, m in zip(given, banks)]
    flat = tokens < MIN_SPAN or all(index is None or index.dim() == 2 for index in routed)
    grouped = [index is not None and (flat or index.dim() == 2) and not fits(m, r) for index, m in zip(routed, banks)]
    if any(grouped):
        flat = True
        grouped = [index is not None and not fits(m, r) for index, m in zip(routed, banks)]
    masked = [index is not None and (flat or index.dim() == 2) and not g for index, g in zip(routed, grouped)]
    rp = power_of_2(r) if any(masked) else max(16, power_of_2(r))
    down, up = (_side(index, tokens, m, mask, rp) for index, m, mask in zip(given, banks, masked))
    key, keys = None, 1
    if all(grouped) and md == mu and _same_ids(*given):
        grouped = [True, False]  # whoever shares the down side shares the up side
    for index, m, group in zip(given, banks, grouped):
        if group and index is not None:
            # A wrong id goes with the nearest right one: the kernels tell them apart.
            ids = per_row(index, batch, tokens).clamp_(0, m - 1)
            key, keys = (ids, m) if key is None else (key * m + ids, keys * m)
    return Plan(1 if flat else batch, batch * tokens if flat else tokens, rp, down, up, key, keys)


def _same_ids(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether both are one index in memory; equal ones at two places are not looked for."""
    if one is None or other is None or one is other:
        return one is other
    places = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (one, other)]
    return places[0] == places[1]


def _side(index: torch.Tensor | None, tokens: int, experts: int, masked: bool, rp: int) -> Side:
    div = tokens if index is not None and index.dim() == 1 else 1
    padded = max(power_of_2(experts) if masked else 1, 16 // rp)
    return Side(None if index is None else index.contiguous(), div, masked, experts, padded)


def per_row(index: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """The expert id of every row, int64 [batch * tokens], a copy."""
    ids = (index.unsqueeze(1) if index.dim() == 1 else index).expand(batch, tokens).reshape(-1)
    return ids.to(torch.int64, copy=True)


def sort_rows(key: torch.Tensor, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in stable order of their key, and the edges [keys + 1] between the keys."""
    ordered, perm = torch.sort(key, stable=True)
    return perm, torch.searchsorted(ordered, torch.arange(keys + 1, device=key.device))


def same_ids(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether slot k has one id on both sides, as far as that can be seen without their values."""
    if first is None or second is None:
        return first is second
    where = [(i.data_ptr(), i.shape, i.stride(), i.dtype) for i in (first, second)]
    return first is second or where[0] == where[1]


def group_rows(plan: Plan, rows: int) -> Groups:
    """Tiles of at most `rows` rows of one group."""
    if plan.key is None:
        return Groups(None, None, None, plan.batch * -(-plan.span // rows))
    return group_tiles(*sort_rows(plan.key, plan.keys), plan.span, rows)


def group_tiles(perm: torch.Tensor, edges: torch.Tensor, span: int, rows: int) -> Groups:
    """As many tiles of at most `rows` of the `span` sorted rows as any routing could need, the spare ones empty."""
    keys = len(edges) - 1
    needed = torch.div(edges.diff() + (rows - 1), rows, rounding_mode="floor")
    last = needed.cumsum(0)
    tiles = -(-span // rows) + min(span, keys)
    tile = torch.arange(tiles, device=perm.device)
    group = torch.searchsorted(last, tile, right=True).clamp_(max=keys - 1)
    start = edges[group] + (tile - (last - needed)[group]) * rows
    return Groups(perm, start, edges[group + 1], tiles)
