"""What the README and docs/performance.md say of host time is what benchmarks/results/host_cpu.csv says."""

import csv

import pytest

pytest.importorskip("matplotlib")

from benchmarks.measure import record
from benchmarks.measure.record import Row
from benchmarks.readme import __main__ as readme
from benchmarks.readme import host as readme_host

NOTE = "thread time, rounds=7 of calls, 3 of steps, load_after=2.5"


def rows_of(name, backend, values, unit="torch.add", metric="host"):
    common = dict(shape="", dtype="bfloat16", gpu_name="", torch="2.13.0", triton="3.6.0", driver="", commit="abc")
    return [
        Row(f"host/{name}", backend, metric=f"{metric}_{p}", unit=unit, value=value, date="", cpu_name="a CPU",
            note=NOTE, **common)
        for p, value in zip(("p20", "p50", "p80"), values)
    ]  # fmt: skip


def call(name, backend, *values):
    return rows_of(name, backend, values) + rows_of(name, backend, [2 * v for v in values], unit="us")


def step(name, backend, *values):
    return rows_of(f"step of {name}", backend, values, unit="x", metric="ours over rest")


def test_every_measured_call_stands_in_the_page():
    with open(readme.HOST, newline="") as file:
        lines = list(csv.DictReader(file))
    page = readme.PAGE.read_text(encoding="utf-8")
    adds = {(r["op"], r["backend"], r["metric"]): float(r["value"]) for r in lines if r["unit"] == "torch.add"}
    medians = [key for key in adds if key[2] == "host_p50"]
    assert len(medians) >= 38
    for op, backend, _ in medians:
        low, middle, high = (adds[op, backend, f"host_{p}"] for p in ("p20", "p50", "p80"))
        assert f" {middle:.1f} ({low:.1f} to {high:.1f})" in page, (op, backend)
    shares = [float(r["value"]) for r in lines if r["metric"] == "ours over rest_p50"]
    assert len(shares) == 4
    for share in shares:
        assert f"| {share:.0%} (" in page
    assert {r["commit"] for r in lines} <= set(page.replace(",", " ").replace(".", " ").split())
    for backend, title in (("triton", "Triton"), ("cuda", "C++/CUDA")):
        both = adds["host/routed_adapter, forward + backward", backend, "host_p50"]
        assert f"{both:.0f} in {title}" in readme.section()


def test_the_goals_are_of_calls_that_are_measured():
    found = readme_host.calls(record.read(readme.HOST))
    assert {(name, backend) for name, of in readme_host.GOALS.items() for backend in of} <= found.keys()
    assert [found["routed_adapter", "triton"][mode].goal for mode in readme_host.MODES] == [18, 28, 85]
    assert [found["routed_lora", "cuda"][mode].goal for mode in readme_host.MODES] == [9, 18, 55]
    assert found["adamix_loss 64x2", "cuda"]["forward + backward"].goal == 75
    assert found["merge_banks, 96 banks", "triton"]["forward"].goal == 80
    assert found["merge_experts", "triton"]["forward"].goal is None


def test_met_missed_and_not_settled():
    rows = [
        *call("routed_adapter, forward", "triton", 10, 12, 14),
        *call("routed_adapter, forward with grad", "triton", 20, 27.96, 30),
        *call("routed_adapter, forward + backward", "triton", 90, 99, 110),
        *call("routed_adapter, forward + backward", "cuda", 40, 56, 60),
        *call("merge_banks, 96 banks", "triton", 81, 82, 83),
        *call("merge_experts", "triton", 1, 2, 3),
        *step("a model", "cuda", 0.1, 0.12, 0.14),
    ]
    table = readme_host.table(rows)
    assert (
        "| routed_adapter | Triton | 12.0 (10.0 to 14.0), goal 18: met "
        "| 28.0 (20.0 to 30.0), goal 28: met, not settled | 99.0 (90.0 to 110.0), goal 85: **missed** |" in table
    )
    assert "| routed_adapter | C++/CUDA |  |  | 56.0 (40.0 to 60.0), goal 55: **missed**, not settled |" in table
    assert "| merge_experts | Triton | 2.0 (1.0 to 3.0) |  |  |" in table
    assert "| a model | C++/CUDA | 12% (10% to 14%), goal 15%: met |" in table
    words = " ".join(table.split())
    assert "3 of 6 goals are met; missed by routed_adapter, merge_banks in Triton. Of 2 the spread" in words
    assert "one took about 2.0 us" in words
    assert "--rounds 7 --steps 3 " in words
    assert "done: 2.5." in words
    assert "commit abc." in words
    said = " ".join(readme_host.sentence(rows).split())
    assert "56 in C++/CUDA, 99 in Triton; 3 of 6 goals are met, of whole steps 1 of 1 (" in said
    assert "no GPU figure" in said


def test_all_met_names_nobody():
    rows = call("routed_lora, forward", "cuda", 1, 2, 3)
    assert "1 of 1 goals are met. None of them" in " ".join(readme_host.table(rows).split())
    assert "our calls in a step" not in readme_host.table(rows)
    assert readme_host.sentence(rows) == ""  # the README names routed_adapter
    assert readme_host.table([]) == readme_host.sentence([]) == ""


def test_a_changed_figure_changes_both_files(monkeypatch, tmp_path):
    rows = record.read(readme.HOST)
    changed = [
        Row(
            **{**vars(r), "value": 123.4 if r.metric == "host_p50" and r.op.endswith("forward + backward") else r.value}
        )
        for r in rows
    ]
    section, page = readme.section(), readme.page()
    record.write(tmp_path / "host.csv", changed)
    monkeypatch.setattr(readme, "HOST", tmp_path / "host.csv")
    assert "123.4 (" in readme.page()
    assert "123 in Triton" in readme.section()
    record.write(tmp_path / "host.csv", rows)
    assert (readme.section(), readme.page()) == (section, page)
