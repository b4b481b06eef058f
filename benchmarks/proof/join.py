"""The parts of a proof, which ran one after the other, as one: rows, stages, logs and the report over all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..measure import record
from ..measure.goals import Verdict
from ..measure.ledger import OUTCOMES
from ..measure.record import Row
from . import report
from .run import Result

# Facts that must be alike, or the parts are of two machines.
_ALIKE = ("device", "torch", "triton", "driver", "commit", "smoke")


def join(folders: Sequence[Path], out: Path) -> list[Verdict]:
    """Writes `out`; ValueError for parts of different machines or commits."""
    parts = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    for name in _ALIKE:
        values = {part[name] for part in parts}
        if len(values) > 1:
            raise ValueError(f"--join: got parts whose {name} differs ({', '.join(map(str, values))}), expected one")
    rows = joined([record.read(folder / "results.csv") for folder in folders])
    stages = {stage["name"]: Result(**stage) for part in parts for stage in part["stages"]}
    facts = {key: value for key, value in parts[0].items() if key not in ("stages", "goals", "smoke")}
    facts |= {name: sum(part[name] for part in parts) for name in ("seconds", "budget")}
    facts["environment"] = next((part["environment"] for part in parts if part["environment"]), "")
    logs = [folder / "log.txt" for folder in folders if (folder / "log.txt").exists()]
    text = "".join(log.read_text(encoding="utf-8") for log in logs)
    verdicts = report.write(out, rows, list(stages.values()), facts, smoke=parts[0]["smoke"])
    record.write_text(out / "log.txt", text)
    for name in ("verify.json", "tune.json"):
        last = next((folder / name for folder in reversed(folders) if (folder / name).exists()), None)
        if last is not None and last.resolve() != (out / name).resolve():
            shutil.copyfile(last, out / name)
    return verdicts


def joined(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """All rows, in the parts' order; of one item that two parts have, those of the later one, if it was not absent."""
    found: dict[tuple[str, ...], Row] = {}
    for rows in parts:
        for row in rows:
            metric = "outcome" if row.metric in OUTCOMES else row.metric
            key = row.op, row.backend, row.shape, row.dtype, metric
            if not (row.metric == "absent" and key in found):
                found[key] = row
    return list(found.values())
