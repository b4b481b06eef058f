"""The benchmarks' harness in a seconds-long size: schema, arithmetic, and no timing on a red check."""

from __future__ import annotations

import csv
import itertools
import os

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import run
from benchmarks.measure import record
from benchmarks.measure.harness import Check, RedCheckError, Timing, spread, time_paired
from benchmarks.models import step as bench_step
from benchmarks.models.agreement import agreement_problem
from benchmarks.models.contenders import ADAMIX, LORA, ONE_EXPERT, ORIGINAL, PLAIN, TITLES, Workload, build, load_base

SCHEMA = "op,backend,shape,dtype,metric,unit,value,gpu_name,torch,triton,driver,commit,date"
TINY = Workload(model="tiny", batch=3, tokens=8, bottleneck=8)


@pytest.fixture(scope="module")
def base():
    return load_base(TINY)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_command_writes_the_schema(tmp_path, capsys):
    out = tmp_path / "deep" / "step.csv"
    sizes = ["--model=tiny", "--batch=2", "--tokens=4", "--bottleneck=8", "--repeats=3", "--threads=1"]
    assert run.main(["step", *sizes, "--no-memory", f"--out={out}"]) == 0
    with open(out, newline="") as file:
        header, *lines = csv.reader(file)
    assert ",".join(header).startswith(SCHEMA)
    assert os.listdir(out.parent) == ["step.csv"]
    rows = record.read(out)
    assert len(rows) == len(lines)
    assert {r.op for r in rows} >= {f"step/{name}" for name in (ADAMIX, ONE_EXPERT, PLAIN, ORIGINAL)}
    assert all(r.value > 0 and r.torch == torch.__version__ and r.date for r in rows)
    found = {(r.op, r.metric): r for r in rows}
    middle = found["step/adamix", "time_p50"]
    assert middle.unit == "ms"
    assert found["step/adamix", "time_p20"].value <= middle.value <= found["step/adamix", "time_p80"].value
    assert found["step/adamix", f"ratio_p50 to step/{ORIGINAL}"].unit == "x"
    assert TITLES[ORIGINAL].split(":")[0] in capsys.readouterr().out


def test_red_check_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("benchmarks.models.contenders.adamix_loss", _loss_without_consistency)
    out = tmp_path / "step.csv"
    sizes = ["--model=tiny", "--batch=2", "--tokens=4", "--bottleneck=8", "--repeats=1", "--threads=1"]
    assert run.main(["step", *sizes, "--no-memory", f"--out={out}"]) == 1
    assert not out.exists()
    assert "nothing was timed" in capsys.readouterr().err


def test_red_check_runs_no_call():
    ran = []
    checks = [Check("sound", lambda: None), Check("broken", lambda: "off by one")]
    with pytest.raises(RedCheckError, match="broken: off by one"):
        time_paired({"a": ran.append}, checks, rounds=2)
    assert ran == []


def test_agreement_is_green_and_sees_a_wrong_loss(base, monkeypatch):
    assert agreement_problem(base, TINY) is None
    monkeypatch.setattr("benchmarks.models.contenders.adamix_loss", _loss_without_consistency)
    assert "errs by" in agreement_problem(base, TINY)


def test_agreement_where_all_layers_are_drawn_in_one_launch(base, monkeypatch):
    """As on a GPU: one draw for both layers, of which each takes its own."""
    from adamix_kernels.routing import draws

    monkeypatch.setattr(draws, "draws_ahead", lambda device: True)
    shapes, real = [], draws.Router._randint
    monkeypatch.setattr(
        draws.Router, "_randint", lambda self, m, shape, device: shapes.append(shape) or real(self, m, shape, device)
    )
    assert agreement_problem(base, TINY) is None
    assert set(shapes) == {(2, 2)}


def test_contenders_train_comparable_parameters(base):
    pytest.importorskip("peft")
    models = {name: build(name, base, TINY).model for name in TITLES}

    def trainable(name):
        return sum(p.numel() for p in models[name].parameters() if p.requires_grad)

    places, hidden, r = 2, 32, TINY.bottleneck
    head = sum(p.numel() for p in base.classifier.parameters())
    adapter = hidden * r + r + r * hidden + hidden
    assert trainable(PLAIN) == trainable(ONE_EXPERT) == head + places * adapter
    extra = places * (TINY.experts - 1) * (hidden * r + r)
    assert trainable(ADAMIX) == trainable(ORIGINAL) == head + places * adapter + extra
    assert trainable(LORA) == head + places * 2 * hidden * r


