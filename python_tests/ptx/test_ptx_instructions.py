"""Every family of PTX instructions in a small kernel with a known result."""

# ruff: noqa: E402, E501 (the module is skipped before it imports what needs a compiler; a kernel stands on one line)

import pytest
import torch
from ptx_programs import COPY, SWAP, needs_ptx, run, text

needs_ptx()

from ptx.program import ORDERS, How, Program
from ptx.text import UnknownPtxError

INTS = torch.tensor([0, 1, -1, 7, -8, 2**31 - 1, -(2**31), 12345] * 4, dtype=torch.int32)
FLOATS = torch.tensor([0.0, 1.0, -1.5, 3.25, -2.0, 1e-20, 65504.0, 0.3] * 4)
LANES = torch.arange(32)
WIDE = INTS.long()


def i32(t):
    return ((t.long() + 2**31) % 2**32 - 2**31).int()


INTEGER = {
    "add": ("add.s32 %r3, %r2, 5;", lambda: i32(WIDE + 5)),
    "sub": ("sub.s32 %r3, %r2, %r1;", lambda: i32(WIDE - LANES)),
    "mul.lo": ("mul.lo.s32 %r3, %r2, 3;", lambda: i32(WIDE * 3)),
    "mad.lo": ("mad.lo.s32 %r3, %r2, 3, %r1;", lambda: i32(WIDE * 3 + LANES)),
    "mul.hi": ("mul.hi.s32 %r3, %r2, 1000000;", lambda: i32((WIDE * 1000000) >> 32)),
    "mul.wide": (
        "mul.wide.s32 %rd6, %r2, 1000000; shr.s64 %rd7, %rd6, 32; cvt.u32.u64 %r3, %rd7;",
        lambda: i32((WIDE * 1000000) >> 32),
    ),
    "div": ("div.s32 %r3, %r2, 7;", lambda: i32(torch.div(WIDE, 7, rounding_mode="trunc"))),
    "rem": ("rem.s32 %r3, %r2, 7;", lambda: i32(torch.fmod(WIDE, 7))),
    "div by zero": ("div.s32 %r3, %r2, 0;", lambda: i32(torch.full((32,), -1))),
    "min, max": ("min.s32 %r4, %r2, 5; max.s32 %r3, %r4, -5;", lambda: i32(WIDE.clamp(-5, 5))),
    "min unsigned": ("min.u32 %r3, %r2, 5;", lambda: i32((WIDE % 2**32).clamp(max=5))),
    "and, or, xor": (
        "and.b32 %r4, %r2, 255; or.b32 %r5, %r4, 256; xor.b32 %r3, %r5, 1;",
        lambda: i32(((WIDE & 255) | 256) ^ 1),
    ),
    "not, neg": ("not.b32 %r4, %r2; neg.s32 %r3, %r4;", lambda: i32(-(~WIDE))),
    "shl": ("shl.b32 %r3, %r2, 3;", lambda: i32(WIDE << 3)),
    "shl by more than there are": ("shl.b32 %r3, %r2, 32;", lambda: i32(WIDE * 0)),
    "shr signed": ("shr.s32 %r3, %r2, 40;", lambda: i32(WIDE >> 31)),
    "shr unsigned": ("shr.u32 %r3, %r2, 4;", lambda: i32((WIDE % 2**32) >> 4)),
    "bfe": ("bfe.u32 %r3, %r2, 4, 8;", lambda: i32((WIDE >> 4) & 255)),
    "bfe signed": ("bfe.s32 %r3, %r2, 0, 4;", lambda: i32(((WIDE & 15) ^ 8) - 8)),
    "bfi": ("bfi.b32 %r3, %r1, %r2, 0, 8;", lambda: i32((WIDE & ~255) | LANES)),
    "prmt": ("prmt.b32 %r3, %r2, 0, 0x4440;", lambda: i32(WIDE & 255)),
    "lop3": ("lop3.b32 %r3, %r2, 255, %r1, 0xEA;", lambda: i32((WIDE & 255) | LANES)),
    "popc": ("popc.b32 %r3, %r2;", lambda: torch.tensor([bin(n % 2**32).count("1") for n in WIDE.tolist()]).int()),
    "funnel": ("shf.l.wrap.b32 %r3, %r2, %r1, 0;", lambda: LANES.int()),
    "selp, setp": ("setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 1, 2, %p1;", lambda: i32((WIDE >= 0).long() + 1)),
    "setp unsigned": ("setp.gt.u32 %p1, %r2, 9; selp.b32 %r3, 1, 0, %p1;", lambda: i32((WIDE % 2**32 > 9).long())),
    "setp and its opposite": (
        "setp.eq.s32 %p1|%p2, %r2, 7; selp.b32 %r3, 1, 0, %p2;",
        lambda: i32((WIDE != 7).long()),
    ),
    "predicates": (
        "setp.lt.s32 %p1, %r2, 0; setp.lt.s32 %p2, %r1, 4; and.pred %p3, %p1, %p2; not.pred %p4, %p3; selp.b32 %r3, 1, 0, %p4;",
        lambda: i32((~((WIDE < 0) & (LANES < 4))).long()),
    ),
    "guarded": ("mov.b32 %r3, 1; setp.lt.s32 %p1, %r2, 0; @%p1 mov.b32 %r3, 2;", lambda: i32((WIDE < 0).long() + 1)),
    "guarded, negated": ("mov.b32 %r3, 1; setp.lt.s32 %p1, %r2, 0; @!%p1 mov.b32 %r3, 2;", lambda: i32((WIDE >= 0).long() + 1)),
    "pack, unpack": (
        "mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};",
        lambda: i32((WIDE << 16) | ((WIDE % 2**32) >> 16)),
    ),
    "cvt": ("cvt.u16.u32 %rs1, %r2; cvt.s32.s16 %r3, %rs1;", lambda: INTS.short().int()),
    "cvt.s8": ("cvt.u16.u32 %rs1, %r2; cvt.s16.s8 %rs2, %rs1; cvt.s32.s16 %r3, %rs2;", lambda: INTS.to(torch.int8).int()),
    "a scope of its own": ("{ .reg .b32 t; add.s32 t, %r2, 1; mov.b32 %r3, t; }", lambda: i32(WIDE + 1)),
    "number of the launch": ("add.s32 %r3, %r9, 0;", lambda: torch.full((32,), 11, dtype=torch.int32)),
    "special registers": ("mov.u32 %r4, %ntid.x; mov.u32 %r5, %ctaid.x; add.s32 %r3, %r4, %r5;", lambda: i32(LANES * 0 + 32)),
}  # fmt: skip


