"""A figure, and the file of figures that one run of a part leaves."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from adamix_kernels.models._files import write_json
from benchmarks.measure.record import commit

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "transformers", "hypothesis")


@dataclass(frozen=True)
class Figure:
    """One line of the report.

    about: what was done ("routed_lora, reference, cases drawn"). value: what came out, with its unit ("5,000 cases").
    expected: what had to come out. passed: whether it did. seconds: how long it took, 0 where nobody measured.
    """

    about: str
    value: str
    expected: str
    passed: bool
    seconds: float = 0.0


@dataclass(frozen=True)
class Record:
    """All figures of one run of a part, and what it ran on."""

    part: str
    size: str
    command: str
    commit: str
    date: str
    versions: dict[str, str]
    figures: tuple[Figure, ...]


def record(part: str, size: str, figures: Iterable[Figure]) -> Record:
    today = datetime.date.today().isoformat()
    return Record(
        part, size, _command(part, size), commit(RESULTS) or "not under git", today, _versions(), tuple(figures)
    )


def write(result: Record, folder: Path = RESULTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.part}.json"
    write_json(path, asdict(result))
    return path


def read(path: Path) -> Record:
    values = json.loads(path.read_text(encoding="utf-8"))
    return Record(**{**values, "figures": tuple(Figure(**figure) for figure in values["figures"])})


def _command(part: str, size: str) -> str:
    return f"python -m reliability run {part}" + ("" if size == "full" else f" --size {size}")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
