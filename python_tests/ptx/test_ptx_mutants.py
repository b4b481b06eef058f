"""Compiled kernels, broken one instruction at a time: the executor notices, and says what is wrong."""

# ruff: noqa: E402 (the module is skipped before it imports what needs a compiler)

import functools
from dataclasses import replace

import pytest
import torch
from ptx_programs import needs_ptx

needs_ptx()

import triton
import triton.language as tl

from ptx.host import ALL_ORDERS, Host
from ptx.mutants import KINDS, mutants
from ptx.program import Program
from ptx.text import UnknownPtxError


@triton.jit
def product_kernel(a, b, out, sums, n, m, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out = a b over n (a masked tail), rounded; and the sums of a's columns across warps."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, 64):
        k = start + tl.arange(0, 64)
        left = tl.load(a + r[:, None] * n + k[None, :], mask=(k < n)[None, :], other=0.0)
        right = tl.load(b + k[:, None] * m + c[None, :], mask=(k < n)[:, None] & (c < m)[None, :], other=0.0)
        acc = tl.dot(left, right, acc)
    for start in range(0, n, 64):
        k = start + tl.arange(0, 64)
        total += tl.sum(tl.load(a + r[:, None] * n + k[None, :], mask=(k < n)[None, :], other=0.0).to(tl.float32), 1)
    tl.store(out + r[:, None] * m + c[None, :], acc.to(tl.float16), mask=(c < m)[None, :])
    tl.store(sums + r, total)


N, M = 208, 48


@functools.cache
def launched(arch):
    """(Host with the compiled kernel, its key, the right results)."""
    host = Host(arch)
    want = run(host)
    assert host.reports == []
    a, b = given()
    torch.testing.assert_close(want[0].float(), a.float() @ b.float(), rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(want[1], a.float().sum(1), rtol=1e-5, atol=1e-4)
    (key,) = host.kernels
    return host, key, want


def given():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).half() for shape in ((64, N), (N, M))]


def run(host):
    a, b = given()
    out, sums = torch.full((64, M), float("nan")).half(), torch.full((64,), float("nan"))
    host.launch(product_kernel, (1,), a, b, out, sums, N, M, ROWS=64, COLS=64, num_warps=4, num_stages=3)
    return out, sums


# The check that must see a kind, None where other results tell; and whether a mutant may change nothing: a barrier of
# two in a row, the wait behind the last product, a mask that is true here, a store that another thread does too.
CHECKS = {
    "barrier dropped": ("race", True),
    "cp.async wait dropped": ("cp.async in flight", True),
    "cp.async wait one group late": ("cp.async in flight", True),
    "cp.async source size dropped": ("out of bounds", True),
    "wgmma wait dropped": ("wgmma", False),
    "wgmma wait one group late": ("wgmma", False),
    "wgmma commit dropped": ("wgmma", False),
    "load mask dropped": ("out of bounds", True),
    "store mask dropped": ("out of bounds", True),
    "load address far off": ("out of bounds", False),
    "store address far off": ("out of bounds", False),
    "copy address far off": ("out of bounds", False),
    "vector load misaligned": ("misaligned", False),
    "vector store misaligned": ("misaligned", False),
    "shared store dropped": (None, True),
    "load dropped": (None, True),
    "zero dropped": ("nobody set", True),
}


@functools.cache
def noticed(arch):
    """(kind -> how many mutants its check or, where it has none, other results showed; those that nothing showed)."""
    host, key, want = launched(arch)
    made, program, signature = host.kernels[key]
    orders, seen, missed = host.orders, {}, []
    host.orders = tuple(replace(how, limit=10**6) for how in ALL_ORDERS)
    try:
        for mutant in mutants(program.text, most=6):
            host.kernels[key] = made, Program(mutant.text), signature
            host.reports.clear()
            got = run(host)
            wrong = not all(torch.equal(one, other) for one, other in zip(got, want))
            check, _ = CHECKS[mutant.kind]
            by_check = wrong if check is None else any(check in report for report in host.reports)
            seen[mutant.kind] = seen.get(mutant.kind, 0) + by_check
            if not (wrong or host.reports):
                missed.append((mutant.kind, f"{mutant.kind}, PTX line {mutant.line}: {mutant.was}"))
    finally:
        host.orders, host.kernels[key] = orders, (made, program, signature)
        host.reports.clear()
    return seen, missed


@pytest.mark.parametrize("arch", [80, 90])
def test_no_mutant_that_changes_anything_is_missed(arch):
    _, missed = noticed(arch)
    assert [said for kind, said in missed if not CHECKS[kind][1]] == []


@pytest.mark.parametrize("kind", CHECKS)
def test_every_kind_is_seen_by_its_check(kind):
    assert sum(noticed(arch)[0].get(kind, 0) for arch in (80, 90)) > 0


def test_most_mutants_are_noticed():
    for arch in (80, 90):
        seen, missed = noticed(arch)
        host, key, _ = launched(arch)
        tried = len(list(mutants(host.kernels[key][1].text, 6)))
        assert len(missed) < tried / 3, (seen, missed)


def test_every_kind_is_tried():
    assert set(CHECKS) == set(KINDS)


def test_an_instruction_that_nobody_knows_is_no_mutant_but_an_error():
    host, key, _ = launched(80)
    text = host.kernels[key][1].text
    with pytest.raises(UnknownPtxError, match="m16n8k99"):
        Program(text.replace("m16n8k16", "m16n8k99", 1))