@pytest.mark.parametrize("case", INTEGER)
def test_integers_bits_and_predicates(case):
    body, want = INTEGER[case]
    got, outcome = run(body, INTS, number=11)
    assert outcome.reports == []
    assert torch.equal(got, want())


FLOATING = {
    "add": ("add.f32 %r3, %r2, 0f3F000000;", lambda x: x + 0.5),
    "sub, mul": ("sub.f32 %r4, %r2, 0f3F000000; mul.f32 %r3, %r4, %r4;", lambda x: (x - 0.5) ** 2),
    "fma": ("fma.rn.f32 %r3, %r2, %r2, 0f3F800000;", lambda x: (x.double() ** 2 + 1).float()),
    "div": ("div.full.f32 %r3, 0f3F800000, %r2;", lambda x: 1 / x),
    "max of NaN": ("max.f32 %r3, %r2, 0f7FC00000;", lambda x: x),
    "max that keeps NaN": ("max.NaN.f32 %r3, %r2, 0f7FC00000;", lambda x: x * float("nan")),
    "neg, abs": ("neg.f32 %r4, %r2; abs.f32 %r3, %r4;", lambda x: x.abs()),
    "ex2": ("ex2.approx.f32 %r3, %r2;", lambda x: x.double().exp2().float()),
    "lg2": ("abs.f32 %r4, %r2; lg2.approx.f32 %r3, %r4;",
                  lambda x: x.abs().double().log2().float()),
    "sqrt": ("abs.f32 %r4, %r2; sqrt.rn.f32 %r3, %r4;", lambda x: x.abs().double().sqrt().float()),
    "rcp": ("rcp.approx.ftz.f32 %r3, %r2;", lambda x: 1 / torch.where(x.abs() < 1e-38, x * 0, x)),
    "ftz": ("mul.ftz.f32 %r3, %r2, 0f00800000;", lambda x: torch.where(x.abs() < 1, x * 0, x * 2.0**-126)),
    "to int": ("cvt.rzi.s32.f32 %r4, %r2; cvt.rn.f32.s32 %r3, %r4;", lambda x: x.trunc()),
    "round": ("cvt.rni.f32.f32 %r3, %r2;", lambda x: x.round()),
    "float16": ("cvt.rn.f16.f32 %rs1, %r2; cvt.f32.f16 %r3, %rs1;", lambda x: x.half().float()),
    "bfloat16": ("cvt.rn.bf16.f32 %rs1, %r2; cvt.f32.bf16 %r3, %rs1;", lambda x: x.bfloat16().float()),
    "pairs": ("cvt.rn.bf16x2.f32 %r4, %r2, 0f3F800000; fma.rn.bf16x2 %r5, %r4, %r4, %r4; mov.b32 {%rs1, %rs2}, %r5; cvt.f32.bf16 %r3, %rs2;",
              lambda x: (x.bfloat16().double() ** 2 + x.bfloat16().double()).bfloat16().float()),
    "half arithmetic": ("cvt.rn.f16.f32 %rs1, %r2; add.f16 %rs2, %rs1, %rs1; cvt.f32.f16 %r3, %rs2;",
                        lambda x: (x.half() + x.half()).float()),
    "tf32": ("cvt.rna.tf32.f32 %r3, %r2;", lambda x: ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)),
    "float64": ("cvt.f64.f32 %rd6, %r2; fma.rn.f64 %rd7, %rd6, %rd6, 0d3FF0000000000000; cvt.rn.f32.f64 %r3, %rd7;",
                lambda x: (x.double() ** 2 + 1).float()),
    "not comparable": ("setp.neu.f32 %p1, %r2, 0f7FC00000; selp.f32 %r3, 0f3F800000, 0f00000000, %p1;", lambda x: x * 0 + 1),
    "comparable": ("setp.ne.f32 %p1, %r2, 0f7FC00000; selp.f32 %r3, 0f3F800000, 0f00000000, %p1;", lambda x: x * 0),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOATING)
