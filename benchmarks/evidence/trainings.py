"""docs/evidence's trainings by other commands than `adamix recipe`: `adamix train`, and the example on E2E's texts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from adamix_kernels.commands._report import REPORT_NAME
from adamix_kernels.recipes import append_row, read_rows
from adamix_kernels.recipes.commits import commit
from adamix_kernels.recipes.runner import versions

from .studies import FOLDER, ROOT

E2E = "e2e_from_scratch"
E2E_METHODS = ("lora", "adamix", "adamix:consistency_weight=1")
_HELD_BACK = "--data adamix_kernels/tasks/data/remarks_train.tsv --dev_fraction 0.33"
_ONCE = "--seed 0 --save_strategy no --eval_strategy no"
TRAIN = {
    "train_defaults": [f"--seed {seed}" for seed in (42, 0, 1)],
    "train_search": [
        f"{_HELD_BACK} --learning_rate {rate} --num_train_epochs {epochs} {_ONCE}"
        for rate, epochs in ((1e-3, 10), (3e-3, 10), (1e-2, 10), (3e-3, 20))
    ],
}


def run_e2e(work: Path) -> None:
    """examples/e2e_from_scratch.py on work/e2e; the rows that docs/evidence has are not trained again."""
    rows = FOLDER / f"{E2E}.jsonl"
    if len(read_rows(rows)) >= 3 * len(E2E_METHODS):
        return
    out = work / "e2e_out"
    out.mkdir(exist_ok=True)
    if rows.is_file():
        shutil.copy(rows, out / "results.jsonl")
    command = [sys.executable, str(ROOT / "examples" / "e2e_from_scratch.py"), "--data", "e2e", "--out", "e2e_out"]
    subprocess.run([*command, "--epochs", "2", "--seeds", "3", "--methods", *E2E_METHODS], cwd=work, check=True)
    shutil.copy(out / "results.jsonl", rows)


def run_train(name: str, work: Path) -> None:
    """`adamix train` with each of TRAIN's options that NAME.jsonl has no row of, started in the checkout."""
    rows = FOLDER / f"{name}.jsonl"
    done = {row["options"] for row in read_rows(rows)}
    for number, options in enumerate(TRAIN[name]):
        if options in done:
            continue
        out = (work / f"{name}_{number}").resolve()
        start = time.perf_counter()
        command = [sys.executable, "-m", "adamix_kernels", "train", *options.split(), "--out", str(out)]
        subprocess.run(command, cwd=ROOT, check=True)
        report = json.loads((out / REPORT_NAME).read_text(encoding="utf-8"))
        row = {"options": options, "scores": report["scores"], "baselines": report["baselines"]}
        row |= {"commit": commit(), "versions": versions(), "seconds": round(time.perf_counter() - start, 2)}
        append_row(rows, row)
