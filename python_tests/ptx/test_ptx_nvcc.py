"""What nvcc's PTX has and Triton's has not: many kernels, a struct for parameters, shared arrays, wmma, clusters."""

# ruff: noqa: E402 (the module is skipped before it imports what needs a compiler)

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from ptx_programs import NVCC_HEAD as HEAD
from ptx_programs import needs_ptx

needs_ptx()

from ptx import nvcc
from ptx.host import extent
from ptx.program import How, Program

# out[n] = a + b * n, through a static array, the dynamic one behind it and a parameter found by its address.
ARRAYS = """
.visible .entry arrays(
	.param .align 8 .b8 arrays_param_0[24]
)
.maxntid 64, 1, 1
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<20>;
	.shared .align 4 .b8 held[256];
	.loc	1 7 3, function_name $L__info_string0, inlined_at 1 9 1
	griddepcontrol.wait;
	ld.param.u64 	%rd1, [arrays_param_0];
	ld.param.v2.u32 	{%r1, %r2}, [arrays_param_0+8];
	mov.b64 	%rd2, arrays_param_0;
	add.s64 	%rd3, %rd2, 4;
	ld.param.u32 	%r3, [%rd3+8];
	mov.u32 	%r4, %tid.x;
	mov.u32 	%r5, held;
	shl.b32 	%r6, %r4, 2;
	add.s32 	%r7, %r5, %r6;
	mad.lo.s32 	%r8, %r4, %r3, %r1;
	st.shared.u32 	[%r7], %r8;
	mov.u32 	%r9, shared_memory;
	add.s32 	%r10, %r9, %r6;
	barrier.cluster.arrive.release.aligned;
	barrier.cluster.wait.acquire.aligned;
	ld.shared.u32 	%r11, [%r7];
	st.shared.u32 	[%r10], %r11;
	setp.eq.s32 	%p1, %r4, 0;
	bar.red.or.pred 	%p2, 0, %p1;
	cvt.u64.u32 	%rd4, %r10;
	cvta.shared.u64 	%rd5, %rd4;
	mov.u32 %r12, %cluster_ctarank;
	mapa.u64 %rd6, %rd5, %r12;
	ld.f32 	%r13, [%rd6];
	cvta.to.global.u64 	%rd7, %rd1;
	mov.u32 	%r14, %ctaid.x;
	shl.b32 	%r15, %r14, 6;
	add.s32 	%r16, %r15, %r4;
	mul.wide.u32 	%rd8, %r16, 4;
	add.s64 	%rd9, %rd7, %rd8;
	mov.u32 %r17, %cluster_nctarank;
	mad.lo.s32 	%r18, %r17, 1000, %r13;
	mad.lo.s32 	%r18, %r12, 100000, %r18;
	selp.b32 	%r19, 1000000, 0, %p2;
	add.s32 	%r19, %r18, %r19;
	st.global.u32 	[%rd9], %r19;
	ret;
}
	.file	1 "/home/someone/arrays.cu"
	.section	.debug_str
	{
$L__info_string0:
	.b8 97
	}
"""


