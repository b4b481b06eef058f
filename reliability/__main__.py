"""`python -m reliability run [PART ...] [--size small]` and `python -m reliability write|check`.

Figures, not tests: how many cases were drawn, killed or measured, for a page. What must hold of them, pytest runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from adamix_kernels.models._files import replace_file

from . import parts, record, report


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run parts; the full size writes reliability/results/<part>.json")
    run.add_argument("parts", nargs="*", metavar="PART", help=f"default: all ({', '.join(parts.PARTS)})")
    run.add_argument("--size", choices=parts.SIZES, default="full")
    commands.add_parser("write", help=f"write {report.REPORT.name} from the results")
    commands.add_parser("check", help=f"fail when {report.REPORT.name} is not what the results say")
    args = parser.parse_args(argv)
    if args.command == "run":
        return _run(args.parts or parts.PARTS, args.size)
    return _write() if args.command == "write" else _check()


def _run(names: Sequence[str], size: str) -> int:
    loaded = {name: parts.load(name) for name in names}
    failed = 0
    for name, part in loaded.items():
        print(f"{name}: {part.TITLE}", flush=True)
        figures = []
        for figure in part.run(size):
            figures.append(figure)
            verdict = "ok      " if figure.passed else "NOT SO  "
            print(f"  {verdict}{figure.about}: {figure.value} (expected {figure.expected})", flush=True)
        failed += sum(not figure.passed for figure in figures)
        if size == "full":
            record.write(record.record(name, size, figures))
    return 1 if failed else 0


def _write() -> int:
    text = report.text()
    replace_file(report.REPORT, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return 0


def _check() -> int:
    if report.REPORT.exists() and report.REPORT.read_text(encoding="utf-8") == report.text():
        return 0
    print(f"{report.REPORT}: not what reliability/results says; python -m reliability write", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
