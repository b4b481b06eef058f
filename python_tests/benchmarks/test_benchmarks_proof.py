"""The GPU proof on a machine without one: every stage in a tiny size, and what survives a crash, a hang, an absence."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from suite_size import NIGHTLY

pytest.importorskip("transformers")

from adamix_kernels.commands import bench
from benchmarks.measure import record
from benchmarks.proof import __main__ as proof
from benchmarks.proof import report as proof_report
from benchmarks.proof import stages as proof_stages
from benchmarks.proof.run import FAILED, NOT_RUN, PASSED, TIMED_OUT, Stage, run_together
from benchmarks.proof.stages import groups, read_sanitizer
from benchmarks.proof.tests import TESTS, absent_stage, count_tests, missing_imports, read_tests, stage_of_tests

ROOT = Path(__file__).parents[2]
CRASHING = """
import os, sys, time
sys.path.insert(0, {root!r})
import argparse
from benchmarks.measure.ledger import Item, Ledger
p = argparse.ArgumentParser()
p.add_argument("--out"); p.add_argument("--resume", action="store_true"); p.add_argument("--seconds", type=float)
o = p.parse_args()
ledger = Ledger(o.out, resume=o.resume)
for name, what in (("a", "fine"), ("b", "crash"), ("c", "fine"), ("d", "hang"), ("e", "fine")):
    with ledger.item(Item("op", name, "1", "float32")) as rows:
        if rows is None:
            continue
        if what == "crash":
            os.kill(os.getpid(), 11)
        if what == "hang":
            time.sleep(600)
        rows.append(Item("op", name, "1", "float32").row("time_p50", "us", 1.0))
"""


def run_stages(stages, folder, factor=1.0):
    results = []
    run_together(stages, factor, folder, ROOT, results.append, lambda: None)
    return {r.name: r for r in results}


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.nightly
def test_smoke_runs_every_stage(tmp_path, capsys):
    started = time.monotonic()
    # One benchmark of ops stands for the others, which test_benchmarks_ops.py runs; the night takes all.
    skip = () if NIGHTLY else ("routed_lora", "consistency")
    options = ["--skip", *skip] if skip else []
    assert proof.main(["--smoke", "--out", str(tmp_path), *options]) == 0, capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "report.md", "results.csv", "results.json"]
    summary = json.loads((tmp_path / "results.json").read_text())
    outcome = {s["name"]: s["outcome"] for s in summary["stages"]}
    ops = {"routed_adapter", "routed_lora", "consistency", "merge"}
    assert ops & set(outcome) == ops - set(skip)
    timed = {*ops, "steps/tiny+tiny-gpt2", "inference", "mixtures"} - set(skip)
    assert {name for name, what in outcome.items() if what == PASSED} >= {"environment", *timed}
    if not torch.cuda.is_available():
        assert {n for n, what in outcome.items() if what == NOT_RUN} >= {"build", "check", "tune", "sanitizer/memcheck"}
    rows = record.read(tmp_path / "results.csv")
    assert not {(r.op, r.backend, r.note) for r in rows if r.metric in ("failed", "refused", "launches_failed")}
    done = {(r.op.partition("/")[0], r.backend) for r in rows if r.metric == "timed"}
    assert done >= {
        ("routed_adapter", "reference"),
        ("routed_adapter", "compile_gathered_bmm"),
        ("merge_banks", "baddbmm"),
    }
    steps = {r.op for r in rows if r.metric == "time_p50" and r.op.startswith(("step/", "inference/"))}
    assert steps >= {"step/adamix/eager", "step/adamix/compile", "step/plain_adapter/eager", "step/original/eager"}
    assert steps >= {"inference/base", "inference/merged_lora", "inference/merged_adapter"}
    timed_rows = {(r.op, r.backend) for r in rows if r.metric == "time_p50"}
    assert timed_rows >= {("mixture/both", "reference"), ("decode/base", "torch"), ("decode/MoLA top-2", "reference")}
    # Tiny sizes meet and miss no goal.
    assert {goal["state"] for goal in summary["goals"]} == {"not measured"}
    report = (tmp_path / "report.md").read_text()
    assert "smoke run" in report
    assert "| 6.4.1 |" in report
    assert "Absent: " in report
    assert summary["seconds"] <= time.monotonic() - started


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert proof.main(["--out", str(tmp_path / "out")]) == proof.NO_GPU == 3
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_crash_and_a_hang_cost_one_contender_each(tmp_path):
    path = tmp_path / "rows.csv"
    code = CRASHING.format(root=str(ROOT))
    stage = Stage("bench", python(code), 120, paced=True, csv=path, item_seconds=3.0)
    result = run_stages([stage], tmp_path)["bench"]
    assert result.outcome == PASSED, result
    assert "went on after a contender ended it" in result.note
    assert "longer than 3 s" in result.note
    found = {r.backend: r.metric for r in record.read(path) if r.metric in ("timed", "failed")}
    assert found == {"a": "timed", "b": "failed", "c": "timed", "d": "failed", "e": "timed"}
    assert proof_report.count_outcomes(path) == "3 timed, 2 failed"


def test_outcomes_of_plain_stages(tmp_path):
    stages = [
        Stage("fine", python("print('yes')")),
        Stage("bad", python("import sys; print('the reason'); sys.exit(7)")),
        Stage("slow", python("import time; print('so far', flush=True); time.sleep(60)"), 1.5),
        Stage("nothing", python("import sys; print('no GPU'); sys.exit(2)"), skips=(2,)),
        Stage("missing", absent="not installed"),
    ]
    began = time.monotonic()
    results = run_stages(stages, tmp_path)
    assert time.monotonic() - began < 30
    want = dict(fine=PASSED, bad=FAILED, slow=TIMED_OUT, nothing=NOT_RUN, missing=NOT_RUN)
    assert {name: r.outcome for name, r in results.items()} == want
    assert results["bad"].note == "exit status 7: the reason"
    assert results["nothing"].note == "no GPU"
    assert "so far" in results["slow"].output


def test_a_stage_that_ends_takes_its_children_along(tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    run_stages([Stage("parent", python(code), 2.0)], tmp_path)
    number = int(child.read_text())
    for _ in range(50):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {number} is still there")


def test_a_spent_budget_is_told(tmp_path, monkeypatch, capsys):
    stages = [[Stage("first", python("import time; time.sleep(1.5)"), 1)], [Stage("second", python(""), 1)]]
    monkeypatch.setattr(proof, "groups", lambda *a, **k: list(stages))
    assert proof.main(["--smoke", "--out", str(tmp_path), "--budget", "1"]) == 1
    outcome = {s["name"]: s["outcome"] for s in json.loads((tmp_path / "results.json").read_text())["stages"]}
    assert outcome == {"first": TIMED_OUT, "second": TIMED_OUT}
    assert "| second | timed out |" in (tmp_path / "report.md").read_text()


def test_the_stages_of_a_gpu_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(proof_stages.shutil, "which", lambda name: f"/cuda/bin/{name}")
    made = groups(tmp_path, tmp_path, smoke=False)
    names = [[stage.name for stage in group] for group in made]
    flat = [name for group in names for name in group]
    assert len(set(flat)) == len(flat)
    order = [flat.index(name) for name in ("tests/triton", "routed_adapter", "steps/bert-base", "tune")]
    assert order == sorted(order)
    assert {
        "sanitizer/memcheck",
        "sanitizer/racecheck",
        "sanitizer/initcheck",
        "inference",
        "mixtures",
        "build",
    } <= set(flat)
    assert {"steps/bert-base", "steps/roberta-large", "steps/gpt2-medium"} <= set(flat)
    stages = {stage.name: stage for group in made for stage in group}
    assert stages["tests/triton"].environment["TRITON_INTERPRET"] == ""
    assert "--size=gpu" in stages["merge"].command
    assert "--check-only" in stages["check/merge"].command
    assert "--check-only" in stages["check/predicted0"].command
    assert stages["mixtures"].command[-2:] == ["mixtures", "--size=gpu"]
    assert stages["sanitizer/memcheck"].command[0].endswith("compute-sanitizer")
    # Groups run one after the other, their stages side by side.
    assert sum(max(s.seconds for s in group) for group in made) <= 900
    assert not {s.name for g in groups(tmp_path, tmp_path, smoke=False, skip=["tests", "tune"]) for s in g} & {
        "tests/triton",
        "tune",
    }


def test_counts_of_tests_come_from_cut_off_output():
    output = """
