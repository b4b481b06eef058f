"""Each check of the executor, on a small kernel that breaks what it watches over; and what it must not report."""

# ruff: noqa: E402, E501 (the module is skipped before it imports what needs a compiler; a kernel stands on one line)

import pytest
import torch
from ptx_programs import COPY, SWAP, kinds, needs_ptx, run, text

needs_ptx()

from ptx.program import ORDERS, How, Program, Span

GIVEN = torch.arange(64, dtype=torch.int32)
PRODUCT = """
	mov.b64 	%rd6, 0;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 	{%r3, %r4, %r5, %r6}, %rd6, %rd6, 0, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 	0;
"""
# What breaks -> (kernel, what is reported)
BROKEN = {
    "load beyond the tensor": ("ld.global.b32 %r3, [ %rd4 + 256 ];", "global load out of bounds"),
    "load before the tensor": ("ld.global.b32 %r3, [ %rd4 + -256 ];", "global load out of bounds"),
    "store beyond the tensor": ("mov.b32 %r3, 1; st.global.b32 [ %rd5 + 256 ], %r3;", "global store out of bounds"),
    "atomic beyond the tensor": ("atom.global.add.u32 %r3, [ %rd2 + 4096 ], 1;", "atomic out of bounds"),
    "shared load beyond the block's": ("mov.b32 %r4, 512; ld.shared.b32 %r3, [ %r4 + 0 ];", "shared load out of bounds"),
    "shared store beyond the block's": ("mov.b32 %r3, 512; st.shared.b32 [ %r3 + 0 ], %r3;", "shared store out of bounds"),
    "vector at half of its size": ("ld.global.v2.b32 {%r3, %r4}, [ %rd1 + 4 ];", "misaligned global access"),
    "shared vector at half of its size": (
        "mov.b32 %r3, 4; st.shared.v2.b32 [ %r3 + 0 ], {%r3, %r3};", "misaligned shared access",
    ),
    "atomic at half of its size": ("atom.global.add.u32 %r3, [ %rd2 + 2 ], 1;", "misaligned atomic"),
    "two lanes store different values": ("mov.b32 %r3, 1; st.global.b32 [ %rd2 + 0 ], %r1;", "race: two lanes store different values at one address"),
    "nobody set what is stored": ("", "a stored value that nobody set"),
    "nobody set a part of it": ("add.s32 %r3, %r2, %r4;", "a stored value that nobody set"),
    "only some lanes set it": ("setp.lt.s32 %p1, %r1, 3; @%p1 mov.b32 %r3, 1;", "a stored value that nobody set"),
    "nobody set the address": ("ld.global.b32 %r3, [ %rd9 + 0 ];", "an address that nobody set"),
    "nobody set the predicate": ("mov.b32 %r3, 1; @%p5 mov.b32 %r3, 2;", "a predicate that nobody set"),
    "nobody wrote the shared memory": ("mov.b32 %r4, 0; ld.shared.b32 %r3, [ %r4 + 0 ];", "a stored value that nobody set"),
    "a shuffle of some, with a mask of all": (
        "mov.b32 %r3, 1; setp.lt.s32 %p1, %r1, 8; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;",
        "a shuffle executed by other lanes than its mask",
    ),
    "half of a warp at the barrier": (
        "mov.b32 %r3, 1; setp.lt.s32 %p1, %r1, 8; @%p1 bar.sync 0;", "a barrier without the whole warp",
    ),
    "a warp that leaves before the barrier": (
        "mov.b32 %r3, 1; setp.lt.s32 %p1, %r1, 32; @%p1 ret; bar.sync 0;", "a barrier after some warps ended",
    ),
    "lanes at two barriers": (
        "mov.b32 %r3, 1; setp.lt.s32 %p1, %r1, 8; @%p1 bra $few; bar.sync 0; bra $end; $few: bar.sync 0; $end: add.s32 %r3, %r3, 0;",
        "lanes of a warp at different collective instructions",
    ),
    "no end": ("mov.b32 %r3, 1; $again: bra $again;", "more instructions than the limit"),
    "no barrier": (SWAP.replace("bar.sync 	0;", ""), "shared race: read after another warp's write"),
    "no wait for cp.async": (COPY.replace("cp.async.wait_group 	0;", ""), "shared load under a cp.async in flight"),
    "a wait for too few": (COPY.replace("wait_group 	0", "wait_group 	1"), "shared load under a cp.async in flight"),
    "no barrier behind cp.async": (COPY.replace("bar.sync 	0;", ""), "shared race: read after another warp's write"),
    "cp.async of too much": (COPY.replace(", 0x4;", ", 0x4, %r1;"), "cp.async source size too large"),
    "cp.async beyond the tensor": (COPY.replace("%rd4 + 0", "%rd4 + 256"), "global load out of bounds"),
    "nobody set a wgmma's descriptor": (PRODUCT.replace("%rd6, 0,", "%rd9, 0,"), "an address that nobody set"),
    "nobody set whether a wgmma adds": (PRODUCT.replace("%rd6, 0,", "%rd6, %p5,"), "a predicate that nobody set"),
    "cp.async into what is still in flight": (
        COPY.replace("cp.async.commit_group;", "cp.async.ca.shared.global [ %r4 + 0 ], [ %rd4 + 0 ], 0x4; cp.async.commit_group;"),
        "cp.async over a cp.async in flight",
    ),
    "an own store that others read": (
        "mov.b32 %r3, 1; st.global.b32 [ %rd5 + 0 ], %r1; xor.b32 %r4, %r1, 63; mul.wide.u32 %rd6, %r4, 4; add.s64 %rd7, %rd2, %rd6; ld.global.b32 %r3, [ %rd7 + 0 ];",
        "race: load of another warp's global store",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_reported(case):
    body, wanted = BROKEN[case]
    seen = set()
    for order in ORDERS:
        _, outcome = run(body, GIVEN, warps=2, shared=256, how=How(order=order, limit=20000))
        seen |= kinds(outcome)
    assert wanted in seen


def test_two_blocks_at_one_address():
    body = "mov.u32 %r3, %ctaid.x;"
    _, outcome = run(body, GIVEN, warps=2, grid=(2,))
    assert kinds(outcome) == {"race: two blocks write different values"}
    _, outcome = run("mov.b32 %r3, 7;", GIVEN, warps=2, grid=(2,))
    assert outcome.reports == []


# Block 0 leaves a number, block 1 takes it.
HANDED = """
	mov.u32 	%r4, %ctaid.x;
	setp.eq.s32 	%p1, %r4, 0;
	mov.b32 	%r3, 0;
	@%p1 st.global.b32 	[ %rd2 + 256 ], 5;
	bar.sync 	0;
	TICKET
	bar.sync 	0;
	@!%p1 ld.global.b32 	%r3, [ %rd2 + 256 ];
"""
TICKET = "setp.eq.s32 %p2, %r1, 0; @%p2 atom.global.gpu.acq_rel.add.u32 %r5, [ %rd2 + 260 ], 1;"


def test_what_another_block_left_needs_an_atomic_in_between():
    tail = "\n\t@!%p1 st.global.b32 [ %rd5 + 0 ], %r3;\n\tret;\n}\n"
    out = torch.zeros(66, dtype=torch.int32)
    with_ticket = (
        HANDED.replace("TICKET", TICKET)
        .replace(", 5;", ", %r6;")
        .replace("mov.b32 	%r3, 0;", "mov.b32 %r3, 0; mov.b32 %r6, 5;")
    )
    got, outcome = run(with_ticket, GIVEN, out, warps=2, grid=(2,), tail=tail)
    assert outcome.reports == []
    assert got[:64].eq(5).all()
    _, outcome = run(with_ticket.replace(TICKET, ""), GIVEN, out.zero_(), warps=2, grid=(2,), tail=tail)
    assert kinds(outcome) == {"race: load of what another block stored"}


def test_what_nobody_set_may_be_moved_about_and_dropped():
    body = """
	mov.b32 	%r5, %r4;
	setp.ge.s32 	%p1, %r1, 0;
	selp.b32 	%r3, %r2, %r5, %p1;
"""
    out, outcome = run(body, GIVEN, warps=2)
    assert outcome.reports == []
    assert torch.equal(out, GIVEN)


# %r4's first half is the thread's number, its second nobody's (LLVM pads so where a half lives across a branch).
HALF = """
	cvt.u16.u32 	%rs1, %r2;
	mov.b32 	%r4, {%rs1, %rs2};
"""
# Ways on which such a register goes, to %r5 and on to %rs3 and %rs4.
WAYS = {
    "a move": "mov.b32 %r5, %r4; mov.b32 {%rs3, %rs4}, %r5;",
    "a choice": "setp.ge.s32 %p1, %r1, 0; selp.b32 %r5, %r4, %r6, %p1; mov.b32 {%rs3, %rs4}, %r5;",
    "64 bits": "mov.b64 %rd6, {%r6, %r4}; mov.b64 {%rs5, %rs6, %rs3, %rs4}, %rd6;",
    "a shuffle": "shfl.sync.bfly.b32 %r5, %r4, 0, 31, -1; mov.b32 {%rs3, %rs4}, %r5;",
    "shared memory": "shl.b32 %r7, %r1, 2; st.shared.b32 [ %r7 + 0 ], %r4; ld.shared.v2.b16 {%rs3, %rs4}, [ %r7 + 0 ];",
    "shared memory, in halves": "shl.b32 %r7, %r1, 2; st.shared.v2.b16 [ %r7 + 0 ], {%rs1, %rs2}; ld.shared.b32 %r5, [ %r7 + 0 ]; mov.b32 {%rs3, %rs4}, %r5;",
    "transposed twice": "movmatrix.sync.aligned.m8n8.trans.b16 %r7, %r4; movmatrix.sync.aligned.m8n8.trans.b16 %r5, %r7; mov.b32 {%rs3, %rs4}, %r5;",
    "a matrix in shared memory": "and.b32 %r7, %r1, 7; shl.b32 %r7, %r7, 4; stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7], {%r4}; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r7]; mov.b32 {%rs3, %rs4}, %r5;",
}


@pytest.mark.parametrize("way", WAYS)
def test_half_of_a_register_may_be_nobodys(way):
    first, second = (f"cvt.u32.u16 %r3, %rs{n};" for n in (3, 4))
    out, outcome = run(HALF + WAYS[way] + first, GIVEN[:32], shared=256)
    assert outcome.reports == []
    assert torch.equal(out, GIVEN[:32])
    _, outcome = run(HALF + WAYS[way] + second, GIVEN[:32], shared=256)
    assert kinds(outcome) == {"a stored value that nobody set"}
    _, outcome = run(HALF + "mov.b32 %r3, %r4;", GIVEN[:32], shared=256)
    assert kinds(outcome) == {"a stored value that nobody set"}


def test_what_is_computed_with_half_of_a_register_is_nobodys():
    _, outcome = run(HALF + "add.u32 %r5, %r4, 1; mov.b32 {%rs3, %rs4}, %r5; cvt.u32.u16 %r3, %rs3;", GIVEN)
    assert kinds(outcome) == {"a stored value that nobody set"}


def test_a_report_says_where_and_how_often():
    _, outcome = run("ld.global.b32 %r3, [ %rd4 + 256 ];", GIVEN, warps=2)
    (report,) = outcome.reports
    assert "small: global load out of bounds, 64 times, PTX line" in report
    assert "ld.global.b32 %r3, [ %rd4 + 256 ]" in report
    assert "block (0, 0, 0) warp 0 lane 0" in report
    assert "4 bytes, at 256 of 256 of given" in report


def test_reports_beyond_what_a_launch_can_tell_are_counted():
    _, outcome = run("ld.global.b32 %r3, [ %rd4 + 256 ];\n" * 2000, GIVEN[:32])
    *told, last = outcome.reports
    assert all("global load out of bounds" in report for report in told[:-1])
    assert last == f"small: {2000 - len(told)} reports more than are told"


def test_statistics_count_sectors_and_bank_waves():
    far = "mul.wide.u32 %rd6, %r1, 32; add.s64 %rd7, %rd1, %rd6; ld.global.b32 %r3, [ %rd7 + 0 ]; shl.b32 %r4, %r1, 7; st.shared.b32 [ %r4 + 0 ], %r3;"
    given, out = torch.zeros(256, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    program = Program(text(far))
    spans = [Span(t.data_ptr(), t.data_ptr() + 4 * t.numel(), "t") for t in (given, out)]
    program.launch((1,), [given.data_ptr(), out.data_ptr()], 1, 4096, spans, How(statistics=True))
    rows = dict(zip(program.names, program.statistics().tolist()))
    # 32 lanes, 32 bytes apart: a sector each where 4 would do; 128 bytes apart in shared memory: one bank.
    assert rows["ld.global"][:4] == [1, 32, 4, 128]
    assert rows["st.shared"][4:] == [32, 1, 0]
    # Four of them were loaded before, as the input.
    assert rows["ld.global"][6] == 28
