"""Functions in PTX: nvcc's calls, by the lanes that call them."""

# ruff: noqa: E402 (the module is skipped before it imports what needs a compiler)

from __future__ import annotations

import pytest
import torch
from ptx_programs import NVCC_HEAD as HEAD
from ptx_programs import needs_ptx

needs_ptx()

from ptx import nvcc
from ptx.host import extent
from ptx.program import How, Program
from ptx.text import UnknownPtxError

CALLS = """
.func  (.param .b32 func_retval0) twice
(
	.param .b32 twice_param_0
)
;
.extern .shared .align 128 .b8 shared_memory[];
.visible .entry calls(
	.param .u64 calls_param_0
)
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<20>;
	ld.param.u64 	%rd1, [calls_param_0];
	mov.u32 	%r1, %tid.x;
	and.b32 	%r2, %r1, 1;
	setp.eq.s32 	%p1, %r2, 0;
	@%p1 bra 	$L__BB0_2;
	{ // callseq 0, 0
	.reg .b32 temp_param_reg;
	.param .b32 param0;
	st.param.b32 	[param0+0], %r1;
	.param .b32 retval0;
	call.uni (retval0), 
	twice, 
	(
	param0
	);
	ld.param.b32 	%r3, [retval0+0];
	} // callseq 0
	bra.uni 	$L__BB0_3;
$L__BB0_2:
	shl.b32 	%r4, %r1, 1;
	{ // callseq 1, 0
	.reg .b32 temp_param_reg;
	.param .b32 param0;
	st.param.b32 	[param0+0], %r1;
	.param .align 8 .b8 param1[8];
	st.param.v2.b32 	[param1+0], {%r1, %r4};
	.param .b64 param2;
	st.param.b64 	[param2+0], %rd1;
	call.uni 
	thrice, 
	(
	param0, 
	param1, 
	param2
	);
	} // callseq 1
	ret;
$L__BB0_3:
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	st.global.u32 	[%rd3], %r3;
	ret;
}
.func  (.param .b32 func_retval0) twice(
	.param .b32 twice_param_0
)
{
	.reg .b32 	%r<4>;
	ld.param.u32 	%r1, [twice_param_0];
	shl.b32 	%r2, %r1, 1;
	st.param.b32 	[func_retval0+0], %r2;
	ret;
}
.func thrice(
	.param .b32 thrice_param_0,
	.param .align 8 .b8 thrice_param_1[8],
	.param .b64 thrice_param_2
)
{
	.reg .pred 	%p<2>;
	.reg .b16 	%rs<4>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<4>;
	ld.param.u64 	%rd1, [thrice_param_2];
	ld.param.u32 	%r1, [thrice_param_0];
	ld.param.u16 	%rs1, [thrice_param_1+4];
	ld.param.u32 	%r2, [thrice_param_1];
	cvt.u32.u16 	%r3, %rs1;
	add.s32 	%r4, %r2, %r3;
	setp.lt.s32 	%p1, %r1, 16;
	@%p1 bra 	$L__BB2_2;
	neg.s32 	%r4, %r4;
$L__BB2_2:
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	st.global.u32 	[%rd3], %r4;
	ret;
}
"""


def called(text: str = CALLS) -> torch.Tensor:
    out = torch.zeros(32, dtype=torch.int32)
    program = Program(nvcc.kernels(HEAD + text)["calls"].executed)
    outcome = program.launch([1], [out.data_ptr()], 1, 0, list(extent("out", out)), How(statistics=True))
    assert outcome.reports == []
    # Each of both functions ran once, for the lanes that call it.
    first = program.kernel.functions["thrice"].first
    assert program.statistics()[first, 0] == 1
    return out


def test_functions_are_called_by_the_lanes_that_call_them():
    lane = torch.arange(32, dtype=torch.int32)
    assert torch.equal(called(), torch.where(lane % 2 == 1, 2 * lane, torch.where(lane < 16, 3 * lane, -3 * lane)))


def test_a_kernel_has_the_functions_that_it_calls_and_no_others():
    made = nvcc.kernels(HEAD + CALLS + CALLS[CALLS.index(".func thrice") :].replace("thrice", "fourfold"))["calls"]
    assert ".func thrice" in made.compiled
    assert made.compiled.index(".func thrice") < made.compiled.index(".entry")
    assert "fourfold" not in made.compiled + made.executed
    assert [one.name for one in Program(made.executed).kernel.functions.values()] == ["twice", "thrice"]


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("call.uni \n\tthrice", "call.uni \n\tprintf"),
        ("st.param.b32 \t[func_retval0+0], %r2;", "call.uni twice, (twice_param_0);"),
        (".param .b64 param2;", ".param .b32 param2;"),
        ("[thrice_param_1+4]", "[thrice_param_1+7]"),
        ("ld.param.u32 \t%r1, [thrice_param_0];", "ld.param.u32 \t%r1, [thrice_param_9];"),
        ("st.param.b32 \t[param0+0], %r1;", "st.param.b32 \t[calls_param_0], %r1;"),
    ],
)
def test_calls_that_are_not_known_are_errors(was, now):
    assert was in CALLS
    with pytest.raises(UnknownPtxError):
        called(CALLS.replace(was, now))


def test_what_a_function_gets_that_nobody_set_is_told():
    text = CALLS.replace("st.param.v2.b32 \t[param1+0], {%r1, %r4};", "st.param.b32 \t[param1+0], %r1;")
    with pytest.raises(AssertionError, match="a stored value that nobody set"):
        called(text)
