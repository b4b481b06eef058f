"""The README's performance section, the goals and the pictures are what benchmarks/results says."""

from __future__ import annotations

import re
import subprocess

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plot, sizes
from benchmarks.measure import goals, record
from benchmarks.measure.goals import all_goals, evaluate
from benchmarks.measure.record import Row
from benchmarks.mixtures import bench as mixtures
from benchmarks.mixtures.layer import PEERS
from benchmarks.readme import __main__ as readme
from benchmarks.readme import ops as readme_ops

ENVIRONMENT = dict(
    torch="2.11.0", triton="3.6.0", driver="1", commit="abc", date="2026-01-01T00:00Z", cpu_name="", note=""
)

LINES = {"2.8": 4, "3.9": 7, "5.2": 1, "5.5": 13, "6.4": 16, "24.7": 21}


def row(op, backend, shape, metric, value, *, gpu_name="a test H200", dtype="bfloat16", **changes):
    fields = dict(
        op=op, backend=backend, shape=shape, dtype=dtype, metric=metric, unit="", value=value, gpu_name=gpu_name
    )
    return Row(**{**fields, **ENVIRONMENT, **changes})


def verdict(rows, goal):
    (found,) = [v for v in evaluate(rows) if v.goal.id == goal]
    return found


def test_the_readme_agrees_with_the_results():
    assert readme.main(["--check"]) == 0
    page = readme.PAGE.read_text(encoding="utf-8")
    for goal in all_goals():
        assert f"| {goal.id} |" in page
    for picture in plot.measured()[0].parent.glob("*.png"):
        assert picture.name in page
    for link in re.findall(r"]\(([^)]+)\)", page):
        assert (readme.PAGE.parent / link).is_file(), link


def test_a_changed_figure_is_seen(monkeypatch, tmp_path, capsys):
    text = readme.README.read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    changed = re.sub(r"\d+% of the memory", "99% of the memory", text, count=1)
    assert changed != text
    copy.write_text(changed, encoding="utf-8")
    real, made = readme.README, _section(text)
    monkeypatch.setattr(readme, "README", copy)
    monkeypatch.setattr(readme, "PAGE", tmp_path / "docs.md")
    monkeypatch.setattr(readme, "section", lambda: made)
    monkeypatch.setattr(readme, "page", lambda: "the page")
    assert readme.main(["--check"]) == 1
    assert readme.main(["--write"]) == 0
    assert copy.read_text(encoding="utf-8") == text == real.read_text(encoding="utf-8")
    assert (tmp_path / "docs.md").read_text(encoding="utf-8") == "the page"
    assert readme.main(["--check"]) == 0
    (tmp_path / "docs.md").write_text("another page", encoding="utf-8")
    assert readme.main(["--check"]) == 1
    with pytest.raises(ValueError, match="markers"):
        readme.rewritten("no markers")


def _section(text):
    return text.partition(readme.BEGIN + "\n")[2].partition("\n" + readme.END)[0]


def test_the_table_of_ops_says_how_fast_and_what_was_refused():
    shape = "16x128"
    ratios = {"p20": 0.5, "p50": 0.8, "p80": 1.25}
    paired = [
        row("routed_adapter", "reference", shape, "time_p50", 2000.0),
        *(row("routed_adapter", "reference", shape, f"ratio_{p} to bmm", value) for p, value in ratios.items()),
        row("merge", "reference", shape, "time_p50", 20.0),
    ]
    alone = [
        row("ceiling/copy", "torch", "routed_adapter", "bandwidth", 17.0),
        row("routed_adapter/forward", "reference", shape, "floor_share", 0.1),
        row("routed_adapter/both", "reference", shape, "floor_share", 0.634),
        row("routed_adapter/both", "bmm", shape, "floor_share", 0.2),
        row("routed_adapter", "grouped_mm", shape, "refused", 1),
    ]
    made = readme_ops.table(paired, alone, "the command")
    assert "| routed_adapter, 16x128 | 2.0 ms | 63% | bmm 1.25x (0.80 to 2.00) |" in made
    assert "| merge, 16x128 | 20 us |  |  |" in made
    assert "grouped_mm at routed_adapter, 16x128" in made
    assert "`the command`, commit abc." in made
    assert readme_ops.table([], alone, "the command") == ""


