"""`python -m benchmarks.evidence`: every table and bar plot of docs/evidence again.

    python -m benchmarks.evidence --data FOLDER            trains what the rows lack, for days, then writes all
    python -m benchmarks.evidence --data FOLDER --only sst2_30_shots
    python -m benchmarks.evidence                          tables and plots alone, from the rows that are there
    python -m benchmarks.evidence --check                  whether tables, plots and sentences say what the rows say

FOLDER holds sst2/ (train.tsv and dev.tsv, as GLUE has them) and e2e/ (the challenge's valid.txt, test.txt).
A study whose data is not there is named and left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from adamix_kernels.models._files import replace_file

from .plots import draw, stale
from .prose import unbacked
from .studies import FOLDER, STUDIES
from .tables import written
from .trainings import E2E, TRAIN, run_e2e, run_train

PAGES = (FOLDER / "README.md", FOLDER / "gates.md")


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 1 when --check finds what differs from its rows, or a study had no data."""
    names = [*(study.name for study in STUDIES), *TRAIN, E2E]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets; without it nothing is trained")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STUDY", help=", ".join(names))
    parser.add_argument(
        "--work", type=Path, default=Path("evidence_work"), help="scratch folder (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data: got {str(options.data)!r}, expected a folder")
    missing = [] if options.data is None else train(options.data.resolve(), options.work, options.only)
    if options.check:
        differing = [page for page in PAGES if _differs(page)]
        return int(bool(differing))
    for page in PAGES:
        _write(page)
    return int(bool(missing))


def _differs(page: Path) -> bool:
    text = page.read_text(encoding="utf-8")
    found = ["a table differs from its rows"] if written(text, FOLDER) != text else []
    found += [f"{name}.png is not of {name}.jsonl" for name in stale(text, FOLDER)]
    found = [f"{what}: python -m benchmarks.evidence" for what in found]
    pages = [each.read_text(encoding="utf-8") for each in PAGES]
    found += [f"no table says {said}" for said in unbacked(text, pages)]
    for what in found:
        print(f"{page.name}: {what}", file=sys.stderr)
    return bool(found)


def _write(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    new = written(text, FOLDER)
    if new != text:
        replace_file(page, lambda temporary: temporary.write_text(new, encoding="utf-8"))
    for name in stale(text, FOLDER):
        draw(name, FOLDER)


def train(data: Path, work: Path, only: list[str]) -> list[str]:
    """Runs the studies named, in `work`, where links lead to the data; returns those without data."""
    work.mkdir(parents=True, exist_ok=True)
    for folder in filter(Path.is_dir, data.iterdir()):
        if not (work / folder.name).exists():
            (work / folder.name).symlink_to(folder, target_is_directory=True)
    before = Path.cwd()
    os.chdir(work)  # rows name their data by the folder's name alone
    try:
        return [name for name in only if not _run(name, data)]
    finally:
        os.chdir(before)


def _run(name: str, data: Path) -> bool:
    """Whether the study had its data; it has then run."""
    if name in TRAIN:
        run_train(name, Path())
        return True
    study = next((each for each in STUDIES if each.name == name), None)
    needs = "e2e" if study is None else study.needs
    try:
        if study is not None and study.make and not Path(needs).exists():
            study.make(Path(), Path(needs))
        if not Path(needs).is_dir():
            raise FileNotFoundError(f"{data}: no folder {needs}")
    except FileNotFoundError as error:
        print(f"{name}: left out: {error}", file=sys.stderr)
        return False
    if study is None:
        run_e2e(Path())
    else:
        study.run()
    return True


if __name__ == "__main__":
    raise SystemExit(main())
