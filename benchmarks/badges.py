"""`python -m benchmarks.badges --write`: docs/badges.svg, what a badge would say, from records of this checkout alone.

No service is asked: each label is read from pyproject.toml, reliability/results or benchmarks/results.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from xml.sax.saxutils import escape

from adamix_kernels import __version__
from reliability import parts
from reliability.record import RESULTS, read

from . import ROOT
from .measure import record
from .measure.record import write_text

PICTURE = ROOT / "docs" / "badges.svg"
GOOD, PLAIN, OPEN = "#2e7d32", "#37568b", "#8a6d1b"
# Pixels: of a letter at 11 px, around a word, between two badges.
_LETTER, _PAD, _GAP = 6.6, 6, 5


def badges() -> list[tuple[str, str, str]]:
    """(label, what is so, colour) of each."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pythons = sorted(re.findall(r"Python :: 3\.(\d+)", project), key=int)
    torch = re.search(r'"torch>=([\d.]+)"', project)[1]
    figures = [
        f for name in parts.PARTS if (RESULTS / f"{name}.json").exists() for f in read(RESULTS / f"{name}.json").figures
    ]
    passed = sum(figure.passed for figure in figures)
    gpus = sorted({row.gpu_name for row in _measured()} - {""})
    return [
        ("version", __version__, PLAIN),
        ("python", f"3.{pythons[0]} to 3.{pythons[-1]}", PLAIN),
        ("torch", f"{torch} and newer", PLAIN),
        ("reliability", f"{passed} of {len(figures)}", GOOD if passed == len(figures) else OPEN),
        ("measured on GPU", ", ".join(gpus) or "none yet", GOOD if gpus else OPEN),
        ("licence", re.search(r'^license = "(.+)"', project, re.MULTILINE)[1], PLAIN),
    ]


def _measured() -> list[record.Row]:
    found = (path for path in sorted((ROOT / "benchmarks" / "results").rglob("*.csv")) if record.has_schema(path))
    return [row for path in found for row in record.read(path)]


def svg(made: Sequence[tuple[str, str, str]]) -> str:
    """All of them in one row."""
    drawn, x = [], 0.0
    for label, value, colour in made:
        left, right = (len(words) * _LETTER + 2 * _PAD for words in (label, value))
        drawn.append(
            f'<rect x="{x:.0f}" width="{left:.0f}" height="20" fill="#444"/>'
            f'<rect x="{x + left:.0f}" width="{right:.0f}" height="20" fill="{colour}"/>'
            f'<text x="{x + left / 2:.0f}" y="14">{escape(label)}</text>'
            f'<text x="{x + left + right / 2:.0f}" y="14">{escape(value)}</text>'
        )
        x += left + right + _GAP
    words = escape("; ".join(f"{label}: {value}" for label, value, _ in made))
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{x - _GAP:.0f}" height="20" role="img" aria-label="{words}">\n'
        f'<g font-family="Verdana, DejaVu Sans, sans-serif" font-size="11" fill="#fff" text-anchor="middle">\n{body}\n'
        "</g>\n</svg>\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where the committed picture says something else and nothing is written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.badges", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PICTURE.relative_to(ROOT)} (default: compare)")
    options = parser.parse_args(arguments)
    text = svg(badges())
    if options.write:
        write_text(PICTURE, text)
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != text:
        print(f"badges: {PICTURE.relative_to(ROOT)} is not what the records say; --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
