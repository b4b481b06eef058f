"""The benchmarks of ops: agreement before timing, what a crash leaves, what is counted; in tiny sizes on the CPU."""

from __future__ import annotations

import importlib
import json
import time

import pytest
import torch
import torch.nn.functional as F

from benchmarks import run, sizes
from benchmarks.measure import clock, record
from benchmarks.measure.ceilings import Ceilings
from benchmarks.measure.clock import SMOKE
from benchmarks.measure.harness import RedCheckError
from benchmarks.measure.ledger import AbsentError, BrokenDeviceError, Item, Ledger, RefusedError
from benchmarks.ops import bench as op_bench
from benchmarks.ops import paired as bench_paired
from benchmarks.ops.cases import Case, Contender, Draw, Inputs, absent, bind, of
from benchmarks.ops.check import disagreement, require_agreement
from benchmarks.ops.run import OPS
from benchmarks.sanitize import run as run_kernels

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e9, matmul={torch.float32: 1e9})
ITEM = Item("op", "us", "2x3", "float32")


def plain(x, w):
    return F.linear(x, w)


def make(draw):
    return Inputs((draw.normal(3, 4), draw.normal(5, 4)), (), draw.normal(3, 5))


def case_of(*contenders, **changes):
    traffic = {"forward": 100.0, "backward": 200.0, "both": 300.0}
    fields = dict(op="linear", shape="3x4", dtype=torch.float32, make=make, plain=plain, traffic=traffic)
    return Case(contenders=contenders, **{**fields, **changes})


def outcomes(ledger):
    return {r.backend: r.metric for r in ledger.rows if r.metric in ("timed", "checked", "refused", "absent", "failed")}


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, 1.001 * (grad.mT @ x)


def test_a_wrong_contender_is_recorded_and_not_timed():
    ran = []

    def off(x, w):
        ran.append(x.shape)
        return 1.0001 * F.linear(x, w)

    def broken(x, w):
        raise ZeroDivisionError("no such luck\nsecond line")

    contenders = [of("right", plain), of("off", off), of("wrong_gradient", WrongGradient.apply), of("broken", broken)]
    ledger = Ledger()
    op_bench.run_cases([case_of(*contenders, absent("peer", "not installed"))], CPU, ledger, CEILINGS, SMOKE)
    want = dict(right="timed", off="refused", wrong_gradient="refused", broken="failed", peer="absent")
    assert outcomes(ledger) == want
    assert len(ran) == 1
    notes = {r.backend: r.note for r in ledger.rows if r.metric in want.values()}
    assert "result 0 of 3: errs by" in notes["off"]
    assert "result 2 of 3: errs by" in notes["wrong_gradient"]
    assert notes["broken"] == "ZeroDivisionError: no such luck"
    assert {r.backend for r in ledger.rows if r.metric == "time_p50"} == {"right"}


def test_rows_of_a_timed_contender():
    ledger = Ledger()
    op_bench.run_cases([case_of(of("right", plain), operations={"forward": 120.0})], CPU, ledger, CEILINGS, SMOKE)
    found = {(r.op, r.metric): r for r in ledger.rows}
    for direction, moved in (("forward", 100.0), ("backward", 200.0), ("both", 300.0)):
        op = f"linear/{direction}"
        low, middle, high = (found[op, f"time_{p}"] for p in ("p20", "p50", "p80"))
        assert 0 < low.value <= middle.value <= high.value
        assert middle.unit == "us"
        seconds = middle.value * 1e-6
        assert found[op, "bandwidth"].value == pytest.approx(moved / seconds / 1e9)
        assert found[op, "copy_share"].value == pytest.approx(moved / seconds / 1e9)
        # The operations of the forward take longer than its bytes.
        floor = max(moved, 120.0 if direction == "forward" else 0) / 1e9
        assert found[op, "floor"].value == pytest.approx(floor * 1e6)
        assert found[op, "floor_share"].value == pytest.approx(floor / seconds)
    assert found["linear/forward", "throughput"].value == pytest.approx(
        120 / found["linear/forward", "time_p50"].value / 1e6
    )
    assert ("linear/both", "throughput") not in found
    # One product forward; two more backward.
    assert found["linear/forward", "aten_ops"].value >= 1
    assert found["linear/both", "aten_ops"].value > found["linear/forward", "aten_ops"].value
    assert all(r.torch == torch.__version__ and not r.gpu_name for r in ledger.rows)