def test_the_pictures_show_the_committed_rows():
    paths = plot.measured()
    assert paths
    for path in paths:
        pictures = plot.pictures(path)
        assert pictures, f"python -m benchmarks.plot: {path} has none"
        for picture in pictures:
            assert plot.digest_in(picture) == plot.digest(record.read(path)), f"python -m benchmarks.plot: {picture}"


def test_every_csv_has_the_schema_or_is_another_table():
    names = {path.name for path in goals.RESULTS.rglob("*.csv") if record.has_schema(path)}
    assert {"step_cpu.csv", "step_cpu_earlier.csv"} <= names
    first = "op,backend,shape,dtype,metric,unit,value,gpu_name,torch,triton,driver,commit,date"
    assert ",".join(record.COLUMNS).startswith(first)


def test_every_goal_of_the_issues_has_a_row():
    made = all_goals()
    assert len({goal.id for goal in made}) == len(made)
    by_line = {line: [g for g in made if g.id.startswith(f"{line}.")] for line in LINES}
    assert {line: len(found) for line, found in by_line.items()} == LINES
    limits = {(g.limit, g.at_least) for g in made}
    assert limits >= {(0.8, True), (0.65, True), (2, True), (3, True), (1.5, True), (1.05, False), (1.03, False)}


def test_without_rows_nothing_is_measured():
    assert {v.state for v in evaluate([])} == {"not measured"}


def test_a_goal_is_met_or_missed_by_how_much():
    shape = sizes.ADAPTER_64K.words
    rows = [row("routed_adapter/forward", "triton", shape, "copy_share", 0.9)]
    assert verdict(rows, "3.9.1").state == "met"
    missed = verdict([row("routed_adapter/forward", "triton", shape, "copy_share", 0.6)], "3.9.1")
    assert (missed.state, missed.value) == ("missed", 0.6)
    assert missed.words.startswith("missed by 25.0%")
    # The best backend counts, and the latest of two runs.
    rows += [row("routed_adapter/forward", "reference", shape, "copy_share", 0.1)]
    rows += [row("routed_adapter/forward", "triton", shape, "copy_share", 0.7, date="2026-02-01T00:00Z")]
    assert verdict(rows, "3.9.1").value == 0.7


def test_a_goal_for_the_gpu_takes_no_other_rows():
    shape = sizes.ADAPTER_64K.words
    for gpu_name in ("", "a test L4"):
        rows = [row("routed_adapter/forward", "triton", shape, "copy_share", 0.9, gpu_name=gpu_name)]
        assert verdict(rows, "3.9.1").state == "not measured"
    other = sizes.ADAPTER_8K.words
    assert verdict([row("routed_adapter/forward", "triton", other, "copy_share", 0.9)], "3.9.1").state == "not measured"


def test_speedups_compare_like_with_like():
    shape = sizes.ADAPTER_8K.words
    eager = [
        row("routed_adapter/both", "triton", shape, "time_p50", 10.0),
        row("routed_adapter/both", "compile_gathered_bmm", shape, "time_p50", 25.0),
    ]
    assert verdict(eager, "3.9.3").value == 2.5
    assert verdict(eager, "3.9.4").state == "not measured"
    refused = [eager[0], row("routed_adapter", "compile_gathered_bmm", shape, "refused", 1, note="errs by 1")]
    assert verdict(refused, "3.9.3").words == "not measured: compile_gathered_bmm refused: errs by 1"


def test_faster_than_leaves_out_equal():
    shape = sizes.LOSS_GPT2.words
    rows = [row("adamix_loss/both", name, shape, "time_p50", 10.0) for name in ("triton", "liger_kldiv_x2")]
    assert verdict(rows, "5.5.3").state == "missed"
    rows[1] = row("adamix_loss/both", "liger_kldiv_x2", shape, "time_p50", 10.1)
    assert verdict(rows, "5.5.3").state == "met"
    assert verdict(rows, "5.5.3").goal.threshold == "> 1"


