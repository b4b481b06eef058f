"""The ahead-of-time gate: what the committed table may hold, that it is whole, and that compiling gives it again."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from once import once
from suite_size import NIGHTLY

from benchmarks.aot import __main__ as aot
from benchmarks.aot import table as aot_table
from benchmarks.aot.table import (
    SHARED_LIMITS,
    Row,
    crowded,
    differences,
    hardest,
    mismatches,
    problems,
    read,
    spilled,
    unchanged,
    write,
)

ROOT = Path(__file__).parents[2]
IMPLEMENTED = sorted((ROOT / "adamix_kernels" / "ops").glob("*/triton_impl"))
OPS = [folder.parent.name for folder in IMPLEMENTED]
TABLE = read(aot_table.TABLE)
BY_DAY = 1
GOOD = Row("a_kernel", "bfloat16", "sample", "64x128 w4 s3", 90, 100, 0, 4096, 0, "wgmma", "0123", "3.6.0")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is missing")


def _run(tmp_path_factory, *arguments):
    """(rows that python -m benchmarks.aot wrote, how it ended); in a process of its own, which interprets nothing."""
    folder = once(tmp_path_factory, f"aot{arguments[0]}", lambda folder: compiled(folder, arguments))
    status, said = (folder / "ended").read_text().split("\n", 1)
    return read(folder / "rows.csv"), int(status), said


def compiled(folder, arguments):
    out = folder / "rows.csv"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "ADAMIX"))}
    command = [sys.executable, "-m", "benchmarks.aot", *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert out.exists(), done.stdout + done.stderr
    (folder / "ended").write_text(f"{done.returncode}\n{done.stdout}")


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return _run(tmp_path_factory, "--list")


@pytest.fixture(scope="module")
def recompiled(tmp_path_factory):
    return _run(tmp_path_factory, "--hardest", *([] if NIGHTLY else [str(BY_DAY), "--target", "90"]))


def test_the_table_breaks_no_limit():
    assert TABLE
    assert problems(TABLE) == []
    assert {row.target for row in TABLE} == set(SHARED_LIMITS)
    assert {row.dtype for row in TABLE} == {"float16", "bfloat16", "float32"}


@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_every_dot_of_16_bits_is_on_tensor_cores(target):
    kinds = {row.mma for row in TABLE if row.target == target and row.dtype != "float32"} - {""}
    allowed = {80: {"mma.sync"}, 90: {"mma.sync", "wgmma"}, 100: {"mma.sync", "tcgen05"}, 120: {"mma.sync"}}
    assert kinds
    assert {kind for kinds_of_row in kinds for kind in kinds_of_row.split("+")} <= allowed[target]


def test_routed_kernels_do_their_work_in_dots():
    families = ("adapter_", "lora_")
    assert {row.kernel for row in TABLE if not row.mma and row.kernel.startswith(families)} == {
        "adapter_plane_sum_kernel",
        "lora_sum_kernel",
    }


@needs_triton
def test_table_and_cases_are_the_same_set(listed):
    rows, status, said = listed
    assert status == 0, said
    assert {row.key for row in rows} == {row.key for row in TABLE}
    assert len(rows) == len(TABLE)
    assert all(row.registers is None and row.source for row in rows)


@needs_triton
@pytest.mark.parametrize("op", [f.parent.name for f in IMPLEMENTED if (f / "tables.py").exists()])
def test_every_shipped_configuration_is_compiled(op):
    tables = importlib.import_module(f"adamix_kernels.ops.{op}.triton_impl.tables").TABLES
    assert tables
    sizes = {"float16": 2, "bfloat16": 2, "float32": 4}
    for name, table in tables.items():
        for target in SHARED_LIMITS:
            arch = max(a for a in table if a <= target)
            have = {
                (sizes[r.dtype], r.config.partition(" r")[0]) for r in TABLE if r.kernel == name and r.target == target
            }
            for (itemsize, width), (rows, cols, warps, stages) in table[arch].items():
                config = f"{rows}x{cols} w{warps} s{stages}"
                assert (itemsize, config) in have, f"{name} sm_{target} {itemsize}x{width}: {config} is not compiled"


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_of_the_package_is_compiled(op):
    folder = ROOT / "adamix_kernels" / "ops" / op / "triton_impl"
    names = {
        line.removeprefix("def ").partition("(")[0]
        for path in folder.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.partition("(")[0].endswith("_kernel")
    }
    assert names
    assert names <= {row.kernel for row in TABLE}


@needs_triton
def test_the_hardest_cases_compile_to_the_committed_figures(recompiled):
    """For sm_90 those that need the most registers; the others, and other GPUs', the night compiles."""
    rows, status, said = recompiled
    wanted = hardest(TABLE) if NIGHTLY else hardest((row for row in TABLE if row.target == 90), BY_DAY)
    assert status == 0, said
    assert problems(rows) == []
    assert {row.key for row in rows} == {row.key for row in wanted}
    assert all(row.registers > 0 for row in rows)
    if {row.triton for row in rows} != {row.triton for row in TABLE}:
        pytest.skip(f"limits hold; figures are those of triton {TABLE[0].triton}, here is {rows[0].triton}")
    assert rows == wanted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(spills=41), "41 spilled registers, 40 at most"),
        (dict(shared_bytes=232_449), "232449 B shared memory, 232448 at most"),
        (dict(target=80, shared_bytes=166_913), "166912 at most"),
        (dict(target=120, shared_bytes=101_377), "101376 at most"),
        (dict(target=100, tensor_columns=513), "513 columns of tensor memory"),
        (dict(registers=255, config="64x128 w16 s3"), "131072 registers a block, 65536 at most"),
        (dict(mma="fma"), "without a tensor-core instruction"),
        (dict(mma="wgmma+fma"), "without a tensor-core instruction"),
    ],
)
def test_a_broken_limit_is_named(change, words):
    assert problems([GOOD, replace(GOOD, dtype="float32", mma="fma"), replace(GOOD, spills=24)]) == []
    assert spilled([GOOD]) == []
    assert "24 of 100 registers are spilled" in spilled([replace(GOOD, spills=24)])[0]
    (found,) = problems([GOOD, replace(GOOD, **change)])
    assert words in found
    assert "a_kernel bfloat16 sample" in found


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, 4),  # 104 registers of 128 threads
        (dict(registers=40), 12),
        (dict(registers=16), 16),  # warps
        (dict(registers=16, target=120), 12),
        (dict(registers=16, shared_bytes=50_000), 4),
        (dict(registers=16, shared_bytes=50_000, target=80), 3),
        (dict(registers=16, config="64x128 w1 s3"), 32),
        (dict(registers=16, target=100, tensor_columns=256), 2),
    ],
)
def test_blocks_on_a_multiprocessor(change, blocks):
    row = replace(GOOD, **change)
    assert row.resident == blocks
    assert crowded([row], {row.key: blocks}) == crowded([row], {}) == []
    (found,) = crowded([row], {row.key: blocks + 1})
    assert f"{blocks} blocks on a multiprocessor, the plan counts on {blocks + 1}" in found