def test_checking_alone_times_nothing():
    ledger = Ledger()
    calls = []
    counted = of("right", lambda x, w: calls.append(1) or plain(x, w))
    op_bench.run_cases([case_of(counted)], CPU, ledger, None, SMOKE)
    assert outcomes(ledger) == {"right": "checked"}
    assert {r.metric for r in ledger.rows} == {"checked", "error"}
    # Once for the check, once at the real size.
    assert len(calls) == 2


def test_one_number_may_err_more_than_a_tensor():
    exact = torch.full((), 10.0, dtype=torch.float64)
    own = torch.tensor(10.0)
    assert disagreement(torch.tensor(10.00002), exact, own) is None
    assert "errs by" in disagreement(torch.tensor(10.001), exact, own)
    many = torch.full((100,), 10.0, dtype=torch.float64)
    assert "errs by" in disagreement(torch.full((100,), 10.00002), many, many.float())
    assert "shape" in disagreement(torch.ones(2), torch.ones(1, 2).double(), torch.ones(1, 2))
    assert "errs by nan" in disagreement(torch.tensor(float("nan")), exact, own)


def test_a_peer_may_add_up_less_exactly_than_we_may():
    def sloppy(x, w):
        return plain(x, w) * (1 + 5e-6)

    ledger = Ledger()
    ours = Contender("ours", lambda: bind(sloppy), exacting=True)
    op_bench.run_cases([case_of(of("peer", sloppy), ours)], CPU, ledger, None, SMOKE)
    assert outcomes(ledger) == {"peer": "checked", "ours": "refused"}
    (error,) = [r for r in ledger.rows if r.metric == "error"]
    assert error.backend == "peer"
    assert 4 * 8 < error.value < 32 * 8


def test_inputs_are_random_and_rotate():
    first, second = (make(Draw(CPU, torch.float32, seed)) for seed in (2, 3))
    assert not torch.equal(first.leaves[0], second.leaves[0])
    assert torch.equal(first.leaves[0], make(Draw(CPU, torch.float32, 2)).leaves[0])
    seen = []

    def note(x, w):
        seen.append(x.data_ptr())
        return plain(x, w)

    case = case_of(of("right", note))
    calls = op_bench._Calls(case.contenders[0], case.contenders[0].open(), [first, second], True)
    for k in range(4):
        calls.direction("forward")(k)
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_a_resumed_ledger_goes_on_after_what_was_lost(tmp_path):
    path = tmp_path / "deep" / "rows.csv"
    ledger = Ledger(path)
    with ledger.item(ITEM) as rows:
        rows.append(ITEM.row("time_p50", "us", 2.0))
    lost = Item("op", "peer", "2x3", "float32")
    with pytest.raises(KeyboardInterrupt), ledger.item(lost):
        raise KeyboardInterrupt
    again = Ledger(path, resume=True)
    assert outcomes(again) == {"us": "timed", "peer": "failed"}
    assert "died, or hung" in again.rows[-1].note
    for item in (ITEM, lost):
        with again.item(item) as rows:
            assert rows is None
    assert [r.metric for r in record.read(path)] == ["time_p50", "timed", "failed"]
    assert not path.with_name("rows.csv.now").exists()


def test_a_broken_device_ends_the_process_and_is_recorded(tmp_path):
    ledger = Ledger(tmp_path / "rows.csv")
    with pytest.raises(BrokenDeviceError), ledger.item(ITEM):
        raise BrokenDeviceError("illegal memory access")
    assert [(r.metric, r.note) for r in ledger.rows] == [("failed", "illegal memory access")]
    assert not (tmp_path / "rows.csv.now").exists()


def test_nothing_is_begun_after_the_deadline():
    ledger = Ledger(deadline=time.monotonic() - 1)
    with ledger.item(ITEM) as rows:
        assert rows is None
    assert outcomes(ledger) == {"us": "absent"}


def test_the_marker_names_what_runs(tmp_path):
    path = tmp_path / "rows.csv"
    ledger = Ledger(path)
    with ledger.item(ITEM):
        assert Item(**json.loads((tmp_path / "rows.csv.now").read_text())) == ITEM
    assert outcomes(ledger) == {"us": "timed"}