def test_floating_numbers(case):
    body, want = FLOATING[case]
    got, outcome = run(body, FLOATS)
    assert outcome.reports == []
    torch.testing.assert_close(got, want(FLOATS), rtol=0, atol=0, equal_nan=True)


TOGETHER = {
    "shuffle, butterfly": ("shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", LANES ^ 1),
    "shuffle, up": ("shfl.sync.up.b32 %r3, %r1, 4, 0, -1;", (LANES - 4).where(LANES >= 4, LANES)),
    "shuffle, down in segments": ("shfl.sync.down.b32 %r3, %r1, 1, 0x181F, -1;", (LANES + 1).where(LANES % 8 < 7, LANES)),
    "shuffle, index": ("shfl.sync.idx.b32 %r3|%p1, %r1, 5, 31, -1; selp.b32 %r3, %r3, 99, %p1;", LANES * 0 + 5),
    "redux": ("redux.sync.add.s32 %r3, %r1, -1;", LANES * 0 + 496),
    "ballot": ("setp.lt.s32 %p1, %r1, 3; vote.sync.ballot.b32 %r3, %p1, -1;", LANES * 0 + 7),
    "any": ("setp.eq.s32 %p1, %r1, 3; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r3, 1, 0, %p2;", LANES * 0 + 1),
    "branches": (
        "setp.lt.s32 %p1, %r1, 8; @%p1 bra $few; mov.b32 %r3, 2; bra $end; $few: mov.b32 %r3, 1; $end: add.s32 %r3, %r3, 0;",
        (LANES >= 8).long() + 1,
    ),
    # Lane n goes round n times, then all meet again.
    "a loop of other lengths": (
        "mov.b32 %r3, 0; mov.b32 %r4, 0; $again: setp.ge.s32 %p1, %r4, %r1; @%p1 bra $out; add.s32 %r3, %r3, %r4; "
        "add.s32 %r4, %r4, 1; bra $again; $out: shfl.sync.bfly.b32 %r5, %r3, 0, 31, -1; mov.b32 %r3, %r5;",
        LANES * (LANES - 1) // 2,
    ),
    "leaving early": (
        "mov.b32 %r3, 5; setp.lt.s32 %p1, %r1, 4; @%p1 ret; add.s32 %r3, %r3, 1;", (LANES >= 4).long() * 6,
    ),
    "atomic add": ("atom.global.gpu.acq_rel.add.u32 %r3, [ %rd2 + 128 ], 2;", 2 * LANES),
    "atomic exchange": ("atom.global.exch.b32 %r3, [ %rd2 + 128 ], %r1;", (LANES - 1).clamp(min=0)),
    "atomic compare and swap": (
        "atom.global.cas.b32 %r3, [ %rd2 + 128 ], 0, 9;", (LANES > 0).long() * 9,
    ),
    "reduction": ("red.global.max.s32 [ %rd2 + 128 ], %r1; ld.global.b32 %r3, [ %rd2 + 128 ];", LANES * 0 + 31),
}  # fmt: skip


