"""The GPU proof's parts: what each holds, how they become one, and the tools that need a GPU, read without one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.count import beside as count_beside
from benchmarks.count import table as count_table
from benchmarks.measure import clock, record
from benchmarks.measure.goals import evaluate, gpu_of
from benchmarks.ops import predicted
from benchmarks.proof import __main__ as proof
from benchmarks.proof import build as proof_build
from benchmarks.proof import join as proof_join
from benchmarks.proof import ncu as proof_ncu
from benchmarks.proof import race as proof_race
from benchmarks.proof import stages as proof_stages
from benchmarks.proof import verify as proof_verify
from benchmarks.proof.run import FAILED, Stage, run_together
from benchmarks.proof.stages import groups

ROOT = Path(__file__).parents[2]


def row(op, backend, metric, value, *, shape="s", dtype="bfloat16", **changed) -> record.Row:
    usual = dict(
        op=op, backend=backend, shape=shape, dtype=dtype, metric=metric, unit="", value=value, note="",
        gpu_name="NVIDIA H200", torch="2.11.0", triton="3.6.0", driver="1", commit="abc", date="2026-01-01T00:00Z",
        cpu_name="",
    )  # fmt: skip
    return record.Row(**usual | changed)


def names(made) -> list[str]:
    return [stage.name for group in made for stage in group]


def longest(made) -> float:
    return sum(max(stage.seconds for stage in group) for group in made)


def test_two_parts_are_the_whole_and_fit_what_a_machine_is_lent_for(tmp_path, monkeypatch):
    monkeypatch.setattr(proof_stages.shutil, "which", lambda name: f"/cuda/bin/{name}")
    monkeypatch.setattr(proof_ncu, "find", lambda: "/cuda/bin/ncu")
    monkeypatch.setattr(proof_stages._build, "obstacle", lambda: None)
    first, second = (groups(tmp_path, tmp_path, smoke=False, part=part, before="b") for part in proof_stages.PARTS)
    whole = groups(tmp_path, tmp_path, smoke=False, before="b")
    assert names(first) + names(second)[1:] + ["tune"] == names(whole)
    # Where nothing was carried along, the second machine builds as well.
    assert [group[0].name for group in (first[0], second[0])] == ["build", "build"]
    assert first[0][0].whole
    budgets = proof._BUDGETS
    assert longest(first) <= 1.1 * budgets[1]
    assert longest(second[1:]) <= 1.15 * budgets[2]
    assert budgets[1] + budgets[2] <= 900 - 150  # its start, the transfers, and what is between two calls
    stages = {stage.name: stage for group in whole for stage in group}
    assert stages["race/before"].command[-1] == "--package=b"
    assert stages["verify"].paced
    assert stages["verify"].okay == (0, 3)
    # No model that a benchmark or a test builds starts a verification of its own, inside somebody's time.
    for name in ("predicted", "check/merge", "tests/cuda", "steps/bert-base", "sanitizer/memcheck", "inference"):
        assert stages[name].environment["ADAMIX_AUTO"] == "table", name
    assert stages["steps/bert-base"].command[-4:-1] == ["--modes", "eager", "graph"]
    # Every file of kernels' tests is in one of the two, but those of the kernels on the CPU.
    files = {path.name for path in (ROOT / "python_tests").rglob("test_*.py")}
    given = {Path(word).name for name in ("tests/cuda", "tests/triton") for word in stages[name].command}
    wanted = {name for name in files if name.startswith(("test_cuda_", "test_triton_"))}
    assert wanted <= given
    assert "test_csrc_host.py" not in given


def test_a_stage_that_does_not_start_and_one_that_cannot_be_read_cost_nobody_else(tmp_path):
    results = []

    def unreadable(status, output):
        raise KeyError("no such line")

    stages = [
        Stage("gone", ["/no/such/program"]),
        Stage("odd", [sys.executable, "-c", ""], read=unreadable),
        Stage("fine", [sys.executable, "-c", ""]),
    ]
    run_together(stages, 1.0, tmp_path, ROOT, results.append, lambda: None)
    found = {r.name: r.outcome for r in results}
    assert found == {"gone": FAILED, "odd": FAILED, "fine": "passed"}
    assert "no such line" in next(r.note for r in results if r.name == "odd")


def test_a_time_that_others_lack_is_kept_whole(tmp_path):
    results = []
    code = [sys.executable, "-c", "import time; time.sleep(1.6)"]
    run_together(
        [Stage("whole", code, 60.0, whole=True), Stage("part", code, 60.0)], 0.01, tmp_path, ROOT, results.append,
        lambda: None,
    )  # fmt: skip
    assert {r.name: r.outcome for r in results} == {"whole": "passed", "part": "timed out"}


def test_a_report_that_cannot_be_made_costs_no_row_and_no_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(proof.record, "environment", lambda: dict.fromkeys(
        ("gpu_name", "cpu_name", "torch", "triton", "driver", "commit", "date"), "x"))  # fmt: skip
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from benchmarks.measure import clock, record
out = sys.argv[1].partition("=")[2]
record.write(out, [record.row("op", "triton", "s", "float32", "time_p50", "us", 1.0)])
"""
    made = lambda folder, out, **_: [  # noqa: E731
        [Stage("one", [sys.executable, "-c", code], csv=folder / "one.csv")],
        [Stage("two", [sys.executable, "-c", "print('ran')"])],
    ]
    monkeypatch.setattr(proof, "groups", made)
    monkeypatch.setattr(proof.proof_report, "report", lambda *a, **k: 1 / 0)
    assert proof.main(["--part", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "not written: ZeroDivisionError" in said
    assert "two: passed" in said
    assert [r.op for r in record.read(tmp_path / "results.csv")] == ["op"]


def part(folder: Path, rows, stages, **changed) -> Path:
    folder.mkdir()
    record.write(folder / "results.csv", rows)
    facts = dict(
        device="NVIDIA H200", torch="2", triton="3", driver="1", commit="abc", date="d", seconds=300.0, budget=400.0,
        environment="", smoke=False, goals=[],
        stages=[dict(name=name, outcome=outcome, seconds=1.0, note="") for name, outcome in stages],
    )  # fmt: skip
    (folder / "results.json").write_text(json.dumps(facts | changed))
    (folder / "log.txt").write_text(f"== {folder.name}\n")
    return folder


def test_parts_become_one(tmp_path, capsys):
    share = row("merge_banks/forward", "triton", "copy_share", 0.7)
    lost = row("merge_banks", "formula", "absent", 1.0, note="the time for this benchmark was used up")
    first = part(
        tmp_path / "a", [share, row("merge_banks", "formula", "timed", 1.0)], [("build", "passed"), ("tests", "failed")]
    )
    second = part(
        tmp_path / "b", [row("merge_banks/forward", "triton", "copy_share", 0.8), lost], [("build", "passed")]
    )
    (first / "verify.json").write_text("{}")
    out = tmp_path / "whole"
    assert proof.main(["--join", str(first), str(second), "--out", str(out)]) == 0
    found = {(r.backend, r.metric): r.value for r in record.read(out / "results.csv")}
    # What ran out of time later was measured before.
    assert found == {("triton", "copy_share"): 0.8, ("formula", "timed"): 1.0}
    summary = json.loads((out / "results.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["build", "tests"]
    assert (summary["seconds"], summary["budget"]) == (600.0, 800.0)
    assert (out / "log.txt").read_text() == "== a\n== b\n"
    assert (out / "verify.json").exists()
    assert "| tests | failed |" in (out / "report.md").read_text()
    other = part(tmp_path / "c", [], [], commit="other")
    with pytest.raises(ValueError, match=r"commit differs \((abc, other|other, abc)\)"):
        proof_join.join([first, other], out)


def test_goals_are_of_one_gpu_and_one_dtype():
    shape = "16x512x1024 r16 M4 sample"
    timed = [("triton", "bfloat16", 10.0), ("compile_gathered_bmm", "bfloat16", 30.0), ("triton", "float32", 20.0)]
    for gpu in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        rows = [
            row("routed_adapter/both", backend, "time_p50", value, shape=shape, dtype=dtype, gpu_name=gpu)
            for backend, dtype, value in timed
        ]
        (found,) = [v for v in evaluate(rows) if v.goal.id == "3.9.3"]
        assert found.value == 3.0, gpu
    assert gpu_of([row("x", "y", "z", 1.0, gpu_name="NVIDIA GH200 480GB")]) == ""
    assert gpu_of([row("x", "y", "z", 1.0, gpu_name=name) for name in ("NVIDIA H100", "NVIDIA H200")]) == "H200"


NCU = """==PROF== Connected to process 12 (/usr/bin/python3.12)
==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 1 pass
"ID","Process ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum","smsp__inst_executed.sum"
"","","","byte","byte","ns","inst"
"0","12","spin_kernel(long)","1","1","1","1"
"1","12","void adamix::routed_adapter_resident_forward_kernel<bfloat16, 2, 4, 1>(P)","134,000,000","134,000,000","70,000","20,000,000"
"2","12","spin_kernel(long)","1","1","1","1"
"3","12","void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)","5","5","5","5"
"4","12","adapter_forward_kernel","134000000","150000000","90000","20000000"
"5","12","adapter_other_kernel","1000000","0","10000","1000"
==PROF== Disconnected
"""  # noqa: E501


def test_what_the_profiler_wrote_stands_beside_the_counts():
    given = list(proof_ncu.calls())
    assert len(given) == 2 * len(proof_ncu.CALLS)
    counted = {(r.op, r.backend, r.shape, r.dtype) for r in count_table.committed() if r.target == 90}
    assert {(w.op, backend, w.case.shape, w.dtype) for w, backend in given} <= counted
    found = {(r.op, r.backend, r.metric): r for r in proof_ncu.counted(NCU, given)}
    op = "routed_adapter/forward"
    assert found[op, "cuda", "instructions"].value == 20e6
    assert found[op, "triton", "instructions"].value == 20e6 + 1000
    assert found[op, "triton", "dram_read"].value == 135e6
    assert found[op, "triton", "ncu_time"].note == "adapter_forward_kernel+adapter_other_kernel"
    assert {key[0] for key in found} == {op}
    rows = [record.Row(**{**vars(r), "gpu_name": "NVIDIA H200"}) for r in found.values()]
    lines = count_beside.counts(rows, count_table.committed())
    assert len(lines) == 2 + 4
    assert all(("over 10%" in line) == (abs(float(line.split("|")[-2].split("%")[0])) > 10) for line in lines[2:])
    assert count_beside.counts([], count_table.committed()) == []
    assert proof_ncu.counted("==ERROR== ERR_NVGPUCTRPERM", given) == []
    command = proof_ncu.command("ncu", Path("log"))
    assert command[command.index("--clock-control") + 1] == "none"
    assert proof_ncu.command("ncu", Path("log"), 40.0)[-2:] == ["--program", "--seconds=20"]


def test_a_profiler_that_takes_too_long_is_ended_with_its_child(tmp_path):
    inner = "import sys, time; open(sys.argv[1], 'w').write('so far'); time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}, sys.argv[1]])"
    code = (
        "import sys; from benchmarks.proof import ncu; "
        f"print('status', ncu.ended([sys.executable, '-c', {outer!r}, sys.argv[1]], 8.0), flush=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    began = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        # It ends only when nobody holds the pipe any more.
        said, _ = process.communicate(timeout=400)
    assert said.split()[-2:] == ["status", "1"]
    assert time.monotonic() - began < 400
    assert (tmp_path / "log").read_text() == "so far"


def test_every_prediction_is_measured():
    made = predicted.jobs(90)
    counted = {(r.op, r.backend, r.shape, r.dtype) for r in count_table.committed() if r.target == 90}
    found = {
        (f"{job.case.op}/{way}", job.backend, job.case.shape, job.item.dtype) for job in made for way in job.directions
    }
    assert found == counted
    assert len({job.item for job in made}) == len(made)
    # The ops take turns: whenever time runs out, each has some.
    assert len({job.folder for job in made[:16]}) == len(predicted.OPS)


@pytest.mark.parametrize("folder", predicted.OPS)
def test_what_is_predicted_is_called_in_every_direction(folder):
    device = torch.device("cpu")
    for case in predicted.OPS[folder].cases("smoke", device):
        ways = ("both",) if folder == "consistency" else tuple(way for way in case.traffic if way != "both")
        job = predicted.Job(folder, case, ways, "reference")
        predicted._check(job, device)
        for way in ways:
            call = predicted._call(job, way, [predicted._inputs(case, device, seed) for seed in (2, 3)])
            first, other, again = (call(k) for k in range(3))
            parts = [x if isinstance(x, (tuple, list)) else [x] for x in (first, other, again)]
            assert all(torch.equal(a, b) for a, b in zip(parts[0], parts[2], strict=True))
            assert not all(torch.equal(a, b) for a, b in zip(parts[0], parts[1], strict=True))


def test_who_was_checked_is_not_checked_again(tmp_path):
    for piece, metric in enumerate(("checked", "refused")):
        rows = [row("a/predicted", "triton", metric, 1.0, shape=str(piece))]
        record.write(tmp_path / f"check_predicted{piece}.csv", rows)
    assert [item.shape for item in predicted.known(tmp_path / "predicted.csv")] == ["0"]


@pytest.mark.parametrize(("status", "line", "passed"), [
    (0, "verified: 84 right, 0 wrong, 0 crashed, 0 unknown", True),
    (3, "verified: 60 right, 0 wrong, 0 crashed, 24 unknown", True),
    (3, "verified: 0 right, 0 wrong, 0 crashed, 84 unknown", False),
    (1, "verified: 83 right, 1 wrong, 0 crashed, 0 unknown: merge triton float32 any is wrong: errs", False),
])  # fmt: skip
def test_what_verify_says(status, line, passed):
    assert proof_verify.read(status, f"a table\n\n{line}\n") == (passed, line.removeprefix("verified: "))


def test_a_verify_that_was_cut_off_says_so():
    assert proof_verify.read(-15, "waiting") == (False, "did not come to its end (exit status -15)")


def test_a_race_is_read():
    lines = [
        "smallest kernel, sum of tile: 12 of 100 calls differ, error 1.0e+00",
        "routed_adapter triton 7x333x1024 r64: 0 of 100 calls differ, error 3.0e-03",
    ]
    passed, words = proof_stages._read_race(0, "\n".join([*lines, "0 backwards race or are wrong"]))
    assert passed
    assert words == f"2 calls repeated, 1 with other bits; {lines[0]}"
    assert proof_stages._read_race(0, "\n".join(lines))[0] is False
    assert proof_stages._read_race(1, "\n".join([*lines, "1 backwards race or are wrong"]))[0] is False
    assert proof_stages._read_before(1, "\n".join([*lines, "1 backwards race or are wrong"]))[0] is True


def test_another_package_is_looked_at_and_no_other_in_its_name(tmp_path, monkeypatch):
    other = tmp_path / "adamix_kernels"
    other.mkdir()
    (other / "__init__.py").write_text("")
    code = (
        "import sys, benchmarks.proof.race as race; assert 'adamix_kernels' not in sys.modules;"
        f"race.of({str(tmp_path)!r}); import adamix_kernels; print(adamix_kernels.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(other / "__init__.py"), done.stderr
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ImportError, match="--package: got adamix_kernels of"):
        proof_race.of(str(tmp_path))


def test_weight_gradients_are_called_again_and_again(monkeypatch, capsys):
    monkeypatch.setattr(proof_race, "SHAPES", ((3, 7, 64, 16, 4),))
    monkeypatch.setattr(proof_race, "REPEATS", 2)
    monkeypatch.setattr(proof_race, "BACKENDS", ("reference", "cuda"))
    found = list(proof_race.backwards(torch.device("cpu")))
    said = capsys.readouterr().out
    assert {(what.split()[1], different) for what, different, _ in found} >= {("reference", 0)}
    assert all(0 < error < proof_race.WRONG for _, _, error in found)
    assert len(found) == 4 or "not run: BackendUnavailableError" in said
    leaf, calls = torch.randn(8), iter(range(9))
    assert proof_race.told(lambda: [leaf + next(calls)], [leaf]) == (2, pytest.approx(2 * 8**0.5 / leaf.norm().item()))


def test_a_gpu_is_warm_before_it_is_timed(monkeypatch):
    said = []

    class Event:
        def record(self):
            said.append("event")

        def elapsed_time(self, other):
            return 2.0  # milliseconds

    class Graph:
        def replay(self):
            said.append("replay")

    monkeypatch.setattr(clock, "_event", Event)
    monkeypatch.setattr(clock, "synchronize", lambda device: said.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(clock, "capture", lambda *_: Graph())
    effort = clock.Effort(0.0, 2, 2, warmup=1)
    with monkeypatch.context() as patched:
        patched.setattr(clock, "warm", lambda device: said.append(f"warm {device.type}"))
        assert clock.eager_seconds(said.append, torch.device("cuda"), effort) == [2e-3, 2e-3]
        # What compiles is neither in the warming nor in the samples, which nothing waits between.
        samples = ["event", 0, "event", "event", 1, "event"]
        assert said == [0, "wait", "warm cuda", 0, "wait", *samples, "wait"]
        said.clear()
        assert clock.graph_seconds(said.append, 4, effort) == [5e-4, 5e-4]
        assert said == ["warm cuda", "replay", "wait", *["event", "replay", "event"] * 2, "wait"]
    monkeypatch.setattr(clock, "_matrices", lambda device: [torch.ones(2, 2)] * 3)
    began = time.perf_counter()
    clock.warm(torch.device("cuda"))
    assert time.perf_counter() - began >= clock.WARM
    said.clear()
    clock.warm(torch.device("cpu"))
    assert said == []


def test_a_library_that_fits_is_not_compiled_again(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(proof_build.build, "main", lambda arguments: ran.append(arguments) or 0)
    monkeypatch.setattr(proof_build._extension, "library_path", lambda: Path("_C.abi3.so"))
    sources = proof_build._build.sources_fingerprint(proof_build._build.source_folder())
    monkeypatch.setattr(proof_build._extension, "record", lambda: {"sources": sources})
    monkeypatch.setattr(proof_build._extension, "problem", lambda: None)
    monkeypatch.setattr(proof_build._node, "find", lambda: (None, None))
    assert proof_build.main() == 0
    assert ran == [["--node"]]
    for name, value in (("record", {"sources": "old"}), ("problem", "built for 80"), ("library_path", None)):
        ran.clear()
        monkeypatch.setattr(proof_build._extension, name, lambda value=value: value)
        assert proof_build.main() == 0
        assert ran == [[]], name
