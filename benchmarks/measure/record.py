"""The one CSV schema of all benchmarks, and the facts about the machine that go with every row."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import importlib.util
import io
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from adamix_kernels.models._files import replace_file

from .. import RESULTS


@dataclass(frozen=True)
class Row:
    """One measured value. What does not apply is empty.

    op: what ran ("step/adamix", "routed_adapter/forward"). backend: who ran it ("reference", "torch", "peft").
    shape: sizes in words. metric: "time_p50", "ratio_p50 to <op>", ... unit: of `value`. driver: of the GPU.
    note: conditions of the run (threads, rounds, load).
    """

    op: str
    backend: str
    shape: str
    dtype: str
    metric: str
    unit: str
    value: float
    gpu_name: str
    torch: str
    triton: str
    driver: str
    commit: str
    date: str
    cpu_name: str
    note: str


COLUMNS = tuple(f.name for f in fields(Row))


@functools.cache
def environment() -> dict[str, str]:
    """The columns that describe this machine and this build."""
    on_gpu = torch.cuda.is_available()
    return {
        "gpu_name": torch.cuda.get_device_name() if on_gpu else "",
        "torch": torch.__version__,
        "triton": version("triton"),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        # A copy of the tree without its history can be told what it is.
        "commit": os.environ.get("ADAMIX_COMMIT") or commit(RESULTS),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "cpu_name": _cpu_name(),
    }


def row(op: str, backend: str, shape: str, dtype: str, metric: str, unit: str, value: float, note: str = "") -> Row:
    """A Row with the columns of `environment()` filled in."""
    return Row(op, backend, shape, dtype, metric, unit, value, **environment(), note=note)


def commit(results: Path) -> str:
    """The commit of the sources beside `results`, with "-dirty" where files outside it differ; "" outside of git."""
    git = "git", "-C", str(results.parent)
    found = _output(*git, "describe", "--always")
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{results.name}")
    return f"{found}-dirty" if changed else found


def version(package: str) -> str:
    """The installed version of `package`, or "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write(path: str | os.PathLike, rows: list[Row]) -> None:
    """Writes `rows` as CSV with a header, whole or not at all; an older file is replaced."""
    write_csv(path, COLUMNS, ({**asdict(r), "value": f"{r.value:.6g}"} for r in rows))


def write_csv(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Writes a table as CSV with a header, whole or not at all; an older file is replaced."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, whole or not at all; an older file is replaced, a missing folder made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda part: part.write_bytes(text.encode("utf-8")))


def has_schema(path: str | os.PathLike) -> bool:
    """Whether a CSV has the columns of the benchmarks, and not those of another table."""
    with open(path, newline="") as file:
        return tuple(next(csv.reader(file), ())) == COLUMNS


def read(path: str | os.PathLike) -> list[Row]:
    """The rows of a CSV that `write` made; ValueError names the columns when the header is another."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: got columns {reader.fieldnames}, expected {list(COLUMNS)}")
        return [Row(**{**line, "value": float(line["value"])}) for line in reader]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
