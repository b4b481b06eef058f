"""The table of ops on the CPU in docs/performance.md, from the rows of `benchmarks.run`'s paired and op."""

from __future__ import annotations

from collections.abc import Sequence

from ..measure.record import Row

PAIRED = "ratio_p50 to "


def table(paired: Sequence[Row], alone: Sequence[Row], command: str) -> str:
    """Markdown: our time of each op and size, the floor's share of it, and each peer's time over ours.

    paired: timed in turns with the peers; alone: one after the other, whose floors and refusals are told.
    """
    cases: dict[tuple[str, str], dict[str, float]] = {}
    for r in paired:
        cases.setdefault((r.op, r.shape), {})[r.metric] = r.value
    if not cases:
        return ""
    lines = [
        "| op, size | ours | of the floor | times as fast as its peers (20th to 80th percentile) |",
        "|---|---|---|---|",
    ]
    for (op, shape), of_case in cases.items():
        peers = [_peer(name.removeprefix(PAIRED), of_case) for name in of_case if name.startswith(PAIRED)]
        share = _share(alone, op, shape)
        lines.append(f"| {op}, {shape} | {_time(of_case['time_p50'])} | {share} | {', '.join(peers)} |")
    first, commits = paired[0], ", ".join(dict.fromkeys(r.commit for r in paired))
    said = (
        f"Ops on one core of a shared {first.cpu_name}, torch {first.torch}, float32, in turns with their peers,\n"
        "round by round; forward and backward together where an op has both; compile_: a formula under torch.compile.\n"
        f"`{command}`, commit {commits}."
    )
    refused = dict.fromkeys(
        f"{r.backend} at {r.op.partition('/')[0]}, {r.shape}" for r in alone if r.metric in ("refused", "failed")
    )
    if refused:
        said += f" Refused by the check against float64, or failed: {'; '.join(refused)}."
    return f"{said}\n\n" + "\n".join(lines)


def _peer(name: str, of_case: dict[str, float]) -> str:
    middle, low, high = (1 / of_case[f"ratio_{p} to {name}"] for p in ("p50", "p80", "p20"))
    return f"{name} {middle:.2f}x ({low:.2f} to {high:.2f})"


def _time(microseconds: float) -> str:
    return f"{microseconds / 1e3:.1f} ms" if microseconds >= 1e3 else f"{microseconds:.0f} us"


def _share(alone: Sequence[Row], op: str, shape: str) -> str:
    """Of the widest direction that was timed."""
    found = {
        r.op.partition("/")[2]: r.value
        for r in alone
        if r.backend == "reference" and r.metric == "floor_share" and r.op.partition("/")[0] == op and r.shape == shape
    }
    share = found.get("both", found.get("forward"))
    return "" if share is None else f"{share:.0%}" if share >= 0.005 else "< 1%"
