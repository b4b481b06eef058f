"""The table of ops on the CPU in docs/performance.md, from the rows of `python -m benchmarks.run op`."""

from __future__ import annotations

from collections.abc import Sequence

from ..measure.goal_sources import OURS
from ..measure.record import Row


def table(rows: Sequence[Row], command: str) -> str:
    """Markdown: our time of each op and size, its floor's share of it, and each peer's time over ours."""
    lines = ["| op, size | ours | of the floor | times as fast as its peers |", "|---|---|---|---|"]
    refused: dict[str, None] = {}
    for (op, shape), of_case in _cases(rows).items():
        times = {r.backend: r.value for r in of_case if r.metric == "time_p50"}
        refused |= {f"{r.backend} at {op}, {shape}": None for r in of_case if r.metric in ("refused", "failed")}
        ours = min((name for name in times if name in OURS), key=times.__getitem__, default=None)
        if ours is None:
            continue
        share = next((r.value for r in of_case if r.backend == ours and r.metric == "floor_share"), None)
        peers = [f"{name} {time / times[ours]:.2f}x" for name, time in times.items() if name not in OURS]
        lines.append(f"| {op}, {shape} | {_time(times[ours])} | {_share(share)} | {', '.join(peers)} |")
    if len(lines) == 2:
        return ""
    commits = ", ".join(dict.fromkeys(r.commit for r in rows))
    said = (
        "Ops on one thread of the same CPU, float32, against their peers in the same run; forward and backward\n"
        f"together where an op has both.\n`{command}`, commit {commits}."
    )
    if refused:
        said += f" Refused by the check against float64, or failed: {'; '.join(refused)}."
    return f"{said}\n\n" + "\n".join(lines)


def _cases(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(op, shape) -> its rows of the widest direction that was timed, and those of its outcomes."""
    whole = {(r.op.partition("/")[0], r.shape) for r in rows if r.op.endswith("/both")}
    cases: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        op, _, direction = r.op.partition("/")
        if op == "ceiling" or direction not in ("", "both" if (op, r.shape) in whole else "forward"):
            continue
        cases.setdefault((op, r.shape), []).append(r)
    return cases


def _time(microseconds: float) -> str:
    return f"{microseconds / 1e3:.1f} ms" if microseconds >= 1e3 else f"{microseconds:.0f} us"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}" if share >= 0.005 else "< 1%"