python_tests/test_a.py::test_one PASSED                                   [ 20%]
python_tests/test_a.py::test_two[x-1] SKIPPED (needs two GPUs)            [ 40%]
[gw1] [ 60%] PASSED python_tests/test_a.py::test_three[a b]
python_tests/test_a.py::test_four FAILED                                  [ 80%]
=========================== short test summary info ============================
FAILED python_tests/test_a.py::test_four - AssertionError: PASSED is no number
python_tests/test_a.py::test_five"""
    assert count_tests(output) == {"PASSED": 2, "SKIPPED": 1, "FAILED": 1}
    passed, note = read_tests(1, output)
    assert not passed
    assert note.startswith("2 passed, 1 skipped, 1 failed; first: python_tests/test_a.py::test_four")


def test_missing_packages_are_found_before_they_are_imported(tmp_path, monkeypatch):
    (tmp_path / "helper.py").write_text("import no_such_package_a\nfrom no_such_package_b.deep import thing\n")
    test = tmp_path / "test_x.py"
    test.write_text("import os\nimport torch\nfrom helper import thing\nfrom adamix_kernels import adapt\n")
    assert missing_imports(test) == ["no_such_package_a", "no_such_package_b"]
    stage = absent_stage(test, missing_imports(test))
    assert (stage.name, stage.absent) == ("tests/x", "not installed: no_such_package_a, no_such_package_b")
    for path in sorted(TESTS.rglob("test_triton_*.py")):
        assert set(missing_imports(path)) <= {"triton"}


def test_the_packages_that_every_test_needs_are_named(tmp_path, monkeypatch):
    test = tmp_path / "test_x.py"
    test.write_text("def test_plain():\n    pass\n")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "hypothesis" else real(n))
    assert stage_of_tests("tests/x", [test], 60, 1.0).absent == "not installed: hypothesis"


@pytest.mark.parametrize(("status", "lines", "passed"), [
    (0, ["12 calls", "========= ERROR SUMMARY: 0 errors"], True),
    (9, ["========= Invalid __global__ read of size 4 bytes", "12 calls", "========= ERROR SUMMARY: 3 errors"], False),
    (0, ["========= ERROR SUMMARY: 0 errors"], False),
])  # fmt: skip
def test_what_compute_sanitizer_says(status, lines, passed):
    found, note = read_sanitizer(status, "\n".join(lines))
    assert found is passed
    assert "SUMMARY" in note
    assert ("Invalid __global__ read" in note) == (status == 9)


def test_bench_gpu_proof_runs_the_proof(monkeypatch):
    ran = []
    done = type("Done", (), {"returncode": 3})
    monkeypatch.setattr(bench.subprocess, "run", lambda command, cwd: ran.append(command) or done)
    assert bench.main(["gpu-proof", "--budget", "60"]) == 3
    assert bench.main(["goals"]) == 3
    assert ran[0][1:] == ["-m", "benchmarks.proof", "--budget", "60"]
    assert ran[1][1:] == ["-m", "benchmarks.measure.goals"]