@needs_triton
def test_the_table_holds_what_the_plans_count_on():
    from benchmarks.aot.compile import described

    counted_on = {row.key: case.resident for row, case in described()}
    assert max(counted_on.values()) > 1
    assert crowded(TABLE, counted_on) == []


def test_a_row_too_many_too_few_or_stale_is_named():
    other = replace(GOOD, case="token")
    assert mismatches([GOOD, other], [other, GOOD]) == []
    assert "no such case" in mismatches([GOOD, other], [GOOD])[0]
    assert "not in the table" in mismatches([GOOD], [GOOD, other])[0]
    assert "source has changed" in mismatches([GOOD], [replace(GOOD, source="4567")])[0]
    assert "the table has 64x128 w4 s3" in mismatches([GOOD], [replace(GOOD, config="32x64 w4 s3")])[0]
    assert "two rows" in mismatches([GOOD, GOOD], [GOOD])[0]


def test_figures_are_compared_within_one_triton_version():
    assert differences([GOOD], [GOOD]) == []
    assert "registers 99, the table has 100" in differences([GOOD], [replace(GOOD, registers=99)])[0]
    assert differences([GOOD], [replace(GOOD, registers=99, triton="3.7.0")]) == []
    assert unchanged(GOOD, replace(GOOD, registers=1))
    assert not any(unchanged(GOOD, replace(GOOD, **{n: "x"})) for n in ("source", "config", "triton"))
    assert not unchanged(GOOD, None)


