"""make ptx: what it chooses, what it fails for, what a test under the plugin sees; traffic; the comparison, small."""

# ruff: noqa: E402 (the module is skipped before it imports what needs a compiler)

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ptx_programs import needs_ptx

needs_ptx()

import triton
import triton.language as tl

from ptx import build, gate
from ptx import compare as comparison
from ptx.compare import Cell, compare
from ptx.gate import ARCHITECTURES, Part, chosen, in_turn
from ptx.host import Host
from ptx.program import How
from ptx.traffic import traffic

ROOT = Path(__file__).parents[2]
GOOD = {"run": 3, "failed": 0, "variants": 2, "kernels": ["a_kernel"], "left_out": {"for a reason": 4}}


def parts(**changes):
    return [Part("tests", 80, 0, GOOD | changes, 1.0), Part("fuzz", 80, 0, GOOD, 1.0)]


def test_the_gate_says_what_was_left_out_and_passes(capsys):
    assert gate.report(parts(), [80], {"a_kernel"}, 2.0) == 0
    assert "4 left out: for a reason" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (parts(run=0), "no tests ran"),
        (parts(failed=1), "the tests failed"),
        (parts(kernels=["another_kernel"])[:1], "a_kernel was not reached"),
        ([Part("tests", 80, 5, {}, 1.0)], "exit status 5"),
        ([Part("fuzz", 80, 1, GOOD, 1.0)], "the fuzz failed"),
    ],
)
def test_the_gate_fails(given, said, capsys):
    assert gate.report(given, [80], {"a_kernel"}, 2.0) == 1
    assert said in capsys.readouterr().err


def test_an_architecture_without_a_kernel_fails_alone(capsys):
    assert gate.report(parts(), [80, 90], {"a_kernel"}, 2.0) == 1
    assert "sm_90: a_kernel was not reached" in capsys.readouterr().err


def test_a_compiler_that_is_missing_or_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PTX_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.EngineError, match=r"needs g\+\+ 12 or newer: g\+\+ does not run"):
        build.engine.__wrapped__()
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = -dumpfullversion ] && echo 9.0 && exit\necho no such standard\nexit 1\n')
    compiler.chmod(0o755)
    with pytest.raises(build.EngineError, match=r"(?s)needs g\+\+ 12 or newer: .*no such standard"):
        build.engine.__wrapped__()


TESTS = """
import torch
import triton
import triton.language as tl
import pytest
from ptx.plugin import HOST


@triton.jit
def copy_kernel(x, y, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i), mask=i < n)


def run(size):
    x, y = torch.arange(60.0), torch.zeros(60)
    HOST.launch(copy_kernel, (1,), x, y, 60, SIZE=size)
    assert torch.equal(x, y)


@pytest.mark.parametrize("n", [*range(99), pytest.param(99, id="chosen-256 columns of float32")])
def test_a_few_of_many(n):
    HOST.launch(copy_kernel, (1,), torch.zeros(64), torch.zeros(64), 64, SIZE=64)


def test_beyond_the_end():
    run(64)


def test_opcheck_is_of_pytorch():
    raise AssertionError
"""


def under_the_plugin(folder, text, **variables):
    (folder / "test_some.py").write_text(text)
    record = folder / "record"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PTX_RECORD": str(record), "PTX_SIZE": "small"} | variables
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ptx.plugin", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done, json.loads(record.read_text())


def test_a_report_fails_the_test_that_caused_it(tmp_path):
    done, record = under_the_plugin(tmp_path, TESTS, PTX_ARCH="80")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "copy_kernel: global load out of bounds" in done.stdout
    assert (record["run"], record["failed"], record["kernels"]) == (2, 1, ["copy_kernel"])
    assert record["left_out"] == {
        "further parametrisations, and what the other architecture runs: make ptx-nightly": 98,
        "of PyTorch, not of the kernels": 1,
    }


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_each_architecture_runs_what_the_other_does_not(before):
    few, one = chosen(100), chosen(1)
    shares = [in_turn(few, arch, before) for arch in ARCHITECTURES]
    assert len(few) == 3
    assert set.union(*shares) < few
    assert list(map(len, shares)) == [1, 1]
    assert not set.intersection(*shares)
    alone = [in_turn(one, arch, before) for arch in ARCHITECTURES]
    assert alone == [{0} if before % 3 == share else set() for share in (0, 1)]


def test_tests_that_launch_nothing_fail_as_a_whole(tmp_path):
    done, record = under_the_plugin(tmp_path, "def test_nothing():\n    pass\n")
    assert done.returncode == 5
    assert record["launches"] == 0


@triton.jit
def strided_kernel(x, y, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i * STRIDE))


@pytest.mark.parametrize(("stride", "sectors"), [(1, 128), (8, 1024)])
def test_traffic_counts_sectors_against_the_least(stride, sectors):
    host = Host(80, orders=(How(races=False, statistics=True),))
    # Aligned to a sector, as a GPU's allocations are.
    whole = torch.zeros(8192 + 8)
    x = whole[(-whole.data_ptr() // 4) % 8 :][:8192]
    host.launch(strided_kernel, (1,), x, torch.zeros(1024), STRIDE=stride, SIZE=1024)
    found = traffic(host.launches[0])
    assert (found.loads.have, found.loads.least) == (sectors, 128)
    assert found.read == 32 * sectors
    assert [what.split(" ")[0] for what, _ in found.waste if "ld.global" in what] == ["ld.global"] * (stride == 8)


@pytest.mark.nightly
def test_three_implementations_give_one_answer():
    names = ["reference", "interpreted", "ptx80"]
    table = compare(names, ["merge_experts", "router"], 2)
    for row in table.values():
        assert list(row) == names
        for cell in row.values():
            assert (cell.calls, cell.failures) == (2, [])
            assert cell.share <= 1


def test_a_wrong_implementation_is_named(monkeypatch, capsys):
    calls = {"ptx80": [{"share": 0.2, "error": ""}, {"share": 0.0, "error": "result 0: error"}]}
    found = {
        name: {"merge_lora": {"drawn": ["a", "b"], "calls": calls.get(name, [{"share": 0.5, "error": ""}] * 2)}}
        for name in ("reference", "ptx80")
    }
    monkeypatch.setattr(comparison, "_run", lambda name, *rest: found[name])
    monkeypatch.setattr(comparison, "missing", lambda name: None)
    assert comparison.main(["--cases", "2", "--ops", "merge_lora", "--only", "reference", "ptx80"]) == 1
    printed = capsys.readouterr()
    assert "1 NOT SO" in printed.out
    assert "ptx80: result 0: error" in printed.err
    found["ptx80"]["merge_lora"]["drawn"] = ["a", "c"]
    with pytest.raises(RuntimeError, match="ptx80 drew other calls than reference"):
        compare(["reference", "ptx80"], ["merge_lora"], 2)


def test_a_cell_says_how_much_of_the_budget():
    assert str(Cell(3, 0.25)) == "0.25"
    assert str(Cell(3, 0.25, ["no"])) == "1 NOT SO"
