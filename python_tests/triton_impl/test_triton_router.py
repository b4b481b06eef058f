"""The router's Triton kernel, interpreted or compiled: what test_router.py asks of the reference."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
import torch._dynamo.testing
from triton_spy import DEVICE, DTYPES, INTERPRET, launches, needs_triton

needs_triton()

from router_cases import (
    SIZES,
    check_choice,
    check_compile,
    check_forward_and_gradients,
    check_module,
    check_not_finite,
    drawn,
)

from adamix_kernels.ops.router import triton_impl
from adamix_kernels.routing import router_gates


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_and_logits_are_the_definitions_ties_too(dtype):
    check_choice("triton", dtype, DEVICE)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_like_pytorch(dtype, size):
    check_forward_and_gradients("triton", dtype, *size, device=DEVICE)


def test_what_is_not_finite():
    check_not_finite("triton", DEVICE)


def test_one_launch_and_the_module():
    x, weight, bias = drawn((2, 40), 16, 6, True, True, torch.bfloat16, device=DEVICE)
    with launches(triton_impl) as names:
        router_gates(x, weight, bias, top_k=2, backend="triton")
        router_gates(x, weight, bias, backend="triton")
    assert names == ["router_kernel"] * 2
    check_module("triton", DEVICE)


@pytest.mark.skipif(not INTERPRET, reason="tracing is the same")
def test_compile_autocast_and_opcheck():
    torch._dynamo.reset()
    check_compile("triton")