def test_every_peer_computes_the_formula():
    """Where it is installed: every contender of every tiny case agrees with float64, or says why it is absent."""
    agreed = set()
    for op in OPS:
        for case in importlib.import_module(f"benchmarks.ops.{op}").cases("smoke", CPU):
            for contender in case.contenders:
                # Traced by the end-to-end run; tracing takes seconds.
                if contender.name.startswith("compile_"):
                    continue
                try:
                    require_agreement(case, contender, contender.open(), CPU, "both" in case.traffic)
                except (AbsentError, ImportError):
                    continue
                agreed.add((case.op, contender.name))
    always = {
        "routed_adapter": {"gathered_bmm", "masked_experts", "grouped_mm", "expert_loop", "original"},
        "routed_lora": {"gathered_bmm", "grouped_mm", "original"},
        "frozen_linear": {"gathered_bmm"},
        "adamix_loss": {"formula"},
        "consistency_loss": {"formula"},
        "linear_adamix_loss": {"formula", "unfused"},
        "merge_banks": {"stacked_mean", "baddbmm", "foreach"},
        "merge_experts": {"weighted_mean", "baddbmm"},
        "merge_lora": {"baddbmm"},
    }
    assert agreed >= {(op, name) for op, names in always.items() for name in {*names, "reference"}}


def test_peft_is_compared_with_one_expert():
    pytest.importorskip("peft")
    from benchmarks.ops import routed_lora as bench_routed_lora

    case = next(iter(bench_routed_lora.cases("smoke", CPU)))
    (peft,) = [c for c in case.contenders if c.name == "peft_lora"]
    require_agreement(case, peft, peft.open(), CPU, True)
    spoiled = Case(**{**vars(case), "make": lambda draw: case.make(draw)})
    wrong = type(peft)(**{**vars(peft), "plain": lambda x, a, b, base: base + F.linear(F.linear(x, a), b)})
    with pytest.raises(RefusedError):
        require_agreement(spoiled, wrong, wrong.open(), CPU, True)


def test_a_direction_without_memory_costs_no_other(monkeypatch):
    real = op_bench._measure

    def measured(item, direction, *rest):
        if direction == "backward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")
        return real(item, direction, *rest)

    monkeypatch.setattr(op_bench, "_measure", measured)
    ledger = Ledger()
    op_bench.run_cases([case_of(of("right", plain))], CPU, ledger, CEILINGS, SMOKE)
    assert outcomes(ledger) == {"right": "timed"}
    found = {(r.op, r.metric) for r in ledger.rows}
    assert {("linear/forward", "time_p50"), ("linear/both", "time_p50"), ("linear/backward", "out_of_memory")} <= found
    assert ("linear/backward", "time_p50") not in found


def test_a_brief_run_times_peers_in_the_widest_direction_alone():
    ledger = Ledger()
    ours = [Contender(name, lambda: bind(plain), exacting=True) for name in ("reference", "triton")]
    op_bench.run_cases([case_of(*ours, of("peer", plain))], CPU, ledger, CEILINGS, SMOKE, brief=True)
    timed = [(r.backend, r.op.partition("/")[2]) for r in ledger.rows if r.metric == "time_p50"]
    every = [("triton", way) for way in ("forward", "backward", "both")]
    assert sorted(timed) == sorted([("reference", "both"), *every, ("peer", "both")])


def test_a_measurement_on_a_gpu_takes_what_the_gpu_has(monkeypatch):
    """The clocks replaced, everything that a GPU's row is made of."""
    calls = op_bench._Calls(
        of("right", plain), bind(plain), [make(Draw(CPU, torch.float32, seed)) for seed in (1, 2)], True
    )
    ends = []
    monkeypatch.setattr(clock, "eager_seconds", lambda call, *_: [call(0), 0.02][1:])
    monkeypatch.setattr(clock, "host_seconds", lambda call, device, many: ends.append(many) or 1e-5)
    monkeypatch.setattr(clock, "peak_bytes", lambda *_: 2**20)
    monkeypatch.setattr(clock, "launches", lambda *_: 3)
    monkeypatch.setattr(op_bench, "_graph_seconds", lambda *_: [1e-6])
    case = case_of(of("right", plain), operations={"both": 600.0})
    rows = op_bench._measure(ITEM, "both", calls, case, torch.device("cuda"), CEILINGS, SMOKE, True)
    found = {r.metric: r.value for r in rows}
    # The queue of what takes long is short.
    assert ends == [3]
    assert found["launches"] == 3
    assert found["peak_memory"] == 1
    assert found["time_p50"] == pytest.approx(2e4)
    assert found["graph_time_p50"] == pytest.approx(1)
    # 300 bytes in a microsecond, of a gigabyte a second.
    assert found["copy_share"] == pytest.approx(0.3)
    assert found["throughput"] == pytest.approx(6e-4)


