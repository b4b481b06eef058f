"""`python -m benchmarks.readme --write`: the README's performance section and docs/performance.md.

Both are written from benchmarks/results alone: the section has what a newcomer needs, the page every figure and goal.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from .. import RESULTS, ROOT, plot
from ..measure import goals, record
from ..measure.goals import CPU_LIMITS, Verdict
from ..measure.record import Row, write_text
from ..models.names import ADAMIX, TITLES
from . import host as readme_host
from . import ops as readme_ops
from .host import wrapped

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- performance, written by `python -m benchmarks.readme --write`: begin -->"
END = "<!-- performance: end -->"
STEPS = RESULTS / "step_cpu.csv"
EARLIER = RESULTS / "step_cpu_earlier.csv"
OPS = RESULTS / "ops_cpu.csv"
PAIRED = RESULTS / "ops_cpu_paired.csv"
MEMORY = RESULTS / "linear_memory_cpu.csv"
HOST = RESULTS / "host_cpu.csv"


def section() -> str:
    """The text between the README's markers."""
    first = (
        f"{_gpu(goals.evaluate(goals.load()))} Every op, every goal and how each figure was made: "
        "[docs/performance.md](docs/performance.md)."
    )
    measured = [_memory(record.read(MEMORY)), readme_host.sentence(record.read(HOST))]
    points = ["- " + words.replace("\n", "\n  ") for words in measured if words]
    return "\n\n".join([wrapped(first), "\n".join(points)])


