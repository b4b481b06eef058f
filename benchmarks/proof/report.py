"""What the GPU proof writes: results.csv, results.json and a report of one page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..count import beside as count_beside
from ..count import table as count_table
from ..measure import goals, record
from ..measure.goals import Verdict
from ..measure.ledger import OUTCOMES
from ..measure.record import Row, write_text
from .run import FAILED, TIMED_OUT, Result


def collect(folder: Path) -> list[Row]:
    """The rows of all timed stages so far; those that only checked are counted elsewhere."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        if not path.name.startswith("check_"):
            rows += record.read(path)
    return rows


def count_outcomes(path: Path) -> str:
    """How the contenders of one stage ended, in words."""
    if not path.exists():
        return ""
    counts = Counter(r.metric for r in record.read(path) if r.metric in OUTCOMES)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])


def write(
    out: Path, rows: Sequence[Row], results: Sequence[Result], facts: dict, *, smoke: bool
) -> list[Verdict]:  # fmt: skip
    """Writes the three files from what there is so far; returns the verdict on every GPU goal."""
    # First, so that nothing that is made of the rows can cost them.
    record.write(out / "results.csv", list(rows))
    verdicts = [v for v in goals.evaluate(rows) if v.goal.where != "cpu"]
    summary = {
        **facts,
        "smoke": smoke,
        "stages": [{k: v for k, v in vars(r).items() if k != "output"} for r in results],
        "goals": [
            {"id": v.goal.id, "text": v.goal.text, "threshold": v.goal.threshold, "state": v.state, "value": v.value,
             "words": v.words}
            for v in verdicts
        ],
    }  # fmt: skip
    write_text(out / "results.json", json.dumps(summary, indent=1) + "\n")
    write_text(out / "report.md", report(rows, results, verdicts, facts, smoke=smoke))
    return verdicts


def report(
    rows: Sequence[Row], results: Sequence[Result], verdicts: Sequence[Verdict], facts: dict, *, smoke: bool
) -> str:
    """One page of Markdown: where it ran, the stages, the goals, and who was refused or failed."""
    states = Counter(v.state for v in verdicts)
    lines = ["# GPU proof" + (" (smoke run: tiny sizes, its times mean nothing)" if smoke else ""), ""]
    lines += [f"{facts['device']}, torch {facts['torch']}, triton {facts['triton'] or 'none'}, driver "
              f"{facts['driver'] or 'none'}, commit {facts['commit'] or 'unknown'}, {facts['date']}, "
              f"{facts['seconds']:.0f} s of {facts['budget']:.0f} s.", ""]  # fmt: skip
    bad = [r for r in results if r.outcome in (FAILED, TIMED_OUT)]
    lines += [f"Goals: {states['met']} met, {states['missed']} missed, {states['not measured']} not measured. "
              f"Stages: {len(results) - len(bad)} of {len(results)} without a failure.", ""]  # fmt: skip
    lines += ["| stage | outcome | seconds | what |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.outcome} | {r.seconds:.0f} | {_cell(r.note)} |" for r in results]
    lines += ["", *goals.markdown(verdicts)]
    committed = count_table.committed()
    for title, beside in (
        ("Shares of copy bandwidth, predicted from counts and measured", count_beside.lines(rows, committed)),
        ("Counts, and what a profiler counted", count_beside.counts(rows, committed)),
    ):
        if beside:
            lines += ["", f"## {title}", "", *beside]
    ceilings: dict[tuple[str, str, str], list[float]] = {}
    for r in rows:
        if r.op.startswith("ceiling/"):
            ceilings.setdefault((r.op.removeprefix("ceiling/"), r.dtype, r.unit), []).append(r.value)
    if ceilings:
        said = [f"{what} {dtype} {min(v):.4g} to {max(v):.4g} {unit}" for (what, dtype, unit), v in ceilings.items()]
        lines += ["", f"Ceilings, measured in each stage: {'; '.join(said)}."]
    trouble = [r for r in rows if r.metric in ("refused", "failed", "graph_failed", "launches_failed", "out_of_memory")]
    if trouble:
        lines += ["", "| not timed | who | size | why |", "|---|---|---|---|"]
        lines += [f"| {r.op} | {r.backend} | {r.shape} {r.dtype} | {r.metric}: {_cell(r.note)} |" for r in trouble]
    absent = Counter((r.backend, r.note) for r in rows if r.metric == "absent")
    if absent:
        said = "; ".join(f"{name} ({times}x): {note}" for (name, note), times in sorted(absent.items()))
        lines += ["", f"Absent: {_cell(said)}."]
    return "\n".join(lines) + "\n"


def append_log(out: Path, result: Result, limit: int = 400_000) -> None:
    """The end of what a stage printed, into one log for all."""
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"== {result.name}: {result.outcome}, {result.seconds:.0f} s; {result.note}\n")
        log.write(result.output[-limit:].rstrip() + "\n\n")


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
