"""Predictions from counts beside what a GPU measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..measure import record
from . import model as count_model
from . import table as count_table

# How far a prediction may be off before it is called wrong: what the model says of itself.
TOLERANCE = 0.08


def lines(measured: Iterable[record.Row], counted: Sequence[count_table.Row]) -> list[str]:
    """A Markdown table, the furthest off first: every share of copy bandwidth that was measured and predicted; then how
    many lie within TOLERANCE. [] where there is no such pair."""
    by_key = {(row.op, row.backend, row.shape, row.dtype): {} for row in counted}
    for row in counted:
        by_key[row.op, row.backend, row.shape, row.dtype] |= {name: (share, row) for name, share in row.shares.items()}
    found = []
    for one in measured:
        name = _gpu(one.gpu_name)
        pair = by_key.get((one.op, one.backend, one.shape, one.dtype), {}).get(name)
        if one.metric == "copy_share" and pair is not None:
            found.append((one, name, *pair))
    if not found:
        return []
    found.sort(key=lambda pair: -abs(pair[0].value - pair[2]))
    made = [
        "| op, size | backend | GPU | predicted | measured | off | limit, instructions a byte, device bytes, waves |",
        "|---|---|---|---|---|---|---|",
    ]
    for one, name, share, row in found:
        made.append(
            f"| {one.op}, {one.shape}, {one.dtype} | {one.backend} | {name} | {share:.2f} | {one.value:.2f} | "
            f"{one.value - share:+.2f} | {row.limit}, {row.a_byte:.3f}, {row.device:.2f}, {row.waves:.3g} |"
        )
    close = sum(abs(one.value - share) <= TOLERANCE for one, _, share, _ in found)
    made += ["", f"{close} of {len(found)} predictions are within {TOLERANCE:.2f} of what was measured."]
    return made


def _gpu(name: str) -> str:
    """The model's name of the GPU that torch names so, "" for another."""
    return next((gpu.name for gpu in count_model.GPUS if gpu.name in name), "")