def product(kind: str, registers: int, layout: str, space: str = ".shared") -> str:
    """C [16, 16] of float32 = A B, both [16, 16] with 24 numbers from line to line; B by `layout`."""
    names = lambda first: ", ".join(f"%r{n}" for n in range(first, first + registers))  # noqa: E731
    sums = ", ".join(f"%f{n}" for n in range(8))
    kinds = "f32.f32" if kind == "f16" else "f32.bf16.bf16.f32"
    zeros = "\n".join(f"\tmov.f32 \t%f{n}, 0f00000000;" for n in range(8))
    return f"""
.visible .entry product(
	.param .align 8 .b8 product_param_0[24]
)
{{
	.reg .b16 	%rs<4>;
	.reg .b32 	%r<60>;
	.reg .f32 	%f<8>;
	.reg .b64 	%rd<20>;
	ld.param.u64 	%rd1, [product_param_0];
	ld.param.u64 	%rd2, [product_param_0+8];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, shared_memory;
	mov.u32 	%r3, 0;
$L__BB0_1:
	shl.b32 	%r4, %r3, 5;
	add.s32 	%r5, %r4, %r1;
	mul.wide.u32 	%rd3, %r5, 2;
	add.s64 	%rd4, %rd1, %rd3;
	ld.global.u16 	%rs1, [%rd4];
	shl.b32 	%r6, %r5, 1;
	add.s32 	%r7, %r2, %r6;
	st.shared.u16 	[%r7], %rs1;
	add.s32 	%r3, %r3, 1;
	setp.lt.s32 	%p1, %r3, 24;
	@%p1 bra 	$L__BB0_1;
	bar.sync 	0;
	mov.u32 	%r8, 24;
	cvt.u64.u32 	%rd5, %r2;
	add.s32 	%r9, %r2, 768;
	cvt.u64.u32 	%rd6, %r9;
	wmma.load.a.sync.aligned.row.m16n16k16{space}.{kind} 	{{{names(20)}}}, [{"%r2" if space else "%rd5"}], %r8;
	wmma.load.b.sync.aligned.{layout}.m16n16k16{space}.{kind} 	{{{names(40)}}}, [{"%r9" if space else "%rd6"}], %r8;
{zeros}
	wmma.mma.sync.aligned.row.{layout}.m16n16k16.{kinds} {{{sums}}}, {{{names(20)}}}, {{{names(40)}}}, {{{sums}}};
	mov.u32 	%r10, 16;
	bar.sync 	0;
	wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 	[%r2], {{{sums}}}, %r10;
	bar.sync 	0;
	mov.u32 	%r3, 0;
$L__BB0_2:
	shl.b32 	%r4, %r3, 5;
	add.s32 	%r5, %r4, %r1;
	shl.b32 	%r6, %r5, 2;
	add.s32 	%r7, %r2, %r6;
	ld.shared.u32 	%r11, [%r7];
	mul.wide.u32 	%rd7, %r5, 4;
	add.s64 	%rd8, %rd2, %rd7;
	st.global.u32 	[%rd8], %r11;
	add.s32 	%r3, %r3, 1;
	setp.lt.s32 	%p1, %r3, 8;
	@%p1 bra 	$L__BB0_2;
	ret;
}}
""".replace(".reg .b16", ".reg .pred \t%p<4>;\n\t.reg .b16")


def run(text: str, argument: bytes, tensors, *, grid=(1,), warps=1, shared=0, how=How(), cluster=1):  # noqa: B008
    program = Program(nvcc.clustered(text, cluster))
    spans = [span for t in tensors for span in extent("t", t)]
    outcome = program.launch(grid, [argument], warps, nvcc.static_shared(text) + shared, spans, how)
    assert outcome.reports == []
    return program, outcome


def test_arrays_parameters_clusters_and_what_a_block_says_together():
    (text,) = nvcc.kernels(HEAD + ARRAYS).values()
    out = torch.zeros(4 * 64, dtype=torch.int32)
    argument = struct.pack("<QII", out.data_ptr(), 7, 3) + bytes(8)
    assert nvcc.static_shared(text.executed) == 256
    run(text.executed, argument, [out], grid=(4,), warps=2, shared=256, cluster=2)
    expected = 7 + 3 * torch.arange(64)
    ranks = torch.arange(4) % 2
    # The last: thread 0 of each block says yes, and all hear it.
    assert torch.equal(out.view(4, 64).long(), 2000 + 100_000 * ranks[:, None] + expected + 1_000_000)


def test_each_kernel_stands_alone_with_its_lines():
    second = ARRAYS.replace("arrays", "others").partition("\t.file")[0]
    found = nvcc.kernels(HEAD + second + ARRAYS)
    assert list(found) == ["others", "arrays"]
    for name, text in found.items():
        assert text.compiled.count(".entry") == 1
        assert ".entry " + name in text.compiled
        assert "$L__info_string0" not in text.compiled
        assert '.file 1 "/home/someone/arrays.cu"' in text.compiled
    sources = {s.source for s in Program(nvcc.clustered(found["others"].executed, 1)).kernel.statements}
    assert "arrays.cu:7:3" in sources