def test_steps_and_serving():
    shape = sizes.STEPS["gpu"]["bert-base"][0].words
    rows = [
        row("step/adamix/eager", "triton", shape, "time_p50", 42.0),
        row("step/adamix/graph", "triton", shape, "time_p50", 20.0),
        row("step/plain_adapter/eager", "torch", shape, "time_p50", 41.0),
        row("step/plain_adapter/graph", "torch", shape, "time_p50", 19.0),
        row("step/original/eager", "torch", shape, "time_p50", 50.0),
    ]
    assert verdict(rows, "6.4.1").state == "met"
    assert verdict(rows, "6.4.2").words.startswith("missed by 0.3%")
    assert verdict(rows, "6.4.11").value == 2.5
    assert "triton eager 1.19x" in verdict(rows, "6.4.11").words
    served = sizes.INFERENCE["gpu"][0].words
    rows = [
        row("inference/merged_lora", "torch", served, "time_p50", 1.001),
        row("inference/base", "torch", served, "time_p50", 1.0),
        row("inference/merged_adapter", "triton", served, "graph_time_p50", 2.2),
        row("inference/hand_fused_adapter", "torch", served, "graph_time_p50", 2.0),
    ]
    assert verdict(rows, "6.4.15").state == "met"
    assert verdict(rows, "6.4.16").state == "missed"


def test_mixtures_and_decoding():
    dense, _, arrow = sizes.MIXTURE["gpu"]
    (decoded,) = sizes.DECODE["gpu"]
    rows = [
        row("mixture/forward", "reference", dense.words, "time_p50", 90.0),
        row("mixture/forward", "triton", dense.words, "time_p50", 30.0),
        row("mixture/forward", "loop", dense.words, "time_p50", 120.0),
        row("mixture/forward", "cuda", dense.words, "graph_time_p50", 25.0),
        row("mixture/forward", "einsum", dense.words, "graph_time_p50", 75.0),
        row("mixture/both", "cuda", arrow.words, "graph_time_p50", 20.0),
        row("mixture", "peft arrow", arrow.words, "absent", 1, note="No module named 'peft'"),
        row("decode/LoRAMoE", "cuda", decoded.words, "time_p50", 11.4),
        row("decode/base", "torch", decoded.words, "time_p50", 10.0),
        row("decode/MoLA top-2", "triton", decoded.words, "graph_time_p50", 2.4),
        row("decode/base", "torch", decoded.words, "graph_time_p50", 2.0),
    ]
    found = {v.goal.text: v for v in evaluate(rows) if v.goal.id.startswith("24.7.")}
    assert found["mixture layer, dense, forward, over loop, eager"].value == 4
    assert found["mixture layer, dense, forward, over einsum, replayed"].words.startswith("missed by 14.3%")
    assert found["mixture layer, dense, both, over einsum, replayed"].state == "not measured"
    assert "No module named 'peft'" in found["mixture layer, arrow top-2, both, over peft arrow, replayed"].words
    assert found["a decoded token, LoRAMoE over its base"].words == "met (cuda 11.4 ms, base 10 ms, eager)"
    assert found["a decoded token, MoLA top-2 over its base"].value == 1.2
    assert found["a decoded token, HydraLoRA over its base"].state == "not measured"


def test_the_goals_of_mixtures_are_half_of_what_the_counted_bytes_say():
    rows = record.read(mixtures.TABLE)
    moved = {(r.op, r.shape.partition(" 4x")[0], r.backend): r.value for r in rows if r.metric == "moved"}
    assert {kind: set(peers) for kind, peers in goals.MIXTURE_LIMITS.items()} == {k: set(p) for k, p in PEERS.items()}
    for kind, peers in goals.MIXTURE_LIMITS.items():
        for peer, limits in peers.items():
            for op, limit in zip(("mixture/forward", "mixture/forward+backward"), limits):
                said = moved[op, kind, peer] / moved[op, kind, "adamix"]
                half = said / 2 // 0.5 * 0.5
                assert limit == (3 if peer == "loop" else half), (kind, peer, op, said)


