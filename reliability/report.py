"""docs/reliability.md, from the files in reliability/results alone."""

from __future__ import annotations

from pathlib import Path

from . import parts
from .record import RESULTS, Record, read

REPORT = Path(__file__).parent.parent / "docs" / "reliability.md"
_HEAD = """# Hard to break

Written by `python -m reliability write` from reliability/results/; every part's figures come from the command above its
table. `python_tests/` runs the same parts in a small size with fixed seeds. No GPU took part in any of them: Triton
kernels run under its interpreter, csrc's device code runs on the CPU.
"""


def text(folder: Path = RESULTS) -> str:
    sections = [_HEAD, _overview(folder)]
    for name in parts.PARTS:
        path = folder / f"{name}.json"
        title = parts.load(name).TITLE
        sections.append(_section(title, read(path)) if path.exists() else f"## {title}\n\nNot run yet.\n")
    return "\n".join(sections)


def _overview(folder: Path) -> str:
    done = [read(folder / f"{name}.json") for name in parts.PARTS if (folder / f"{name}.json").exists()]
    figures = [figure for result in done for figure in result.figures]
    passed = sum(figure.passed for figure in figures)
    return f"{passed} of {len(figures)} figures are as expected; {len(done)} of {len(parts.PARTS)} parts have run.\n"


def _section(title: str, result: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines = [f"## {title}", "", f"`{result.command}`, {result.date}, commit {result.commit}, {versions}.", ""]
    lines += ["| what | came out | expected | s | |", "|---|---|---|---:|---|"]
    for figure in result.figures:
        seconds = f"{figure.seconds:,.0f}" if figure.seconds else ""
        verdict = "ok" if figure.passed else "**not so**"
        lines.append(f"| {figure.about} | {figure.value} | {figure.expected} | {seconds} | {verdict} |")
    return "\n".join(lines) + "\n"