@pytest.mark.parametrize(("kind", "registers", "space"), [("f16", 8, ".shared"), ("bf16", 4, "")])
@pytest.mark.parametrize("layout", ["row", "col"])
def test_wmma_is_the_product(kind, registers, space, layout):
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    given = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    out = torch.zeros(16, 16)
    (text,) = nvcc.kernels(HEAD + product(kind, registers, layout, space)).values()
    argument = struct.pack("<QQ", given.data_ptr(), out.data_ptr()) + bytes(8)
    how = How(statistics=True)
    program, outcome = run(text.executed, argument, [given, out], shared=2048, how=how)
    a, b = given[:, :, :16].double()
    torch.testing.assert_close(out.double(), a @ (b if layout == "row" else b.T), rtol=1e-6, atol=1e-5)
    assert outcome.products == 2
    counts = dict(zip(program.names, program.statistics().tolist()))
    # Rows of 48 bytes: no two of eight fall on one bank.
    assert counts[f"wmma.load.{kind}"][4:6] == [4, 4]


def test_a_part_of_the_blocks_and_what_they_touch():
    (text,) = nvcc.kernels(HEAD + ARRAYS).values()
    out = torch.zeros(100 * 64, dtype=torch.int32)
    argument = struct.pack("<QII", out.data_ptr(), 7, 3) + bytes(8)
    how = How(races=False, statistics=True, blocks_at_most=10)
    _, outcome = run(text.executed, argument, [out], grid=(100,), warps=2, shared=256, how=how)
    assert outcome.blocks == 10
    assert int((out.view(100, 64)[:, 0] != 0).sum()) == 10
    assert outcome.firsts.tolist() == [[0, 80]]
    ran = np.flatnonzero(out.view(100, 64)[:, 0].numpy())
    assert np.diff(ran).max() < 25
    few = How(races=False, statistics=True, enough=1)
    assert run(text.executed, argument, [out], grid=(100,), warps=2, shared=256, how=few)[1].blocks == 1


@pytest.mark.parametrize("most", [0, 100, 2048])
def test_blocks_that_are_enough_are_spread_over_the_grid(most):
    """Also where all may run: the first blocks of a weight gradient are all of one side."""
    (text,) = nvcc.kernels(HEAD + ARRAYS).values()
    out = torch.zeros(100 * 64, dtype=torch.int32)
    argument = struct.pack("<QII", out.data_ptr(), 7, 3) + bytes(8)
    each = run(text.executed, argument, [out], warps=2, shared=256, how=How(races=False))[1].instructions
    out.zero_()
    how = How(races=False, statistics=True, blocks_at_most=most, enough=20 * each)
    blocks = run(text.executed, argument, [out], grid=(100,), warps=2, shared=256, how=how)[1].blocks
    ran = np.flatnonzero(out.view(100, 64)[:, 0].numpy())
    assert blocks == len(ran) == 20
    assert np.diff([-1, *ran, 100]).max() < 15
    out.zero_()
    how = replace(how, enough=2**40)
    assert run(text.executed, argument, [out], grid=(100,), warps=2, shared=256, how=how)[1].blocks == 100
    assert out.view(100, 64)[:, 0].all()


AGAIN = """
.visible .entry again(
	.param .align 8 .b8 again_param_0[8]
)
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<20>;
	ld.param.u64 	%rd1, [again_param_0];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, 0;
$L__BB0_1:
	and.b32 	%r3, %r2, 2047;
	shl.b32 	%r4, %r3, 3;
	mul.wide.u32 	%rd2, %r4, 4;
	add.s64 	%rd3, %rd1, %rd2;
	ld.global.u32 	%r5, [%rd3];
	add.s32 	%r2, %r2, 1;
	setp.lt.s32 	%p1, %r2, 4096;
	@%p1 bra 	$L__BB0_1;
	ret;
}
"""


