"""What Triton drops from loops is found in a kernel's TTIR, and nothing else is."""

import importlib.util

import pytest

from benchmarks.aot.loops import lost

# Of each expert's samples, those of this split; %number counts the samples that were passed.
NESTED = """
  tt.func public @k(%index: !tt.ptr<i64>, %log: !tt.ptr<i32>, %first: i32, %stop: i32, %begin: i32, %tiles: i32) {
    %zero = arith.constant 0 : i32
    %one = arith.constant 1 : i32
    %number = scf.for %b = %first to %stop step %one iter_args(%count = %zero) -> (i32)  : i32 {
      %ahead = arith.muli %count, %tiles : i32
      %low = arith.subi %begin, %ahead : i32
      %count_1 = arith.addi %count, %one : i32
      scf.for %tile = %low to %tiles step %one  : i32 {
        %at = tt.addptr %log, WHERE : !tt.ptr<i32>, i32
        tt.store %at, %tile : !tt.ptr<i32>
      }
      scf.yield %count_1 : i32
    }
    tt.return
  }
"""


@pytest.mark.parametrize(("where", "names"), [("%tile", ["%count"]), ("%ahead", []), ("%count_1", [])])
def test_a_variable_that_an_inner_loops_bounds_alone_need(where, names):
    assert [name.split("@")[0] for name in lost(NESTED.replace("WHERE", where))] == names


def test_a_variable_that_is_named_behind_the_loop_stays():
    assert lost(NESTED.replace("WHERE", "%tile").replace("tt.return", "tt.store %log, %number : !tt.ptr<i32>")) == []


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is missing")
def test_compiling_a_kernel_names_what_it_lost(monkeypatch):
    from benchmarks.aot import compile as aot_compile

    key = next(key for key in aot_compile._by_key() if key[0] == "pair_count_kernel")
    assert aot_compile.compile_keys([key])[1] == []
    monkeypatch.setattr(aot_compile, "lost", lambda ttir: ["%number"])
    (found,) = aot_compile.compile_keys([key])[1]
    assert "pair_count_kernel" in found
    assert "%number" in found
