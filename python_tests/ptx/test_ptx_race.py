"""The gate sees the race of Triton's pipeliner on sm_90, in the smallest kernel that has it."""

# ruff: noqa: E402 (the module is skipped before it imports what needs a compiler)

import pytest
from ptx_programs import needs_ptx

needs_ptx()

import triton

from ptx.race import VERSION, observe, verdict


def test_a_tile_used_in_registers_and_by_a_dot_is_overwritten_while_it_is_read():
    seen = observe("tile", stages=3)
    assert verdict(triton.__version__, bool(seen.reports)) is None, verdict(triton.__version__, False)
    assert any("wgmma reads under a cp.async in flight" in report for report in seen.reports)
    assert any("write after another warp's read" in report for report in seen.reports)
    assert not seen.error < 1e-2  # NaN where the copy has not landed


@pytest.mark.parametrize(("sum_from", "stages"), [("again", 3), ("none", 3), ("tile", 1)])
def test_a_load_of_its_own_or_no_pipeline_is_sound(sum_from, stages):
    seen = observe(sum_from, stages)
    assert seen.reports == []
    assert seen.error < 1e-6


def test_the_older_architecture_has_no_such_dot():
    assert observe("tile", 3, arch=80).reports == []


def test_a_triton_without_the_race_is_told():
    assert verdict(VERSION, True) is None
    assert "can be lifted" in verdict("9.9", False)