def test_hardest_takes_most_registers_of_each_kernel_dtype_size_and_target():
    big, other = replace(GOOD, case="wide", registers=200, dtype="float16"), replace(GOOD, target=80)
    wide = replace(GOOD, dtype="float32")
    assert hardest([GOOD, big, other, wide]) == sorted([big, other, wide], key=lambda row: row.key)
    assert hardest([GOOD, big, other, wide], 1) == [max(big, other, wide, key=lambda row: row.registers)]
    # Among equals the choice does not depend on the order.
    twin = replace(GOOD, case="another")
    assert hardest([GOOD, twin]) == hardest([twin, GOOD]) == [twin]


def test_rows_survive_the_csv(tmp_path):
    rows = [GOOD, replace(GOOD, registers=None, spills=None, shared_bytes=None, tensor_columns=None, mma="")]
    write(tmp_path / "deep" / "t.csv", rows)
    assert read(tmp_path / "deep" / "t.csv") == rows
    assert os.listdir(tmp_path / "deep") == ["t.csv"]
    (tmp_path / "bad.csv").write_text("kernel,dtype\n")
    with pytest.raises(ValueError, match="got columns"):
        read(tmp_path / "bad.csv")


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main(["--list"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@needs_triton
def test_mma_kinds_are_read_from_the_code():
    from benchmarks.aot.compile import mma_kinds

    dot = "%d = tt.dot %a, %b, %c : tensor<16x32xf16> -> tensor<16x16xf32, {}>"
    assert mma_kinds(dot.format("#blocked"), "fma.rn.f32 %f1;") == "fma"
    assert mma_kinds(dot.format("#mma"), "mma.sync.aligned.m16n8k16.row.col.f32.bf16") == "mma.sync"
    assert mma_kinds(dot.format("#mma"), "mma.sync.aligned.m16n8k8.row.col.f32.tf32") == "mma.sync.tf32"
    both = "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16\n" + "mma.sync.aligned.m16n8k16.f32.f16"
    assert mma_kinds(dot.format("#blocked1"), both) == "mma.sync+wgmma+fma"
    assert mma_kinds("", "tcgen05.mma.cta_group::1.kind::tf32") == "tcgen05.tf32"
    assert mma_kinds("", "add.f32") == ""


@needs_triton
def test_fingerprints_follow_code_and_not_its_comments():
    from benchmarks.aot.compile import _tokens

    plain, names = _tokens('def f(a):\n    """Words."""\n    return g(a)  # why\n')
    assert _tokens("def f(a):\n\n    return g(a)\n") == (plain, names)
    assert names == ["a", "def", "f", "g", "return"]
    assert _tokens("def f(a):\n    return g(a + 1)\n")[0] != plain
    assert _tokens('def f(a):\n    return g(a, "x")\n')[0] != _tokens('def f(a):\n    return g(a, "y")\n')[0]
    assert _tokens("def f(a):\n  if a:\n    b()\n  c()\n")[0] != _tokens("def f(a):\n  if a:\n    b()\n    c()\n")[0]
