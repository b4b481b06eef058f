"""The fuzzing of the Triton kernels in its small size, and that it sees a kernel that computes something else."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

from unittest import mock

import pytest
import torch
from triton_spy import INTERPRET, needs_triton

needs_triton()
if not INTERPRET:
    pytest.skip("set TRITON_INTERPRET=1: cases are drawn for the CPU", allow_module_level=True)

from adamix_kernels.functional import routed_adapter, routed_lora
from adamix_kernels.ops.routed_adapter.triton_impl import weights
from adamix_kernels.ops.routed_lora.triton_impl import plan
from adamix_kernels.testing import poisoned_memory
from reliability import fuzz_triton
from reliability.fuzz.case import check
from reliability.fuzz.kernels import run_groups
from reliability.fuzz.run import run_cases

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.nightly  # by day make ptx draws such cases for the compiled kernels
def test_every_kernel_is_reached_and_holds():
    figures = list(fuzz_triton.run("small"))
    assert len(figures) == len(fuzz_triton.groups()) + len(fuzz_triton.kernels())
    assert [f"{figure.about}: {figure.value}" for figure in figures if not figure.passed] == []


def test_a_wrong_kernel_is_found():
    lora = next(group for group in fuzz_triton.groups() if group.about == "routed_lora")
    real = plan.dropout_constants
    with mock.patch.object(plan, "dropout_constants", lambda p: (real(p)[0], real(p)[1] * 1.5)):
        outcome = run_cases("", lora.cases, lambda case: check(case, "triton"), 100, True)
    assert "result" in outcome.failure


def test_a_kernel_that_no_case_reaches_is_seen():
    lora = [group for group in fuzz_triton.groups() if group.about == "routed_lora"]
    names = "lora_forward_kernel", "no_kernel"
    figures = list(run_groups(lora, "triton", fuzz_triton.launches, names, 1, True))
    assert [figure.passed for figure in figures] == [True, True, False]


@pytest.mark.parametrize("op", ["adapter", "lora"])
def test_rank_zero_leaves_what_the_banks_are_added_to(op):
    """Fuzzing found an unbound variable in the one and a division by zero in the other."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    i = torch.tensor([1, 0])
    down, up = torch.randn(2, 0, 4, requires_grad=True), torch.randn(1, 4, 0, requires_grad=True)
    if op == "adapter":
        out = routed_adapter(x, down, None, up, None, i, None, residual=x, backend="triton")
    else:
        out = routed_lora(x, down, up, i, None, base=x, backend="triton")
    assert torch.equal(out, x)
    dx, *banks = torch.autograd.grad(out, (x, down, up), torch.ones_like(out))
    assert dx.eq(1).all()
    assert [g.shape for g in banks] == [down.shape, up.shape]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("hidden", "out"), [(0, 4), (4, 0), (0, 0)])
def test_no_features_are_not_read(hidden, out, splits, monkeypatch):
    """Fuzzing found a load beside an empty tensor, unmasked as 0 is a multiple of every tile, and a bias left out."""
    monkeypatch.setattr(weights, "count_splits", lambda *_: splits)
    x, down = torch.randn(40, 3, hidden, requires_grad=True), torch.randn(2, 2, hidden, requires_grad=True)
    down_bias = torch.randn(2, 2, requires_grad=True)
    up, bias = torch.randn(1, out, 2, requires_grad=True), torch.randn(1, out, requires_grad=True)
    i = torch.arange(40) % 2
    for backend in ("triton", "reference"):
        result = routed_adapter(x, down, down_bias, up, bias, i, None, backend=backend)
        with poisoned_memory():
            grads = torch.autograd.grad(result, (x, down, down_bias, up, bias), torch.ones_like(result))
        if backend == "triton":
            kept = result, *grads
    for mine, want in zip(kept, (result, *grads)):
        torch.testing.assert_close(mine, want)
