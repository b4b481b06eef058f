"""The tuner without a GPU: its choice by a clock of the test's, its file read back, its calls interpreted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adamix_kernels.commands import bench
from adamix_kernels.ops import _triton_tables
from adamix_kernels.ops._triton_tables import Config
from benchmarks.tune import __main__ as tune
from benchmarks.tune.__main__ import Trial, fastest, trials, tune_class
from benchmarks.tune.table import VARIABLE, ShapeClass, installed, table, write

ROOT = Path(__file__).parents[2]
A, B, C, D = Config(16, 32, 4, 2), Config(32, 64, 4, 3), Config(64, 64, 8, 2), Config(128, 128, 8, 3)
SHAPE = ShapeClass("adapter_forward_kernel", 2, 16)
SHIPPED = {80: {(2, 16): A, (2, 32): B}}


@pytest.fixture(autouse=True)
def _no_table(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def _made(seconds, wrong=()):
    return trials(seconds, lambda c: "wrong" if c in wrong else None, seconds.__getitem__)


def test_the_fastest_candidate_wins():
    assert fastest(_made({A: 3.0, B: 1.0, C: 2.0})).config == B


def test_a_wrong_candidate_is_neither_timed_nor_chosen():
    timed = []

    def timer(config):
        timed.append(config)
        return {A: 3.0, C: 2.0}[config]

    made = trials([A, B, C], lambda c: "output 0: error 1" if c == B else None, timer)
    assert timed == [A, C]
    assert made[1] == Trial(B, None, "output 0: error 1")
    assert fastest(made).config == C


def test_nothing_is_chosen_when_all_are_wrong():
    made = _made({A: 1.0, B: 2.0}, wrong=(A, B))
    assert fastest(made) is None
    assert "nothing correct; 2 of 2 refused, first: wrong" in tune.report(SHAPE, made, None)


@pytest.mark.parametrize("order", [(A, B, C), (C, A, B), (B, C, A)])
def test_among_equals_the_first_in_order_wins(order):
    seconds = {config: 1.0 + 0.004 * n for n, config in enumerate(reversed(order))}
    assert fastest(_made({config: seconds[config] for config in order})).config == order[0]


def test_a_candidate_outside_the_tie_loses():
    assert fastest(_made({A: 1.02, B: 1.0})).config == B
    assert fastest(_made({A: 1.02, B: 1.0}), tie=0.05).config == A


def test_a_candidate_is_tried_once():
    calls = []
    made = trials([A, B, A], lambda c: calls.append(c), lambda c: 1.0)
    assert calls == [A, B]
    assert len(made) == 2


def test_the_written_file_is_read_back_and_used(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "h200.json"
    chosen = {SHAPE: C, ShapeClass("adapter_forward_kernel", 4, 256): D, ShapeClass("lora_dx_kernel", 2, 16): B}
    write(path, chosen, 90, {"gpu_name": "a GPU", "commit": "abc"})
    assert os.listdir(path.parent) == ["h200.json"]
    raw = json.loads(path.read_text())
    assert raw["about"] == {"gpu_name": "a GPU", "commit": "abc"}
    assert raw["adapter_forward_kernel"] == {"90": {"2x16": list(C), "4x256": list(D)}}
    assert _triton_tables.lookup(SHAPE.kernel, SHIPPED, 90, 2, 16) == A
    monkeypatch.setenv(VARIABLE, str(path))
    assert _triton_tables.lookup(SHAPE.kernel, SHIPPED, 90, 2, 16) == C
    assert _triton_tables.lookup("lora_dx_kernel", SHIPPED, 90, 2, 16) == B
    # Another class, another architecture, another kernel: as shipped.
    assert _triton_tables.lookup(SHAPE.kernel, SHIPPED, 90, 2, 32) == B
    assert _triton_tables.lookup(SHAPE.kernel, SHIPPED, 80, 2, 16) == A
    assert _triton_tables.lookup("adapter_input_grad_kernel", SHIPPED, 90, 2, 16) == A


def test_a_table_is_read_once(tmp_path, monkeypatch):
    path, opened = tmp_path / "table.json", []
    write(path, {SHAPE: C}, 90, {})
    monkeypatch.setenv(VARIABLE, str(path))
    monkeypatch.setattr(_triton_tables.json, "load", lambda file, load=json.load: opened.append(file) or load(file))
    other = {80: {(2, 16): D}}
    for _ in range(3):
        assert _triton_tables.lookup(SHAPE.kernel, SHIPPED, 90, 2, 16) == C
        assert _triton_tables.lookup(SHAPE.kernel, SHIPPED, 80, 2, 16) == A
        assert _triton_tables.lookup(SHAPE.kernel, other, 80, 2, 16) == D
    assert len(opened) == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.json"
    write(path, {SHAPE: A}, 90, {})
    before = path.read_text()
    with pytest.raises(TypeError):
        write(path, {SHAPE: B}, 90, {"gpu_name": object()})
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["table.json"]


def test_the_table_is_in_a_fixed_order():
    chosen = {ShapeClass("b", 2, 16): A, ShapeClass("a", 4, 16): B, ShapeClass("a", 2, 16): C}
    made = json.dumps(table(chosen, 120))
    assert made == json.dumps(table(dict(reversed(chosen.items())), 120))
    assert list(json.loads(made)) == ["a", "b"]


def test_a_candidate_is_installed_for_its_call_alone(monkeypatch, tmp_path):
    mine = tmp_path / "mine.json"
    write(mine, {SHAPE: B}, 90, {})
    monkeypatch.setenv(VARIABLE, str(mine))

    def looked_up():
        return _triton_tables.lookup(SHAPE.kernel, SHIPPED, 90, 2, 16)

    seen = []
    workload = SimpleNamespace(shipped=A, candidates=[C, A, D], problem=lambda: seen.append(looked_up()))
    made = tune_class(workload, SHAPE, 90, lambda w: {A: 2.0, C: 1.0, D: 3.0}[looked_up()])
    assert seen == [A, C, D]
    assert [trial.seconds for trial in made] == [2.0, 1.0, 3.0]
    assert fastest(made).config == C
    assert looked_up() == B
    with pytest.raises(ZeroDivisionError), installed(SHAPE, D, 90):
        1 / (looked_up() != D)
    assert looked_up() == B


def test_report_shows_choice_shipped_and_refused():
    made = _made({A: 4e-5, B: 3e-5, C: 1e-5}, wrong=(C,))
    line = tune.report(SHAPE, made, fastest(made))
    assert line.startswith("adapter_forward_kernel 2x16: (32, 64, 4, 3) 30.0 us; shipped (16, 32, 4, 2) 40.0 us")
    assert line.endswith("1 of 3 refused, first: wrong")


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "table.json"
    assert tune.main(["--out", str(out)]) == 2
    assert not out.exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "CUDA GPU" in lines[0]


@pytest.fixture
def fake_gpu(monkeypatch):
    """A machine whose GPU is a table of seconds: {class: {config: seconds, or what is wrong}}."""
    wide = ShapeClass("lora_dx_kernel", 4, 32)
    times = {SHAPE: {A: 3.0, B: 1.0, C: "output 0: wrong"}, wide: {A: 2.0, D: 2.5}}

    def make(shape, device):
        shipped, *others = times[shape]

        def now():
            return times[shape][_triton_tables.lookup(shape.kernel, {80: {shape[1:]: shipped}}, 90, *shape[1:])]

        return SimpleNamespace(
            shipped=shipped, candidates=others, now=now, problem=lambda: now() if isinstance(now(), str) else None
        )

    fake = SimpleNamespace(
        KERNELS=tuple(shape.kernel for shape in times),
        problem=lambda: None,
        capability=lambda device: 90,
        shape_classes=lambda kernels: [shape for shape in times if shape.kernel in kernels],
        make=make,
    )
    facts = dict.fromkeys(("gpu_name", "torch", "triton", "driver", "commit", "date", "cpu_name"), "x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.record, "environment", lambda: facts)
    monkeypatch.setattr(tune, "gpu_seconds", lambda workload, repeats: workload.now())
    monkeypatch.setitem(sys.modules, "benchmarks.tune.workloads", fake)
    monkeypatch.setattr("benchmarks.tune.workloads", fake, raising=False)
    return SimpleNamespace(times=times, wide=wide, work=fake)


def test_command_writes_what_it_chose_and_where(fake_gpu, tmp_path, capsys):
    out = tmp_path / "table.json"
    assert tune.main(["--out", str(out), "--repeats", "7"]) == 0
    raw = json.loads(out.read_text())
    assert set(raw.pop("about")) == {"gpu_name", "torch", "triton", "driver", "commit", "date", "repeats"}
    assert raw == {SHAPE.kernel: {"90": {"2x16": list(B)}}, "lora_dx_kernel": {"90": {"4x32": list(A)}}}
    assert "wrote 2 classes" in capsys.readouterr().out
    assert tune.main(["--out", str(out), "--kernel", "lora_dx_kernel"]) == 0
    assert set(json.loads(out.read_text())) == {"about", "lora_dx_kernel"}


def test_a_class_without_a_correct_candidate_is_left_out_and_told(fake_gpu, tmp_path, capsys):
    fake_gpu.times[fake_gpu.wide] = {A: "wrong", D: "wrong too"}
    out = tmp_path / "table.json"
    assert tune.main(["--out", str(out)]) == 1
    assert set(json.loads(out.read_text())) == {"about", SHAPE.kernel}
    assert "lora_dx_kernel 4x32: nothing correct; 2 of 2 refused, first: wrong" in capsys.readouterr().out


def test_seconds_are_the_median_of_so_many_replays_of_all_inputs(monkeypatch):
    workload = SimpleNamespace(call=len, inputs=[(), (), ()])

    def replayed(call, sets, effort):
        assert (call, sets, effort.samples(1e-6), effort.samples(1.0)) == (len, 3, 7, 7)
        return [3.0, 1.0, 2.0]

    monkeypatch.setattr(tune.clock, "graph_seconds", replayed)
    assert tune.gpu_seconds(workload, 7) == 2.0


@pytest.mark.parametrize("reason", ["--kernel: got no_kernel", "no tensor cores"])
def test_unknown_kernels_and_old_gpus_are_refused_in_one_line(fake_gpu, tmp_path, capsys, reason):
    fake_gpu.work.problem = lambda: "no tensor cores" if reason == "no tensor cores" else None
    names = [] if reason == "no tensor cores" else ["--kernel", "no_kernel"]
    assert tune.main(["--out", str(tmp_path / "t.json"), *names]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [[], ["--out", "t.json", "--repeats", "0"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        tune.main(arguments)
    assert end.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_bench_tune_runs_the_tuner(monkeypatch):
    ran = []
    monkeypatch.setattr(bench.subprocess, "run", lambda c, cwd: ran.append((c, cwd)) or SimpleNamespace(returncode=2))
    assert bench.main(["tune", "--out", "t.json"]) == 2
    assert bench.main(["step", "--batch", "2"]) == 2
    (first, folder), (second, _) = ran
    assert first[1:] == ["-m", "benchmarks.tune", "--out", "t.json"]
    assert second[1:] == ["-m", "benchmarks.run", "step", "--batch", "2"]
    assert folder == ROOT


INTERPRETED = """
import torch

