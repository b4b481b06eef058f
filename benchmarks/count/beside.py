"""Predictions from counts beside what a GPU measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..measure import record
from . import model as count_model
from . import table as count_table

# How far a prediction may be off before it is called wrong: what the model says of itself.
TOLERANCE = 0.08
# How far a count may be off before the model has to be mended.
OFF = 0.10


def lines(measured: Iterable[record.Row], counted: Sequence[count_table.Row]) -> list[str]:
    """A Markdown table, the furthest off first: every share of copy bandwidth that was measured and predicted; then how
    many lie within TOLERANCE. [] where there is no such pair."""
    by_key = {(row.op, row.backend, row.shape, row.dtype): {} for row in counted}
    for row in counted:
        by_key[row.op, row.backend, row.shape, row.dtype] |= {name: (share, row) for name, share in row.shares.items()}
    found = []
    # Of several measurements of one call the last.
    latest = {}
    for one in measured:
        if one.metric == "copy_share":
            latest[one.op, one.backend, one.shape, one.dtype, gpu(one.gpu_name)] = one
    for (*key, name), one in latest.items():
        pair = by_key.get(tuple(key), {}).get(name)
        if pair is not None:
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


def counts(measured: Iterable[record.Row], counted: Sequence[count_table.Row]) -> list[str]:
    """A Markdown table of what a profiler counted (proof/ncu.py) beside the table's counts of that GPU; what is off by
    more than OFF is marked. [] where nothing was."""
    targets = {one.name: one.target for one in count_model.GPUS}
    by_key = {(row.op, row.backend, row.shape, row.dtype, row.target): row for row in counted}
    calls: dict[tuple, dict[str, float]] = {}
    for one in measured:
        if one.metric in ("instructions", "dram_read", "dram_written", "ncu_time"):
            key = one.op, one.backend, one.shape, one.dtype, targets.get(gpu(one.gpu_name), 0)
            calls.setdefault(key, {})[one.metric] = one.value
    made = []
    for key, seen in calls.items():
        row = by_key.get(key)
        if row is None:
            continue
        pairs = [
            ("instructions", row.instructions, seen.get("instructions")),
            ("bytes", row.device * row.floor, _sum(seen.get("dram_read"), seen.get("dram_written"))),
        ]
        for what, want, have in pairs:
            if have is not None and want:
                off = have / want - 1
                mark = ", over 10%" if abs(off) > OFF else ""
                made.append(f"| {key[0]}, {key[2]} | {key[1]} | {what} | {want:.4g} | {have:.4g} | {off:+.1%}{mark} |")
    header = ["| op, size | backend | what | counted before | on the GPU | off |", "|---|---|---|---|---|---|"]
    return [*header, *made] if made else []


def _sum(*parts: float | None) -> float | None:
    return None if None in parts else sum(part for part in parts if part is not None)


def gpu(name: str) -> str:
    """The model's name of the GPU that torch names so, "" for another: a GH200 is no H200."""
    return next((one.name for one in count_model.GPUS if re.search(rf"\b{one.name}\b", name)), "")