def test_launches_and_memory():
    small, head = sizes.GLUE[0].words, sizes.HEAD_MEMORY.words
    rows = [
        row("adamix_loss/forward", "triton", small, "launches", 1),
        row("adamix_loss/forward", "reference", small, "launches", 20),
        row("linear_adamix_loss/both", "triton", head, "peak_memory", 149.0),
        row("linear_adamix_loss/both", "formula", head, "peak_memory", 1000.0),
    ]
    assert verdict(rows, "5.5.9").state == "met"
    assert verdict(rows, "5.2.1").value == pytest.approx(0.149)
    # Where there is no GPU's figure, memory may be counted on the CPU; a time may not.
    cpu = [row(r.op, "reference" if "loss" in r.op and r.value == 149.0 else r.backend, head, r.metric, 2 * r.value,
               gpu_name="") for r in rows[2:]]  # fmt: skip
    assert verdict(cpu, "5.2.1").state == "met"
    assert verdict(rows + cpu, "5.2.1").words.startswith("met (triton 149 MiB")


def test_a_spread_across_the_goal_is_told():
    shape = "32x64 M4 r48 all-MiniLM-L6-v2"

    def rows(high):
        values = {"p20": 0.9, "p50": 1.0, "p80": high}
        return [
            row("step/adamix", "reference", shape, f"ratio_{p} to step/original", v, gpu_name="", dtype="float32")
            for p, v in values.items()
        ]

    assert "not settled" in verdict(rows(1.2), "2.8.3").words
    assert "not settled" not in verdict(rows(1.01), "2.8.3").words


def test_pictures_are_drawn_from_rows(tmp_path):
    shape = sizes.ADAPTER_8K.words
    rows = [
        row("ceiling/copy", "torch", "x", "bandwidth", 4000.0, dtype="uint8"),
        row("ceiling/matmul", "torch", "x", "throughput", 700.0),
    ]
    for name, time in (("triton", 10.0), ("gathered_bmm", 30.0)):
        rows.append(row("routed_adapter/both", name, shape, "time_p50", time))
        rows.append(row("routed_adapter/both", name, shape, "bandwidth", 20000 / time))
        rows.append(row("routed_adapter/both", name, shape, "throughput", 100 / time))
    (bar,) = plot.op_bars(rows)
    assert (bar.label, bar.value) == ("gathered_bmm", 3.0)
    scattered, copy, product = plot.points(rows)
    assert (copy, product) == (4e12, 7e14)
    assert {p.backend: p.throughput for p in scattered} == pytest.approx({"triton": 1e13, "gathered_bmm": 1e14 / 30})
    path = tmp_path / "gpu.csv"
    record.write(path, rows)
    drawn = plot.draw(path)
    assert [p.name for p in drawn] == ["gpu_speedup.png", "gpu_roofline.png"]
    assert drawn == plot.pictures(path)
    paired = tmp_path / "gpu_paired.csv"
    paired.touch()
    assert [p.name for p in plot.draw(path)] == ["gpu_roofline.png"]
    paired.unlink()
    assert {plot.digest_in(p) for p in drawn} == {plot.digest(record.read(path))}
    record.write(path, rows[:2])
    assert plot.draw(path) == []


def test_bars_of_paired_steps_turn_the_ratio_round():
    ratios = {"p20": 0.5, "p50": 0.8, "p80": 1.25}
    rows = [row("step/adamix", "reference", "2x16", f"ratio_{p} to step/original", v) for p, v in ratios.items()]
    (bar,) = plot.paired_bars(rows)
    assert (bar.group, bar.low, bar.value, bar.high) == ("2x16", 0.8, 1.25, 2.0)
    assert "published" in bar.label
    (bar,) = plot.paired_bars([row("merge", "reference", "24 layers", "ratio_p50 to foreach", 0.5)])
    assert (bar.group, bar.label, bar.low, bar.value) == ("merge, 24 layers", "foreach", None, 2.0)


def test_a_commit_is_dirty_by_sources_and_not_by_results(tmp_path):
    assert record.commit(tmp_path / "results") == ""
    for name in ("source.py", "benchmarks/results/rows.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "both"]):
        subprocess.run([*git, *command], check=True)
    results = tmp_path / "benchmarks/results"
    clean = record.commit(results)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (results / "rows.csv").write_text("after")
    assert record.commit(results) == clean
    (tmp_path / "source.py").write_text("after")
    assert record.commit(results) == f"{clean}-dirty"
