"""router_gates on the reference backend against its definition and finite differences, and who calls it."""

import pytest
import torch
import torch._dynamo.testing
from router_cases import (
    SIZES,
    check_choice,
    check_compile,
    check_forward_and_gradients,
    check_module,
    check_not_finite,
    drawn,
)

from adamix_kernels import BackendUnavailableError
from adamix_kernels.routing import LinearRouter, router_gates

LOW = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_ids_and_logits_are_the_definitions_ties_too(dtype):
    check_choice("reference", dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_errs_like_pytorch(dtype, size):
    check_forward_and_gradients("reference", dtype, *size)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(top_k, bias):
    tensors = [t if t is None else t.requires_grad_() for t in drawn((2, 3), 5, 4, bias, False, torch.float64)]
    given = [t for t in tensors if t is not None]

    def call(*given):
        gates, _, logits = router_gates(*given, top_k=top_k, backend="reference")
        return gates, logits

    assert torch.autograd.gradcheck(call, given)
    # Through one of both alone.
    assert torch.autograd.gradcheck(lambda *given: call(*given)[0], given)
    assert torch.autograd.gradcheck(lambda *given: call(*given)[1], given)


def test_one_gradient_at_a_time_and_experts_that_nobody_chose():
    x, weight, bias = drawn((2, 3), 5, 4, True, False, torch.float64)
    bias[3] = -100.0
    for n in range(3):
        given = [t.clone().requires_grad_(m == n) for m, t in enumerate((x, weight, bias))]
        router_gates(*given, top_k=2, backend="reference").gates[..., 0].sum().backward()
        assert [t.grad is not None for t in given] == [m == n for m in range(3)]
        assert n == 0 or (given[n].grad[3] == 0).all()


def test_what_is_not_finite():
    check_not_finite("reference")


def test_compile_autocast_and_opcheck():
    torch._dynamo.reset()
    check_compile("reference")


def test_the_module_calls_the_op_where_kernels_serve(monkeypatch):
    """On the reference it stays the plain product and softmax."""
    from adamix_kernels.ops.router import reference
    from adamix_kernels.routing import linear

    calls = []
    monkeypatch.setattr(linear, "by_kernel", lambda backend, *_: backend == "auto")
    real = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a: calls.append(1) or real(*a))
    check_module("auto")
    assert len(calls) == 1
    # Weights of 16 bits under inputs of float32 are cast for the call; beyond what kernels hold, nobody asks.
    assert LinearRouter(8, 3, dtype=torch.bfloat16)(torch.randn(2, 3, 8)).gates.dtype == torch.float32
    assert len(calls) == 2
    LinearRouter(8, 257)(torch.randn(2, 3, 8))
    assert len(calls) == 2


BAD = [
    (dict(x=None), TypeError, "x: got NoneType"),
    (dict(x=torch.ones(2, 3, dtype=torch.int64)), TypeError, "x: got torch.int64"),
    (dict(x=torch.tensor(1.0)), ValueError, "x: got shape ()"),
    (dict(weight=torch.ones(4, 7)), ValueError, "weight: got shape (4, 7), expected [M, H]"),
    (dict(weight=torch.ones(257, 8)), ValueError, "1 <= M <= 256"),
    (dict(weight=torch.ones(0, 8)), ValueError, "weight: got shape (0, 8)"),
    (dict(weight=torch.ones(4, 8).half()), TypeError, "weight: got torch.float16, expected torch.float32"),
    (dict(weight=torch.ones(4, 8, device="meta")), ValueError, "weight: got a tensor on meta"),
    (dict(bias=torch.ones(3)), ValueError, "bias: got shape (3,), expected [M] = (4,)"),
    (dict(bias=torch.ones(4).double()), TypeError, "bias: got torch.float64"),
    (dict(top_k=0), ValueError, "top_k: got 0"),
    (dict(top_k=5), ValueError, "top_k: got 5, expected None (all experts) or 1 <= top_k <= 4"),
    (dict(top_k=True), ValueError, "top_k: got True"),
    (dict(backend="x"), ValueError, "backend: got 'x'"),
]


@pytest.mark.parametrize(("changed", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_bad_input_is_named(changed, error, words):
    given = dict(x=torch.ones(2, 3, 8), weight=torch.ones(4, 8), bias=None) | changed
    with pytest.raises(error) as found:
        router_gates(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)
    assert words in str(found.value)


def test_an_absent_backend_is_refused():
    with pytest.raises(BackendUnavailableError, match="router"):
        router_gates(torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3), backend="triton")
