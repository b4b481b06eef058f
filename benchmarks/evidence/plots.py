"""The bar plots of docs/evidence, each NAME.png of a page made from NAME.jsonl, whose digest the picture carries."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from adamix_kernels.models._files import replace_file
from adamix_kernels.recipes import read_rows
from adamix_kernels.recipes.summary import group_rows, methods_figure
from adamix_kernels.reports.figures import pyplot

PICTURE = re.compile(r"!\[[^\]]*\]\((\w+)\.png\)")


def stale(text: str, folder: Path) -> list[str]:
    """Names of a page's pictures that are missing or made from other rows; pictures of no rows are not looked at."""
    names = [name for name in dict.fromkeys(PICTURE.findall(text)) if _rows(folder, name).is_file()]
    return [name for name in names if not _fresh(folder, name)]


def draw(name: str, folder: Path) -> Path:
    """Writes NAME.png from NAME.jsonl. Raises ValueError where the rows are not of one comparison."""
    groups = group_rows(read_rows(_rows(folder, name)))
    if len(groups) != 1:
        raise ValueError(f"plot: got rows of {len(groups)} comparisons in {name!r}, expected one")
    figure, path = methods_figure(groups[0]), folder / f"{name}.png"
    metadata = {"rows": _digest(folder, name)}
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130, metadata=metadata))
    pyplot().close(figure)
    return path


def _fresh(folder: Path, name: str) -> bool:
    picture = folder / f"{name}.png"
    return picture.is_file() and _digest(folder, name).encode() in picture.read_bytes()


def _digest(folder: Path, name: str) -> str:
    return hashlib.sha256(_rows(folder, name).read_bytes()).hexdigest()


def _rows(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"
