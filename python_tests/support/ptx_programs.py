"""What the tests of the PTX executor share: small kernels written by hand, and where they can run."""

import os

import pytest
import torch

from ptx.build import problem
from ptx.program import How, Program, Span

_HEAD = """
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry small(
	.param .u64 .ptr .global .align 16 small_param_0,
	.param .u64 .ptr .global .align 16 small_param_1,
	.param .u32 small_param_2
)
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<20>;
	.reg .b32 	%r<90>;
	.reg .b64 	%rd<20>;
	ld.param.b64 	%rd1, [small_param_0];
	ld.param.b64 	%rd2, [small_param_1];
	ld.param.b32 	%r9, [small_param_2];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
	ld.global.b32 	%r2, [ %rd4 + 0 ];
"""
_TAIL = """
	st.global.b32 	[ %rd5 + 0 ], %r3;
	ret;
}
"""
# Two warps exchange 64 numbers, through shared memory written by st.shared or cp.async.
SWAP = """
	shl.b32 	%r4, %r1, 2;
	mov.b32 	%r5, global_smem;
	add.s32 	%r4, %r4, %r5;
	st.shared.b32 	[ %r4 + 0 ], %r2;
	bar.sync 	0;
	xor.b32 	%r6, %r4, 252;
	ld.shared.b32 	%r3, [ %r6 + 0 ];
"""
COPY = """
	shl.b32 	%r4, %r1, 2;
	cp.async.ca.shared.global 	[ %r4 + 0 ], [ %rd4 + 0 ], 0x4;
	cp.async.commit_group;
	cp.async.wait_group 	0;
	bar.sync 	0;
	xor.b32 	%r6, %r4, 252;
	ld.shared.b32 	%r3, [ %r6 + 0 ];
"""


def needs_ptx():
    """Skips the module that calls it where PTX cannot be executed; fails it where PTX_REQUIRED is set, as CI does."""
    reason = problem()
    if reason is None and os.environ.get("TRITON_INTERPRET") == "1":
        reason = "TRITON_INTERPRET is set, and the PTX executor compiles kernels"
    if reason is not None and os.environ.get("PTX_REQUIRED") == "1":
        raise RuntimeError(f"PTX_REQUIRED is set: {reason}")
    if reason is not None:
        pytest.skip(reason, allow_module_level=True)


def text(body: str, tail: str = _TAIL) -> str:
    """A kernel: %r2 holds the thread's number of the input, %r1 which thread it is; the body leaves %r3."""
    return _HEAD + body + tail


def run(body, given, out=None, *, warps=1, grid=(1,), shared=0, number=0, tail=_TAIL, how=None):
    """(the output, Outcome) of a kernel on `given`, int32 or float32, with a thread for each number of a block."""
    out = torch.zeros_like(given) if out is None else out
    spans = [Span(t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize, n) for n, t in (("given", given), ("out", out))]
    values = [given.data_ptr(), out.data_ptr(), number]
    outcome = Program(text(body, tail)).launch(grid, values, warps, shared, spans, how or How(limit=10**6))
    return out, outcome


def kinds(outcome) -> set[str]:
    """What the reports of an outcome are about."""
    return {report.split(": ", 1)[1].split(",")[0] for report in outcome.reports}


# What nvcc puts before its functions.
NVCC_HEAD = """
.version 9.0
.target sm_90
.address_size 64
.extern .shared .align 128 .b8 shared_memory[];
"""