def page() -> str:
    """docs/performance.md."""
    verdicts = goals.evaluate(goals.load())
    head = "# Performance\n\n" + wrapped(
        "Every figure here is a row of benchmarks/results, with the command that made it; the row names the commit, "
        "and what changed since is not in it. `python -m benchmarks.readme --write` writes this page from them."
    )
    counts = "What kernels do is counted without a GPU, and GPUs' speeds predicted: [counts](counts.md)."
    parts = [head, wrapped(_gpu(verdicts)), counts, _memory(record.read(MEMORY)), "## A training step on a CPU"]
    parts += [_cpu_table(record.read(STEPS)), _cpu_words(record.read(STEPS), record.read(EARLIER))]
    command = f"python -m benchmarks.run paired NAME --out {PAIRED.relative_to(ROOT)}"
    parts += ["## Ops on a CPU", readme_ops.table(record.read(PAIRED), record.read(OPS), command), *_pictures()]
    parts += ["## Host time of a call", readme_host.table(record.read(HOST)), "## Goals", _goals(verdicts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def rewritten(text: str) -> str:
    """A README with the section in it; ValueError where its markers are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README: got no markers, expected {BEGIN!r} and then {END!r}")
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


def _gpu(verdicts: Sequence[Verdict]) -> str:
    on_gpu = [v for v in verdicts if v.goal.where == "gpu"]
    measured = [v for v in on_gpu if v.state != "not measured"]
    if not measured:
        return (
            f"No GPU figure is claimed: nothing has been measured on one, and {len(on_gpu)} goals for GPUs are "
            "open. `adamix bench gpu-proof` runs the GPU tests, the sanitizers and every benchmark there, in one "
            "command of 15 minutes or two of half of that."
        )
    met = sum(v.state == "met" for v in measured)
    return (
        f"On an {goals.gpu_of(goals.load())} {met} of {len(on_gpu)} goals are met, {len(measured) - met} missed and "
        f"{len(on_gpu) - len(measured)} not measured (`adamix bench gpu-proof`)."
    )


def _memory(rows: Sequence[Row]) -> str:
    """The linear loss beside the formula on all logits."""
    peaks = {r.backend: r for r in rows if r.metric == "peak_memory" and "trained head" not in r.shape}
    ours, formula = peaks["reference"], peaks["formula"]
    return wrapped(
        f"`linear_adamix_loss` needs **{ours.value / formula.value:.0%} of the memory** of the plain formula: "
        f"{ours.value:,.0f} MiB instead of {formula.value:,.0f} MiB at {_loss_size(ours.shape)} "
        "(`python -m benchmarks.bench_linear_memory`, forward and backward, on a CPU)."
    )


def _loss_size(shape: str) -> str:
    rows, tokens, classes = shape.partition(" ")[0].split("x")
    return f"{rows} x {int(tokens):,} tokens and {int(classes):,} classes in bfloat16"


def _cpu_table(rows: Sequence[Row]) -> str:
    ratios = _ratios(rows)
    shapes = list(dict.fromkeys(shape for shape, _, _ in ratios))
    others = list(dict.fromkeys(other for _, other, _ in ratios))
    head = "".join(f" batch {_size(shape)} tokens | goal |" for shape in shapes)
    lines = [f"| AdaMix step over |{head}", "|---" + "|---|---" * len(shapes) + "|"]
    for other in others:
        cells = ""
        for shape in shapes:
            low, middle, high = (ratios[shape, other, p] for p in ("p20", "p50", "p80"))
            limit = CPU_LIMITS.get(_numbers(shape), {}).get(other)
            cells += f" {middle:.2f}x ({low:.2f} to {high:.2f}) | {f'{limit:.2f}x' if limit else ''} |"
        lines.append(f"| {TITLES[other]} |{cells}")
    words = (
        "On a CPU, one training step on all-MiniLM-L6-v2 (M = 4, r = 48, two passes in one doubled batch, AdamW), "
        "against its\npeers in the same run, rounds interleaved, median of the per-round ratios "
        "(20th to 80th percentile):"
    )
    return words + "\n\n" + "\n".join(lines)


def _cpu_words(rows: Sequence[Row], earlier: Sequence[Row]) -> str:
    first, ratios = rows[0], _ratios(rows)
    times = [r for r in rows if r.op == f"step/{ADAMIX}" and r.metric == "time_p50"]
    facts = dict(pair.split("=") for pair in first.note.split() if "=" in pair)
    took = " and ".join(f"{_seconds(r.value)} at {_size(r.shape)}" for r in times)
    said = [
        f"`python -m benchmarks.run step --out {STEPS.relative_to(ROOT)}`: {facts['threads']} threads of a "
        f"shared {first.cpu_name}, torch {first.torch}, commit {first.commit}. The AdaMix step took {took}."
    ]
    for shape in dict.fromkeys(shape for shape, _, _ in ratios):
        limits = CPU_LIMITS.get(_numbers(shape), {})
        open_ = [o for o, limit in limits.items() if ratios[shape, o, "p20"] <= limit <= ratios[shape, o, "p80"]]
        rounds = next(re.search(r"rounds=(\d+)", r.note).group(1) for r in rows if r.shape == shape)
        if open_:
            said.append(
                f"At {_size(shape)} the spread reaches across {len(open_)} of {len(limits)} goals: "
                f"{rounds} rounds do not settle them."
            )
    said.append(_earlier(_ratios(earlier), earlier))
    return wrapped(" ".join(said))


def _earlier(ratios: dict, rows: Sequence[Row]) -> str:
    """What another run of the same command gave, so that nobody takes one run for the truth."""
    parts, missed = [], 0
    for shape in dict.fromkeys(shape for shape, _, _ in ratios):
        found = {other: value for (s, other, _), value in ratios.items() if s == shape}
        limits = CPU_LIMITS.get(_numbers(shape), {})
        missed += sum(found[other] > limit for other, limit in limits.items())
        parts.append(", ".join(f"{value:.2f}x" for value in found.values()) + f" at {_size(shape)}")
    first = rows[0]
    return (
        f"Another run of the same command, on a shared {first.cpu_name} ({first.date[:10]}, commit {first.commit}), "
        f"gave, in the order of the table, {'; '.join(parts)}; goals missed: {missed}."
    )


def _pictures() -> list[str]:
    made = []
    for path in plot.measured():
        for picture in plot.pictures(path):
            what = "roofline" if "roofline" in picture.name else "times as fast as its peers"
            made.append(f"![{what}, {path.stem}]({os.path.relpath(picture, PAGE.parent)})")
    return made


def _goals(verdicts: Sequence[Verdict]) -> str:
    counts = ", ".join(f"{sum(v.state == s for v in verdicts)} {s}" for s in ("met", "missed", "not measured"))
    lines = goals.markdown(verdicts)
    commands = (
        "Goals 2.8 are the steps' above, 5.2.1 is `python -m benchmarks.bench_linear_memory`'s; "
        "`adamix bench gpu-proof` measures those of a GPU. Those of host time stand in the tables above."
    )
    return "\n".join([f"{counts}.", "", wrapped(commands), "", *lines])


def _ratios(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    """{(shape, other step, percentile): ratio} of the AdaMix step."""
    found = {}
    for r in rows:
        match = re.fullmatch(r"ratio_(p\d+) to step/(\w+)", r.metric)
        if match and r.op == f"step/{ADAMIX}":
            found[r.shape, match.group(2), match.group(1)] = r.value
    return found


def _numbers(shape: str) -> tuple[int, int]:
    batch, _, tokens = shape.partition(" ")[0].partition("x")
    return int(batch), int(tokens)


def _size(shape: str) -> str:
    return "{} x {}".format(*_numbers(shape))


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.0f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when --check finds another text than the results make."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--write", action="store_true", help="write the README's section and docs/performance.md")
    wanted.add_argument("--check", action="store_true", help="say whether they are what the results make")
    options = parser.parse_args(arguments)
    made = {README: rewritten(README.read_text(encoding="utf-8")), PAGE: page()}
    status = 0
    for path, new in made.items():
        old = path.read_text(encoding="utf-8") if path.exists() else None
        name = os.path.relpath(path)
        if options.check:
            status |= int(new != old)
            print(f"{name} {'agrees' if new == old else 'does not agree'} with benchmarks/results"
                  + ("" if new == old else ": python -m benchmarks.readme --write"))  # fmt: skip
            continue
        if new != old:
            write_text(path, new)
        print(f"{name}: {'unchanged' if new == old else 'written'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