def test_every_contender_learns_and_leaves_the_encoder_alone(base):
    (batch,) = TINY.batches(base.config.vocab_size, 1)
    for name in (ADAMIX, PLAIN, ORIGINAL):
        contender = build(name, base, TINY)
        before = {n: p.detach().clone() for n, p in contender.model.named_parameters()}
        contender.step(*batch)
        moved = {n for n, p in contender.model.named_parameters() if not torch.equal(p, before[n])}
        frozen = {n for n, p in contender.model.named_parameters() if not p.requires_grad}
        assert moved, name
        assert not moved & frozen, name


def test_time_paired_pairs_the_calls_of_a_round():
    calls, ticks, now = [], itertools.count(), [0.0]

    # Reading number n moves the clock by n, so call i of round k takes 2 (3 k + i) + 1.
    def clock():
        now[0] += next(ticks)
        return now[0]

    names = ("a", "b", "c")
    timing = time_paired({n: lambda k, n=n: calls.append((k, n)) for n in names}, [], rounds=6, warmup=0, clock=clock)
    assert timing.rounds == 6
    by_round = [[n for r, n in calls if r == k] for k in range(6)]
    assert all(sorted(order) == list(names) for order in by_round)
    assert {order[0] for order in by_round} == set(names)
    for k, order in enumerate(by_round):
        taken = [timing.seconds[n][k] for n in order]
        assert taken == [2 * (3 * k + i) + 1 for i in range(3)]


def test_ratio_survives_drift():
    drift = [1.0, 5.0, 2.0, 9.0, 3.0]
    timing = Timing({"a": [2 * d for d in drift], "b": drift})
    assert timing.ratio("a", "b") == spread([2.0] * 5)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).p50 == pytest.approx(3.5)
    assert spread([7.0]).p20 == 7.0


def test_rounds_must_be_positive():
    with pytest.raises(ValueError, match="rounds: got 0"):
        time_paired({"a": lambda k: None}, [], rounds=0)


def test_goals_belong_to_the_sizes_of_the_issue():
    limits = {goal.other: goal.limit for goal in bench_step.goals(Workload())}
    assert limits == {PLAIN: 1.05, ONE_EXPERT: 1.05, ORIGINAL: 1.03}
    assert {g.other: g.limit for g in bench_step.goals(Workload(batch=2, tokens=16))} == {ORIGINAL: 0.85}
    assert bench_step.goals(TINY) == ()
    (goal,) = bench_step.goals(Workload(batch=2, tokens=16))
    assert goal.verdict(0.85).startswith("met")
    assert goal.verdict(0.935).startswith("missed by 10.0%")


def test_peak_memory_counts_what_a_step_holds():
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("needs Linux")
    small = bench_step.peak_memory(PLAIN, TINY, 1)
    large = bench_step.peak_memory(PLAIN, Workload(model="tiny", batch=64, tokens=128, bottleneck=8), 1)
    assert large > small >= 0


def test_record_refuses_another_header(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("op,value\nx,1\n")
    with pytest.raises(ValueError, match="expected"):
        record.read(path)


@pytest.mark.parametrize("wrong", ["experts", "gradient"])
def test_agreement_sees_wrong_experts_and_gradients(base, monkeypatch, wrong):
    from adamix_kernels.ops.routed_adapter import reference

    if wrong == "experts":
        forward = reference.forward
        monkeypatch.setattr(
            reference, "forward", lambda x, wd, bd, wu, bu, i, *rest: forward(x, wd, bd, wu, bu, i.flip(0), *rest)
        )
    else:
        backward = reference.backward
        monkeypatch.setattr(reference, "backward", lambda *a: (lambda g: (*g[:1], g[1] * 1.001, *g[2:]))(backward(*a)))
    assert "errs by" in agreement_problem(base, TINY)


def _loss_without_consistency(logits, labels, backend="auto"):
    from adamix_kernels import adamix_loss

    return adamix_loss(logits, labels, weight=0.0)