@pytest.mark.parametrize("case", TOGETHER)
def test_lanes_together(case):
    body, want = TOGETHER[case]
    out, outcome = run(body, INTS, torch.zeros(33, dtype=torch.int32))
    assert outcome.reports == []
    assert torch.equal(out[:32], want.int())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("body", [SWAP, COPY], ids=["shared memory", "cp.async"])
def test_two_warps_exchange(body, order):
    given = torch.arange(64, dtype=torch.int32)
    out, outcome = run(body, given, warps=2, shared=256, how=How(order=order, seed=3))
    assert outcome.reports == []
    assert torch.equal(out, given.flip(0))
    assert outcome.barriers == 1


def test_mma_is_the_product():
    """Identity times B: which lane holds which number is PTX's own layout."""
    body = """
	shr.u32 	%r10, %r1, 2;
	and.b32 	%r11, %r1, 3;
	shl.b32 	%r12, %r11, 1;
	setp.eq.s32 	%p1, %r10, %r12;
	add.s32 	%r13, %r12, 1;
	setp.eq.s32 	%p2, %r10, %r13;
	selp.b32 	%r14, 0x3C00, 0, %p1;
	selp.b32 	%r15, 0x3C000000, 0, %p2;
	or.b32 	%r16, %r14, %r15;
	cvt.rn.f16x2.f32 	%r17, %r2, %r2;
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r16,0,0,%r16}, {%r17,%r17}, {0f3F800000,0f3F800000,0f3F800000,0f3F800000};
	mov.b32 	%r3, %r20;
"""
    given = torch.arange(32).float()
    out, outcome = run(
        body.replace("0,0,%r16", "%r18,%r18,%r16").replace("shr.u32", "mov.b32 %r18, 0;\n shr.u32", 1), given
    )
    lane = torch.arange(32)
    # out[row q, column 2t] = 1 + B[k = q, n = 2t], which lane 4n + k/2 holds.
    q, t = lane // 4, lane % 4
    assert outcome.reports == []
    assert outcome.products == 1
    assert torch.equal(out, 1 + given[4 * (2 * t) + q // 2])


def test_movmatrix_turns_a_tile():
    """Lane 4 i + t has columns 2 t and 2 t + 1 of row i, then rows 2 t and 2 t + 1 of column i."""
    given = torch.arange(32, dtype=torch.int32)
    body = """
	shl.b32 	%r10, %r2, 17;
	shl.b32 	%r11, %r2, 1;
	or.b32 	%r10, %r10, %r11;
	or.b32 	%r10, %r10, 65536;
	movmatrix.sync.aligned.m8n8.trans.b16 	%r3, %r10;
"""
    out, outcome = run(body, given)
    tile = torch.arange(64, dtype=torch.int32).view(8, 8).T.reshape(32, 2)
    assert outcome.reports == []
    assert torch.equal(out, tile[:, 0] | tile[:, 1] << 16)


def test_half_a_number_rounds_once():
    """A double halfway between two bfloat16 by its float32 alone."""
    given = torch.zeros(32)
    # 1 + 2^-8 + 2^-40: above the tie, so up; by way of float32 it would be a tie, to even, so down.
    body = "mov.b64 %rd6, 0d3FF0100000001000; cvt.rn.bf16.f64 %rs1, %rd6; cvt.f32.bf16 %r3, %rs1;"
    out, _ = run(body, given)
    assert out[0] == 1 + 2**-7


@pytest.mark.parametrize(
    "body",
    [
        "frobnicate.b32 %r3, %r2;",
        "add.s32.wrapped %r3, %r2, 1;",
        "bar.sync 3;",
        "ld.local.b32 %r3, [ %rd4 + 0 ];",
        "atom.shared.add.u32 %r3, [ %r1 + 0 ], 1;",
        "mbarrier.init.shared::cta.b64 [ %r1 ], 1;",
        "tcgen05.wait::ld.sync.aligned;",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r4}, {%r4}, {%r4}, {%r4};",
        "add.s32 %r3, %rs1, 1;",
        "add.s32 %r3, %r99999, 1;",
        "bra $nowhere;",
    ],
)
def test_what_is_not_known_is_an_error_that_names_it(body):
    with pytest.raises(UnknownPtxError, match="small"):
        Program(text(body))


def test_a_second_kernel_and_none_are_errors():
    with pytest.raises(UnknownPtxError, match="got 2 kernels"):
        Program(text("") + text(""))
    with pytest.raises(UnknownPtxError, match="got 0 kernels"):
        Program("")