def test_the_sanitizers_program_runs_every_op():
    ran = run_kernels(CPU, ["reference"])
    wanted = {"routed_adapter", "routed_lora", "adamix_loss", "linear_adamix_loss", "merge_banks", "merge_lora"}
    assert {line.split()[0] for line in ran} >= wanted
    assert run_kernels(CPU, ["triton", "cuda"]) == []


def test_sizes_have_names_of_their_own():
    for table in (sizes.ADAPTER, sizes.LORA, sizes.LORA_PACK, sizes.LOSS, sizes.HEAD, sizes.MERGE_BANKS):
        assert set(table) == set(sizes.SETS)
        for which in table.values():
            assert len({(size.words, size.dtype) for size in which}) == len(which)
    qkv = sizes.LORA_GPT2
    assert qkv.offsets == (0, 2048)
    assert (qkv.offsets[1] + qkv.per_group, qkv.per_group) == (qkv.width, 1024)
    assert sizes.ADAPTER_64K.batch * sizes.ADAPTER_64K.tokens == 65536
    assert sizes.ADAPTER_8K.batch * sizes.ADAPTER_8K.tokens == 8192


def test_effort_is_between_its_limits():
    effort = clock.Effort(seconds=1.0, least=7, most=41)
    assert [effort.samples(s) for s in (1.0, 0.05, 1e-9)] == [7, 20, 41]
    assert len(clock.eager_seconds(lambda k: None, CPU, SMOKE)) == SMOKE.least
    calls = []
    clock.eager_seconds(calls.append, CPU, clock.Effort(0.0, 5, 5, warmup=2))
    assert calls == [0, 0, 1, 0, 1, 2, 3, 4]


def test_unknown_models_are_refused():
    with pytest.raises(SystemExit, match="no-such-model"):
        run.main(["models", "no-such-model", "--size=smoke"])


def test_traffic_counts_what_must_move():
    """In 2-byte elements: 4NH bytes forward and 6NH backward for the adapter, 8NV for the loss, M + 1 banks merged."""
    from benchmarks.ops import consistency as bench_consistency
    from benchmarks.ops import merge as bench_merge
    from benchmarks.ops import routed_adapter as bench_routed_adapter

    adapter = next(iter(bench_routed_adapter.cases("gpu", CPU)))
    assert adapter.traffic == {"forward": 4 * 8192 * 1024, "backward": 6 * 8192 * 1024, "both": 10 * 8192 * 1024}
    loss = next(iter(bench_consistency.cases("gpu", CPU)))
    assert loss.traffic["both"] == 8 * 8192 * 50257
    banks = next(iter(bench_merge.cases("gpu", CPU)))
    assert banks.traffic["forward"] == (4 + 1) * 4 * 24 * (2 * 512 * 1024 + 512 + 1024)


def test_contenders_take_turns_after_their_results_were_compared(capsys, tmp_path):
    def double(x, w):
        return 2 * plain(x, w)

    good = case_of(of("reference", plain), of("again", plain), absent("other", "not here"))
    for cold in (True, False):
        timing = bench_paired.measure(good, CPU, rounds=2, seconds=1.0, cold=cold)
    assert {name: len(taken) for name, taken in timing.seconds.items()} == {"reference": 2, "again": 2}
    assert all(0 < second < 1 for taken in timing.seconds.values() for second in taken)
    with pytest.raises(RedCheckError, match="off: result 0 is not the reference's"):
        bench_paired.measure(case_of(of("reference", plain), of("off", double)), CPU, rounds=1, seconds=1.0)
    assert run.main(["paired", "merge", "--size", "smoke", "--only", "nothing"]) == 1
    assert "no case's name holds 'nothing'" in capsys.readouterr().err
    out = tmp_path / "paired.csv"
    for only in ("merge_lora", "merge_banks", "merge_lora"):
        command = ["paired", "merge", "--size", "smoke", "--only", only, "--rounds", "2", "--out", str(out)]
        assert run.main(command) == 0
    assert "baddbmm" in capsys.readouterr().out
    kept = [(r.op, r.metric) for r in record.read(out)]
    assert len(kept) == len(set(kept))
    assert {("merge_lora", "time_p50"), ("merge_lora", "ratio_p20 to baddbmm"), ("merge_banks", "time_p80")} <= {*kept}
