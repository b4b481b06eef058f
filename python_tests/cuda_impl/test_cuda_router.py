"""The router's kernel of csrc/: what test_router.py asks of the reference."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
import torch._dynamo.testing
from cuda_host import DEVICE, DTYPES, needs_cuda

needs_cuda()

from router_cases import SIZES, check_choice, check_compile, check_forward_and_gradients, check_module, check_not_finite

from adamix_kernels.routing import router_gates

OPS = torch.ops.adamix_cuda


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_and_logits_are_the_definitions_ties_too(dtype):
    check_choice("cuda", dtype, DEVICE)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_like_pytorch(dtype, size):
    check_forward_and_gradients("cuda", dtype, *size, device=DEVICE)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_start_anywhere_and_many_experts(dtype):
    """x and the weight behind an odd address, features that fill no piece of 16 bytes, experts beyond one pass."""
    for features, experts, top_k in ((37, 9, 3), (64, 40, None), (3, 256, 33)):
        x, weight = (
            torch.randint(-1, 2, (rows * features + 1,)).to(DEVICE, dtype)[1:].view(rows, features)
            for rows in (19, experts)
        )
        got = router_gates(x, weight, top_k=top_k, backend="cuda")
        want = router_gates(x, weight, top_k=top_k, backend="reference")
        assert torch.equal(got.logits, want.logits)
        torch.testing.assert_close(got.gates, want.gates)
        assert top_k is None or torch.equal(got.indices, want.indices)


def test_what_is_not_finite():
    check_not_finite("cuda", DEVICE)


def test_the_module():
    check_module("cuda", DEVICE)


def test_compile_autocast_and_opcheck():
    torch._dynamo.reset()
    check_compile("cuda", DEVICE)


def test_bad_input_is_named_in_cpp_too():
    ones = lambda *shape: torch.ones(*shape, device=DEVICE)  # noqa: E731
    x, weight = ones(2, 8), ones(4, 8)
    bad = [
        ((x.double(), weight, None, 0), "x: got"),
        ((x, ones(4, 7), None, 0), "weight: got"),
        ((x, ones(257, 8), None, 0), "1 <= M <= 256"),
        ((x, weight.half(), None, 0), "weight: got Half"),
        ((x, weight, ones(3), 0), "bias: got"),
        ((x, weight, ones(4).half(), 0), "bias: got Half"),
        ((x, weight, None, 4), "top_k: got 4"),
    ]
    for arguments, words in bad:
        with pytest.raises(RuntimeError, match=words):
            OPS.router_forward(*arguments)
