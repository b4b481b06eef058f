"""The routed adapter's backward that reads dy once, taken here for few rows."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import functools
from unittest import mock

import pytest
import torch
from triton_spy import DEVICE, launches, needs_triton

needs_triton()

from adapter_cases import draw_adapter, run_adapter

from adamix_kernels.ops import _adapter_planes, _one_read
from adamix_kernels.ops.routed_adapter import triton_impl
from adamix_kernels.ops.routed_adapter.triton_impl import one_read, weights
from adamix_kernels.testing import assert_in_budget
from reliability import fuzz_triton

spied_launches = functools.partial(launches, triton_impl, one_read, weights, _adapter_planes)
draw = functools.partial(draw_adapter, DEVICE)
pytestmark = pytest.mark.skipif(not _one_read.KEEPS, reason="needs Triton 3.3")


@pytest.fixture(autouse=True)
def few_rows():
    with fuzz_triton.one_read(DEVICE):
        yield


# (batch, tokens, hidden, r, Md, Mu, down's index, up's index[, out[, bias]])
CASES = {
    "samples within programs": (5, 17, 128, 16, 3, 1, "sample", None),
    "programs within samples": (2, 60, 128, 5, 2, 1, "sample", None),
    "padded features": (3, 20, 136, 8, 4, 1, "sample", "sample"),
    "one expert": (3, 21, 128, 16, 1, 1, None, None),
    "one expert, with ids": (3, 17, 128, 16, 1, 1, "sample", "token"),
}


def check(case, residual="input", activation="gelu", dtype=torch.bfloat16):
    tensors, indices = draw(dtype, *CASES[case])
    runs = [run_adapter(backend, tensors, indices, residual, activation) for backend in ("triton", "reference")]
    with spied_launches() as names:
        assert_in_budget(*runs, *tensors)
    assert names[1:] == ["adapter_grad_out_pass_kernel", "adapter_weight_grad_kernel", "adapter_plane_sum_kernel"]


@pytest.mark.parametrize("case", CASES)
def test_every_cut_of_the_rows(case):
    check(case)


@pytest.mark.parametrize("residual", ["none", pytest.param("other", marks=pytest.mark.nightly)])
def test_other_residuals_in_float16(residual):
    check("padded features", residual, dtype=torch.float16)


@pytest.mark.parametrize("activation", [pytest.param("gelu_tanh", marks=pytest.mark.nightly), "relu", None])
def test_every_activation(activation):
    check("one expert", activation=activation)


def test_a_wrong_id_is_nan_in_its_rows_and_teaches_no_expert():
    (x, down, _, up, _, dy), good = draw(torch.bfloat16, *CASES["one expert, with ids"])
    bad = [ids.clone() for ids in good]
    bad[0][1], bad[1][2, 4] = 1, -1
    wrong = torch.zeros(x.shape[:2], dtype=torch.bool, device=DEVICE)
    wrong[1], wrong[2, 4] = True, True
    # As the forward leaves it.
    pre = torch.randn(*x.shape[:2], 16, dtype=x.dtype, device=DEVICE).masked_fill(wrong[..., None], 0)
    dx, *grads = triton_impl.backward(dy, x, pre, down, up, *bad, True, True, True, True, "gelu")
    assert dx[wrong].isnan().all()
    assert dx[~wrong].isfinite().all()
    # As if those rows were not there; the down side's id does not concern the up side's bias.
    without = dy.masked_fill(wrong[..., None], 0)
    _, *want = triton_impl.backward(without, x, pre, down, up, *good, True, True, True, True, "gelu")
    assert all(torch.equal(got, one) for got, one in zip(grads[:3], want[:3], strict=True))
    assert grads[3].isfinite().all()


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 1)])
def test_what_is_not_wanted_changes_no_bit_of_the_rest(needed):
    (x, down, _, up, _, dy), (index, _) = draw(torch.bfloat16, *CASES["samples within programs"])
    pre = torch.randn(*x.shape[:2], 16, dtype=x.dtype, device=DEVICE)
    run = functools.partial(triton_impl.backward, dy, x, pre, down, up, index, None)
    some, everything = run(*map(bool, needed), True, "gelu"), run(True, True, True, True, "gelu")
    groups = ((0,), (1, 2), (3, 4))
    for wanted, group in zip(needed, groups, strict=True):
        assert all(torch.equal(some[n], everything[n]) if wanted else some[n].numel() == 0 for n in group)


def test_an_expert_without_samples_gets_zeros():
    tensors, _ = draw(torch.bfloat16, *CASES["samples within programs"])
    index = torch.tensor([0, 2, 0, 0, 2], device=DEVICE)
    _, _, down, down_bias, *_ = run_adapter("triton", tensors, [index, None])(*tensors)
    assert [bool(grad.any()) for grad in down] == [bool(grad.any()) for grad in down_bias] == [True, False, True]


def test_dy_is_read_twice_where_it_must():
    here = torch.device(DEVICE)
    plan = functools.partial(triton_impl.make_plan, 4, 64, 8)
    one = plan(None, None, 1, 1)
    assert _one_read.tiles_a_program(one, here, 2, 8, 128) == 6
    ids = torch.zeros(4, dtype=torch.long, device=DEVICE)
    tokens = ids[:, None].expand(4, 64)
    wrong = {
        "an up side of several experts": (plan(None, ids, 1, 2), here, 2, 8, 128),
        "an expert a token": (plan(tokens, None, 2, 1), here, 2, 8, 128),
        "float32": (one, here, 4, 8, 128),
        "wider than a product": (one, here, 2, 17, 128),
        "no rank": (one, here, 2, 0, 128),
        "more features than registers hold": (one, here, 2, 8, 128, 1032),
        "rows that begin anywhere": (one, here, 2, 8, 132),
        "no features": (one, here, 2, 8, 0),
    }
    assert {why for why, arguments in wrong.items() if _one_read.tiles_a_program(*arguments)} == set()
    with mock.patch.object(_one_read, "MIN_ROWS", 86):
        assert _one_read.tiles_a_program(one, here, 2, 8, 128) == 0
    with mock.patch.dict(_one_read.PROGRAMS, clear=True):  # of little shared memory
        assert _one_read.tiles_a_program(one, here, 2, 8, 128) == 0
