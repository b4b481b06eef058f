"""routed LoRA's backward that reads dy once, taken here for few rows."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import functools

import pytest
import torch
from triton_spy import DEVICE, launches, needs_triton

needs_triton()

from plain_lora import draw_lora, run_lora

from adamix_kernels.ops import _one_read
from adamix_kernels.ops.routed_lora import triton_impl
from adamix_kernels.ops.routed_lora.triton_impl import one_read, weights
from adamix_kernels.testing import assert_in_budget
from reliability import fuzz_triton

spied_launches = functools.partial(launches, triton_impl, one_read, weights)
draw = functools.partial(draw_lora, DEVICE)
pytestmark = pytest.mark.skipif(not _one_read.KEEPS, reason="needs Triton 3.3")


@pytest.fixture(autouse=True)
def few_rows():
    with fuzz_triton.one_read(DEVICE):
        yield


CASES = {
    "samples within programs": dict(batch=5, tokens=17, features=128, rank=16, per_group=128),
    "programs within samples": dict(batch=2, tokens=60, features=128, rank=5, per_group=128),
    "wider than it is long": dict(batch=3, tokens=20, features=136, rank=8, per_group=72),
    "one expert": dict(a_kind="none", batch=3, tokens=17, features=72, rank=4, per_group=136),
    "one program": dict(a_kind="none", batch=1, tokens=5, features=72, rank=4, per_group=72),
}


@pytest.mark.parametrize(
    ("case", "dropout_p"),
    [
        ("samples within programs", 0.3),
        ("wider than it is long", 0.0),
        ("one expert", 0.3),
        ("one program", 0.0),
        *(pytest.param("programs within samples", p, marks=pytest.mark.nightly) for p in (0.0, 0.3)),
    ],
)
def test_every_cut_of_the_rows(case, dropout_p):
    dtype = torch.float16 if case == "wider than it is long" else torch.bfloat16
    tensors, options = draw(**CASES[case], dtype=dtype)
    runs = [run_lora(backend, tensors, options, dropout_p) for backend in ("triton", "reference")]
    with spied_launches() as names:
        assert_in_budget(*runs, *(t for t in tensors if t is not None))
    assert names[1:] == ["lora_grad_out_pass_kernel", "lora_grads_kernel", "lora_sum_kernel"]


def backward(needed, wrong=None, dropout_p=0.3):
    """(x's, A's, B's gradient); wrong: [3, 17] of rows whose id of A is."""
    torch.manual_seed(0)
    dy, x = torch.randn(2, 3, 17, 128, dtype=torch.bfloat16, device=DEVICE).unbind(0)
    t = torch.randn(3, 17, 8, dtype=x.dtype, device=DEVICE)
    a, b = torch.randn(2, 8, 128, device=DEVICE).to(x.dtype), torch.randn(1, 128, 8, device=DEVICE).to(x.dtype)
    index = torch.tensor([1, 0, 1], device=DEVICE)
    if wrong is not None:
        # As the forward leaves it.
        t, index = t.masked_fill(wrong[..., None], 0), torch.where(wrong[:, 0], 2, index)
    seed = torch.tensor(7, device=DEVICE)
    return triton_impl.backward(dy, x, t, a, b, index, None, seed, *needed, 2.0, 1, [0], dropout_p)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, True)])
def test_what_is_not_wanted_changes_no_bit_of_the_rest(needed):
    for wanted, some, one in zip(needed, backward(needed), backward((True, True, True)), strict=True):
        assert torch.equal(some, one) if wanted else some.numel() == 0


def test_a_wrong_id_is_nan_in_its_rows_and_teaches_no_expert():
    wrong = torch.zeros(3, 17, dtype=torch.bool, device=DEVICE)
    wrong[1] = True
    dx, da, db = backward((True, True, True), wrong)
    assert dx[1].isnan().all()
    assert dx[[0, 2]].isfinite().all()
    assert db.isfinite().all()
    # The one sample of expert 0 was the wrong one.
    assert not da[0].any()
    assert torch.equal(da[1], backward((True, True, True))[1][1])


def test_dy_is_read_twice_where_it_must():
    for changed in (dict(groups=2), dict(b_kind="sample"), dict(a_kind="token"), dict(dtype=torch.float32)):
        tensors, options = draw(**CASES["samples within programs"] | dict(dtype=torch.bfloat16) | changed)
        with spied_launches(run=False) as names:
            run_lora("triton", tensors, options, 0.0)(*(t for t in tensors if t is not None))
        assert names[1] == "lora_dx_kernel"
