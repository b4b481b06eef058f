"""`adamix recipe run` in a launch of two processes: one row a run, one table, one run on both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_recipes

from adamix_kernels.recipes import Limits, expand_methods, read_rows, run_recipe
from adamix_kernels.recipes.results import append_row, row_key
from adamix_kernels.recipes.runner import run_identity

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH += ["-m", "adamix_kernels"]


@pytest.mark.nightly
def test_each_row_once_and_one_table(tmp_path, monkeypatch):
    """Both processes train together, each run once; a finished one is left alone by both."""
    recipe = tiny_recipes.tiny_recipe(tmp_path, select="best", evaluations=["merged"])
    del recipe.training["use_cpu"]  # said by the launch itself, without a GPU
    file, results, scratch = tmp_path / "tiny.json", tmp_path / "rows.jsonl", tmp_path / "scratch"
    file.write_text(json.dumps(recipe.to_dict()))
    scratch.mkdir()
    single = {m: row_key(run_identity(recipe, m, 0, Limits())) for m in expand_methods(["full", "head"], recipe)}
    monkeypatch.setenv("WORLD_SIZE", "2")
    finished, absent = (row_key(run_identity(recipe, m, 0, Limits())) for m in single)
    monkeypatch.delenv("WORLD_SIZE")
    assert not {finished, absent} & set(single.values())  # of a batch twice as large: other runs
    (alone,) = run_recipe(recipe, expand_methods(["full"], recipe), range(1), tmp_path / "alone.jsonl")
    assert (alone["key"], alone["processes"], alone["steps"]) == (next(iter(single.values())), 1, 2)
    old = {**alone, "key": finished, "processes": 2}
    append_row(results, old)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*LAUNCH, "recipe", "run", str(file), "--results", str(results), "--methods", "head", "adamix", "full"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--seeds", "1"], env={**env, "TMPDIR": str(scratch)}, cwd=tmp_path, stdout=out, stderr=log
        )
        try:
            status = process.wait(300)
        finally:
            process.terminate()  # its workers too, which a kill would leave behind
            process.wait()
    assert status == 0, (tmp_path / "log").read_text()[-4000:]
    printed = (tmp_path / "out").read_text()
    assert printed.count("| method") == printed.count(f"rows: {results}") == 1
    rows = read_rows(results)
    assert len(results.read_text().splitlines()) == 3
    assert [row["method"] for row in rows] == ["full", "head", "adamix"]
    assert rows[0] == old
    assert rows[1]["key"] == absent
    # Twelve rows, six to a process at once: one step instead of two.
    assert all((row["steps"], row["processes"], row["train_rows"]) == (1, 2, 12) for row in rows[1:])
    assert all(len(row["history"]["step"]) == 1 for row in rows[1:])
    assert not list(scratch.glob("adamix_recipe_*"))