# Each lane to its own place in shared memory, and waited for.
COPIED = "shl.b32 %r6, %r1, 2; cp.async.ca.shared.global [%r6], [%rd3], 4; cp.async.wait_all"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_how_far_apart_a_block_reads_again(asynchronous):
    """2,048 sectors twice, one after the other: the first comes again after 2,047 others; a sector that comes again is
    not brought in anew, so that the second comes after 2,046, and the last after none. What came within 1,024 others L1
    serves, but for asynchronous copies, which do not look there."""
    copied = AGAIN.replace("ld.global.u32 	%r5, [%rd3]", COPIED) if asynchronous else AGAIN
    (text,) = nvcc.kernels(HEAD + copied).values()
    given = torch.zeros(2048 * 8, dtype=torch.int32)
    how = How(races=False, statistics=True)
    program, outcome = run(text.executed, struct.pack("<Q", given.data_ptr()), [given], shared=256, how=how)
    assert outcome.firsts.tolist() == [[2048, 0]]
    distances = outcome.distances
    assert np.flatnonzero(distances)[-1] == 43
    assert distances[40:44].sum() == (1024 if asynchronous else 1023)
    # The other 31 lanes of a warp read the sector at once.
    assert distances.sum() == (2048 + 31 * 4096 if asynchronous else 1023)
    load = program.statistics()[program.names.index("cp.async" if asynchronous else "ld.global")]
    assert load[1] == 4096
    assert load[6] == 2048 + 2047 - 1024


# out[n] = given[n] where n is even, else what stands in shared memory, 1000 + n: of one load, half the lanes each.
GENERIC = """
.visible .entry generic(
	.param .align 8 .b8 generic_param_0[16]
)
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<20>;
	ld.param.u64 	%rd1, [generic_param_0];
	ld.param.u64 	%rd2, [generic_param_0+8];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, shared_memory;
	shl.b32 	%r3, %r1, 2;
	add.s32 	%r4, %r2, %r3;
	add.s32 	%r5, %r1, 1000;
	st.shared.u32 	[%r4], %r5;
	cvt.u64.u32 	%rd3, %r4;
	cvta.shared.u64 	%rd4, %rd3;
	mul.wide.u32 	%rd5, %r1, 4;
	add.s64 	%rd6, %rd1, %rd5;
	and.b32 	%r6, %r1, 1;
	setp.eq.s32 	%p1, %r6, 0;
	selp.b64 	%rd7, %rd6, %rd4, %p1;
	ld.u32 	%r7, [%rd7];
	cvta.to.global.u64 	%rd8, %rd2;
	add.s64 	%rd9, %rd8, %rd5;
	st.global.u32 	[%rd9], %r7;
	ret;
}
"""


def test_a_generic_load_reads_where_its_address_says():
    (text,) = nvcc.kernels(HEAD + GENERIC).values()
    given, out = torch.arange(32, dtype=torch.int32) * 7, torch.zeros(32, dtype=torch.int32)
    argument = struct.pack("<QQ", given.data_ptr(), out.data_ptr())
    program, _ = run(text.executed, argument, [given, out], shared=128, how=How(statistics=True))
    n = torch.arange(32, dtype=torch.int32)
    assert torch.equal(out, torch.where(n % 2 == 0, given, 1000 + n))
    # Sectors and bytes are those of the lanes that read global memory, passes over the banks of the others.
    assert program.statistics()[program.names.index("ld.generic"), 1:6].tolist() == [4, 2, 64, 1, 1]
    short = given[:8]
    outcome = program.launch((1,), [argument], 1, 128, [*extent("given", short), *extent("out", out)], How())
    assert len(outcome.reports) == 1
    assert "global load out of bounds" in outcome.reports[0]


# out[n] = twice(n) where n is odd, else thrice(n, {n, 2n}): functions with a result, with a struct and a branch.
