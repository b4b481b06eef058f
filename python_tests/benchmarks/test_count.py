"""Counts: the model, the table and its rules, loops of machine code; and a few rows counted again."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.count import beside as count_beside
from benchmarks.count import full as count_full
from benchmarks.count import gates as count_gates
from benchmarks.count import model as count_model
from benchmarks.count import table as count_table
from benchmarks.count.memory import spans
from benchmarks.count.model import GPUS, Launch
from benchmarks.count.table import Row
from benchmarks.measure import record
from benchmarks.proof import report as proof_report

ROOT = Path(__file__).resolve().parents[2]
H100 = next(gpu for gpu in GPUS if gpu.name == "H100")


def launch(**changed) -> Launch:
    """One that reads and writes 2 GB once, with plenty in flight."""
    usual = dict(
        kernel="copy", blocks=132 * 64, warps=8, resident=8, instructions=1e6, special=0.0, distinct=2e9, again=[],
        loaded=1e9, missed=1e9, stored=1e9, bank_waves=0.0, waits=[(1e9 / 64e3, 1.0)], barriers=0.0, in_flight=64e3,
    )  # fmt: skip
    return Launch(**usual | changed)


def row(**changed) -> Row:
    usual = dict(
        op="adamix_loss/both", backend="triton", shape="2x8x5", dtype="bfloat16", target=90, kernels="pair_rows",
        launches=2, floor=2_000_000, instructions=1_000_000, a_byte=0.5, ptx=900_000, sass_ratio=1.1, loaded=1.0,
        distinct=1.0, device=1.1,
        in_flight=20_000, registers=64, shared_bytes=0, blocks_an_sm=2, warps_an_sm=16, waves=1.0, barriers=2.0,
        bank_waves=1.0, limit="issue", v100=None, a100=None, h100=0.5, h200=0.4, b200=0.3, sampled=4, source="abc",
    )  # fmt: skip
    return Row(**usual | changed)


def test_a_copy_reaches_its_bandwidth():
    assert count_model.share([launch()], H100, 2e9) > 0.97
    assert count_model.time(launch(), H100).limit == "memory"


@pytest.mark.parametrize(
    ("changed", "limit"),
    [
        # 0.5 warp instructions a byte: 0.5 * 22.3 GB/s a multiprocessor / 1.755 GHz = 6.4 a cycle, 2.5 are issued.
        ({"instructions": 1e9}, "issue"),
        ({"waits": [(1e9 / 500, 1.0)], "in_flight": 500.0}, "latency"),
        ({"barriers": 1e8}, "latency"),
        ({"missed": 2e10}, "l2"),
        ({"special": 2e8}, "special"),
        ({"bank_waves": 1e9}, "shared"),
        ({"again": [(4e9, 1e9)]}, "memory"),
    ],
)
def test_what_binds(changed, limit):
    slow = launch(**changed)
    assert count_model.time(slow, H100).limit == limit
    assert count_model.share([slow], H100, 2e9) < 0.75 * count_model.share([launch()], H100, 2e9)


def test_the_issue_limit_by_hand():
    slow = launch(instructions=1e9)
    expected = 1e9 / (132 * 1.755e9 * 2.5)
    assert count_model.time(slow, H100).limits["issue"] == pytest.approx(expected)
    few = replace(slow, resident=1, warps=4)
    assert count_model.time(few, H100).limits["issue"] == pytest.approx(2 * expected)


def test_more_blocks_than_multiprocessors_by_one_take_twice_as_long():
    one, more = launch(blocks=132, resident=1, instructions=132e6), launch(blocks=133, resident=1, instructions=133e6)
    assert count_model.time(more, H100).limits["issue"] == pytest.approx(
        2 * count_model.time(one, H100).limits["issue"]
    )


def test_l2_keeps_what_comes_soon_again_and_what_an_earlier_launch_left():
    near, far = ([(1e9, since)] for since in (1e3, 1e6))
    assert count_model.device_bytes(launch(again=near), H100) < 2.1e9
    # 132 * 8 blocks bring in a megabyte each before one comes back: 1.06 GB against 50 MB.
    assert count_model.device_bytes(launch(again=far), H100) == pytest.approx(3e9)
    small = launch(distinct=1e6, ranges={7: 1e6})
    assert count_model.device_bytes(small, H100, [small]) < 0.05e6
    assert count_model.device_bytes(small, H100, [replace(small, ranges={8: 1e6})]) == 1e6
    assert count_model.device_bytes(small, H100, [small, launch()]) == pytest.approx(1e6)


def test_tiny_work_is_all_launch():
    tiny = launch(blocks=1, distinct=1e3, loaded=1e3, missed=1e3, stored=0.0, waits=[(1.0, 1.0)], instructions=1e3)
    assert count_model.time(tiny, H100).limit == "launch"
    assert count_model.share([tiny, tiny], H100, 1e3) < 1e-3
    ready = count_model.time(replace(tiny, dependent=True), H100)
    assert count_model.time(tiny, H100).seconds - ready.seconds == pytest.approx(count_model.RAMP - count_model.READY)


def test_every_gpu_can_fill_its_memory():
    for gpu in GPUS:
        assert gpu.latency(1.0) * gpu.copy / gpu.multiprocessors == pytest.approx(gpu.needed)
        assert gpu.idle < gpu.latency(0.5) < gpu.latency(1.0) < 1.5e-6
        assert count_model.share([launch()], gpu, 2e9) > 0.9, gpu.name


def test_growth_needs_a_reason_that_is_new(tmp_path):
    old, slower = row(reason="slower, but right"), row(instructions=1_060_000)
    assert count_table.growth(old, row(instructions=1_040_000)) == []
    assert "instructions" in count_table.growth(old, slower)[0]
    assert "launches" in count_table.growth(old, row(launches=3))[0]
    for reason in ("", "slower, but right"):
        kept, wrong = count_table.accepted(old, slower, reason)
        assert kept == old
        assert "--reason" in wrong
    kept, wrong = count_table.accepted(old, slower, "rows are checked for NaN")
    assert (kept.instructions, kept.reason, wrong) == (1_060_000, "rows are checked for NaN", "")
    assert count_table.accepted(old, row(), "")[0].reason == old.reason
    assert len(count_table.problems([old], [slower, row(shape="2x8x6")])) == 2
    assert count_table.problems([old], [row(instructions=900_000)]) == []
    path = tmp_path / "count.csv"
    count_table.write(path, [slower, kept])
    assert count_table.read(path) == [slower, kept]
    path.write_text("op,backend\n")
    with pytest.raises(ValueError, match="expected"):
        count_table.read(path)


def gated(**changed) -> Row:
    return row(**{"op": "gated_lora/forward", "shape": "8x4x16 to 16 r8 M8 dense", **changed})


def by_token(**changed) -> Row:
    return row(**{"op": "routed_lora_by_token/forward", "shape": "8x4x16 to 16 r8 M8 token", **changed})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"instructions": 1_240_000, "distinct": 1.04}, []),
        ({"instructions": 1_260_000}, ["1.260 of the instructions, at most 1.25"]),
        ({"distinct": 1.055}, ["1.055 of the bytes, at most 1.05"]),
        ({"launches": 3, "shape": "8x4x16 to 16 r8 M8 top2"}, ["1 launches more, at most 0"]),
        ({"instructions": 1_260_000, "shape": "8x4x16 to 16 r8 M8 dense weights"}, ["1.260 of the instructions"]),
    ],
)
def test_gates_may_cost_so_much_beside_one_expert_a_token(changed, words):
    mine = gated(**changed)
    found = count_gates.problems([by_token(), mine], {mine.key})
    assert len(found) == len(words)
    assert all(word in line and str(mine) in line for word, line in zip(words, found))
    # What has not changed is not told; of another target there is nothing to compare with.
    assert count_gates.problems([by_token(), mine], set()) == []
    assert len(count_gates.problems([by_token(), mine], {by_token().key})) == len(words)
    (line,) = count_gates.problems([by_token(target=80), mine], {mine.key})
    assert line == f"{mine}: no count of one expert a token to compare with"


def test_forward_and_backward_together_have_no_exceptions(monkeypatch):
    """What an exception lets the forward move, the backward has to save."""
    monkeypatch.setattr(count_gates, "MORE", {("gated_lora/forward", "triton", "r8 M8 dense"): (1.29, 1.09, "why")})
    half, limits = {"instructions": 500_000}, count_gates
    for target, dear, other, words in (
        (90, dict(distinct=1.09), dict(distinct=1.01), []),
        (90, dict(distinct=1.09), dict(distinct=1.02), [f"1.055 of a step's bytes, at most {limits.BYTES}"]),
        (90, dict(instructions=645_000), dict(instructions=620_000), ["1.265 of a step's instructions, at most 1.25"]),
        (70, dict(distinct=1.05), dict(distinct=1.05), []),
    ):
        token = [by_token(target=target, **half), by_token(op="routed_lora_by_token/backward", target=target, **half)]
        mine = [gated(target=target, **half | dear)]
        mine.append(gated(op="gated_lora/backward", target=target, **half | other))
        found = count_gates.problems([*token, *mine], {mine[1].key})
        assert len(found) == len(words)
        assert all(line == f"{mine[0]} and backward, over one expert a token: {w}" for line, w in zip(found, words))
        assert count_gates.problems([*token, *mine], set()) == []
    monkeypatch.setattr(count_gates, "STEP_V100", 1.04)
    assert len(count_gates.problems([*token, *mine], {mine[1].key})) == 1


def test_beyond_a_tile_gates_may_take_two_launches_more():
    wide = {"shape": "8x4x16 to 16 r16 M64 top2", "instructions": 9_000_000}
    token = by_token(shape="8x4x16 to 16 r16 M64 token")
    for launches, found in ((4, 0), (5, 1)):
        assert len(count_gates.problems([token, gated(**wide, launches=launches)], {token.key})) == found
    (line,) = count_gates.table([token, gated(**wide, launches=4)])[2:]
    assert line.endswith("| 90 | 9.00 | 1.000 | 1.000 | 4 (+2) |")


def measured(value: float, **changed) -> record.Row:
    usual = dict(
        op="adamix_loss/both", backend="triton", shape="2x8x5", dtype="bfloat16", metric="copy_share", unit="1",
        value=value, gpu_name="NVIDIA H100 80GB HBM3", torch="", triton="", driver="", commit="", date="", cpu_name="",
        note="",
    )  # fmt: skip
    return record.Row(**usual | changed)


def test_predictions_stand_beside_what_was_measured(monkeypatch):
    rows = [
        measured(0.47), measured(0.2, backend="cuda"), measured(0.4, backend="formula"),
        measured(3.0, metric="bandwidth"), measured(0.4, gpu_name="NVIDIA L4"),
    ]  # fmt: skip
    counted = [row(), row(backend="cuda", h100=0.31), row(target=80, h100=None, h200=None, b200=None, a100=0.6)]
    lines = count_beside.lines(rows, counted)
    assert [line.split(" | ")[1:6] for line in lines[2:4]] == [
        ["cuda", "H100", "0.31", "0.20", "-0.11"],
        ["triton", "H100", "0.50", "0.47", "-0.03"],
    ]
    assert lines[-1].startswith("1 of 2 predictions")
    assert count_beside.lines(rows, []) == []
    monkeypatch.setattr(count_table, "committed", lambda: counted)
    facts = dict.fromkeys(("device", "torch", "triton", "driver", "commit", "date"), "x") | {
        "seconds": 1.0,
        "budget": 2.0,
    }
    report = proof_report.report(rows, [], [], facts, smoke=False)
    assert "predicted from counts and measured" in report
    assert lines[2] in report


def test_a_merge_that_falls_short_stands_beside_what_its_size_allows():
    """48 MB are 16.2 us of 2.95 TB/s, and a launch takes 2 us more."""
    from benchmarks.count import page as count_page

    short = row(op="merge_banks/forward", shape="24 layers", floor=47_700_000, launches=1, distinct=1.0, h100=0.868)
    (line,) = count_page.merges(
        [short, replace(short, h100=0.9), replace(short, op="merged"), replace(short, h100=None)]
    )
    assert line == "merge_banks/forward 24 layers bfloat16, triton: 0.87 of at most 0.89"
    twice = replace(short, launches=2, distinct=1.1)
    assert count_page.merges([twice])[0].endswith("0.87 of at most 0.74")


def test_the_page_and_its_picture_are_of_the_committed_rows():
    pytest.importorskip("matplotlib")
    from benchmarks import plot
    from benchmarks.count import page as count_page

    rows = count_table.committed()
    assert count_page.PAGE.read_text(encoding="utf-8") == count_page.page(rows), "python -m benchmarks.count --page"
    assert plot.digest_in(count_page.PICTURE) == plot.digest(rows), "python -m benchmarks.count --page"


def test_the_committed_rows_are_whole():
    rows = count_table.committed()
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.instructions > 0, row
        assert row.shares, row
        assert row.distinct >= 0.8, row
        assert all(0 <= share <= 1 for share in row.shares.values()), row
        assert all(math.isfinite(getattr(row, name)) for name in count_table.COUNTS), row
    # Every op of every backend on every GPU but Triton's on a V100, which Triton does not compile for.
    found = {(row.op.partition("/")[0], row.backend, gpu) for row in rows for gpu in row.shares}
    for op in (
        "adamix_loss",
        "routed_adapter",
        "routed_lora",
        "gated_adapter",
        "gated_lora",
        "merge_banks",
        "merge_experts",
    ):
        wanted = {("cuda", gpu.name) for gpu in GPUS} | {("triton", gpu.name) for gpu in GPUS[1:]}
        assert {(backend, gpu) for name, backend, gpu in found if name == op} >= wanted, op


def test_the_committed_gates_cost_no_more_than_they_may():
    rows = count_table.committed()
    assert count_gates.problems(rows, {row.key for row in rows}) == []


def test_what_gates_may_cost_more_is_what_they_do_cost_more():
    pairs = count_gates.pairs(count_table.committed())
    for name, (instructions, moved, why) in count_gates.MORE.items():
        mine = [pair for pair in pairs if pair.name == name]
        assert mine, f"{name}: nothing is counted that has this name"
        for most, usual, costs in (
            (instructions, count_gates.INSTRUCTIONS, [pair.instructions for pair in mine]),
            (moved, count_gates.BYTES, [pair.bytes for pair in mine]),
        ):
            assert most == usual or usual < max(costs) > most - 0.06, f"{name}: {max(costs)}, and may be {most}"
        assert max(instructions / count_gates.INSTRUCTIONS, moved / count_gates.BYTES) > 1, name
        assert why, name
    lines = count_gates.exceptions(count_table.committed())
    assert len(lines) == len(count_gates.MORE)


def test_a_mixture_is_held_to_its_parts():
    parts = gated(), row(op="router/forward", shape="8x4x16 M8 dense", instructions=100)
    whole = replace(parts[0], op="mixture_lora/forward")
    both = parts[0].instructions + 100
    held = [replace(whole, instructions=both - 1, distinct=1.02 * whole.distinct), by_token(), *parts]
    assert count_gates.problems(held, {held[0].key}) == []
    assert len(count_gates.mixture_table(held)) == 3
    assert count_gates.mixture_table(held[1:]) == []
    for change, words in (
        (dict(instructions=both), "1.000 of the instructions of both"),
        (dict(distinct=1.03 * whole.distinct), "1.030 of gated LoRA's bytes, at most 1.02"),
        (dict(launches=whole.launches + 1), "launches, at most gated LoRA's"),
    ):
        made = [replace(held[0], **change), *held[1:]]
        assert words in count_gates.problems(made, {made[0].key})[0]
        # A part that is counted anew is compared, too.
        assert words in count_gates.problems(made, {parts[1].key})[0]
    assert "no counts of gated LoRA and of the router" in count_gates.problems([whole], {whole.key})[0]


def test_an_exception_is_a_limit_of_its_own(monkeypatch):
    mine = gated(distinct=1.08)
    monkeypatch.setattr(count_gates, "MORE", {("gated_lora/forward", "triton", "r8 M8 dense"): (1.25, 1.09, "why")})
    assert count_gates.problems([by_token(), mine], {mine.key}) == []
    assert count_gates.exceptions([by_token(), mine]) == [
        "gated_lora/forward triton r8 M8 dense: at most 1.09 of the bytes: why"
    ]
    assert count_gates.exceptions([by_token()]) == []
    other = gated(distinct=1.1)
    assert "1.100 of the bytes, at most 1.09" in count_gates.problems([by_token(), other], {other.key})[0]


@pytest.mark.parametrize(
    ("op", "only"),
    [
        ("merge", "merge_banks/forward 24 layers M4 r48"),
        pytest.param("consistency", "adamix_loss/both 2x64x2 float32", marks=pytest.mark.nightly),
    ],
)
def test_a_row_counted_again_has_not_grown(op, only):
    """Cheap ones; `make count` counts all."""
    from ptx.build import environment, problem

    if problem() is not None:
        pytest.skip(problem())
    command = [sys.executable, "-m", "benchmarks.count", "--ops", op, "--backends", "triton", "--targets", "90"]
    done = subprocess.run(
        [*command, "--only", only, "--check"], cwd=ROOT, env={**os.environ, **environment()}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(word in done.stderr for word in only.split())


def test_what_the_pointers_of_an_argument_lead_to_lies_side_by_side():
    """Pointers into the midst of an allocation, before a known tensor: each up to the next."""
    whole = torch.zeros(1 << 20)
    known, first, second = whole[3000:4000], whole[1000:].data_ptr(), whole[2000:].data_ptr()
    found = sorted(spans(struct.pack("<QQQ", second, 7, first), [known]), key=lambda span: span.low)
    assert [(span.low, span.high) for span in found] == [
        (first, second), (second, known.data_ptr()), (known.data_ptr(), known.data_ptr() + 4000),
    ]  # fmt: skip


def test_the_full_gradient_is_held_against_the_detached_one():
    full = row(op="adamix_loss_full/both", instructions=1_450_000, h100=0.4, h200=0.35, b200=0.2)
    assert count_full.problems([row(), full], {full.key}) == [
        f"{full}: 1.500 of the detached gradient's time on B200, at most 1.4"
    ]
    assert count_full.problems([row(), full], {"another"}) == []
    assert "1.45 to 1.45 of the detached one's instructions, and at most 1.50" in count_full.sentence([row(), full])
    assert count_full.sentence([row()]) == ""