from adamix_kernels import _triton_utils

metas, launch = [], _triton_utils.launch
_triton_utils.launch = lambda k, *a, **meta: (metas.append((k.fn.__name__, meta)), launch(k, *a, **meta))
from benchmarks.tune import __main__ as tune, workloads as work

torch.set_num_threads(1)
sizes = dict(batch=3, tokens=18, hidden=32, experts=2)
shapes = list(work.shape_classes(work.KERNELS))
assert {s.kernel for s in shapes} == set(work.KERNELS) and len(shapes) == len(set(shapes))
for kernel in work.KERNELS:
    for shape in (tune.ShapeClass(kernel, 4, 16), max(s for s in shapes if s.kernel == kernel and s.itemsize == 4)):
        assert shape in shapes
        made = work.candidates(shape, 101_376)
        assert made and len(made) == len(set(made))
        assert set(made) < set(work.candidates(shape, 10**9))
        workload = work.make(shape, torch.device("cpu"), sizes)
        want = tune.Config(32, 16, 4, 2)
        assert workload.shipped != want
        with tune.installed(shape, want, 0):
            metas.clear()
            assert workload.problem() is None, (shape, workload.problem())
        family = kernel.removesuffix("_kernel")
        blocks = [list(meta.values()) for name, meta in metas if name.startswith(family)]
        assert blocks and all(32 in block and 16 in block for block in blocks), (shape, metas)
        spoiled = type(workload)(**{**vars(workload), "module": workload.reference})
        assert spoiled.problem() is None
        wrong = getattr(workload.reference, workload.function)
        spoiled.module = type("Wrong", (), {workload.function: lambda *a: [2 * t + 1 for t in wrong(*a)]})
        assert "budget" in spoiled.problem()
print("every kernel")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is missing")
def test_every_kernels_call_takes_the_installed_blocks_and_passes_its_check():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every kernel" in done.stdout
