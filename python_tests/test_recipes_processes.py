"""`adamix recipe run` in a launch of two processes: one row a run, one table, one run on both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_recipes

from adamix_kernels.recipes import read_rows

pytest.importorskip("sklearn")

HERE = Path(__file__).resolve().parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH += ["-m", "adamix_kernels"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(recipe, results file, run(*flags) -> its stdout) of a launch of two processes."""
    folder = tmp_path_factory.mktemp("two")
    recipe = tiny_recipes.tiny_recipe(folder, select="best", evaluations=["merged"])
    file = folder / "tiny.json"
    file.write_text(json.dumps(recipe.to_dict()))
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    (folder / "scratch").mkdir()
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["TMPDIR"] = str(folder / "scratch")

    def run(*flags):
        command = [*LAUNCH, "recipe", "run", str(file), "--results", str(folder / "rows.jsonl"), *flags]
        with (folder / "out").open("w") as out, (folder / "log").open("w") as log:
            process = subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=log)
            try:
                status = process.wait(300)
            finally:
                process.terminate()  # its workers too, which a kill would leave behind
                process.wait()
        assert status == 0, (folder / "log").read_text()[-4000:]
        return (folder / "out").read_text()

    return recipe, folder / "rows.jsonl", run


def test_each_row_once_and_one_table(launched):
    _, path, run = launched
    out = run("--methods", "head", "adamix", "--seeds", "1")
    rows = read_rows(path)
    assert [row["method"] for row in rows] == ["head", "adamix"]
    assert len(path.read_text().splitlines()) == 2
    assert out.count("| method") == out.count(f"rows: {path}") == 1
    # Twelve rows, six to a process at once: one step instead of two.
    assert all((row["steps"], row["processes"], row["train_rows"]) == (1, 2, 12) for row in rows)
    assert all(len(row["history"]["step"]) == 1 for row in rows)
    assert not list((path.parent / "scratch").glob("adamix_recipe_*"))
    # Finished: nothing is run or written again, and one more method is added to both processes.
    out = run("--methods", "head", "adamix", "bitfit", "--seeds", "1", "--disable-tqdm")
    again = read_rows(path)
    assert again[:2] == rows
    assert [row["method"] for row in again[2:]] == ["bitfit"]
    assert out.count("| method") == 1


def test_a_run_of_one_process_is_another_run(launched):
    from adamix_kernels.recipes import Limits, expand_methods, run_recipe

    recipe, path, _ = launched
    before = read_rows(path)
    (row,) = run_recipe(recipe, expand_methods(["head"], recipe), range(1), path, limits=Limits())
    assert (row["processes"], row["steps"]) == (1, 2)
    assert row["key"] not in {other["key"] for other in before}
