"""The frozen linear layer with routed LoRA in one Triton kernel: interpreted, or compiled where there is a GPU."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import os

import pytest
import torch
from poison import poisoned_memory
from triton_spy import DEVICE, DTYPES, launches, needs_triton

needs_triton()

from test_triton_routed_lora import draw

from adamix_kernels.functional import routed_lora
from adamix_kernels.ops.routed_lora import triton_impl
from adamix_kernels.ops.routed_lora.triton_impl import frozen_linear
from adamix_kernels.testing import assert_in_budget

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kinds", [("none", "none"), ("sample", "none"), ("none", "token"), ("token", "sample")])
def test_frozen_linear(kinds, dropout_p, groups):
    check_frozen(torch.float32, dropout_p, *kinds, groups, batch=3, tokens=7, features=37, rank=4, per_group=9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_linear_tail_tiles(dtype):
    sizes = dict(batch=3, tokens=23, features=37, rank=20, per_group=23)
    check_frozen(dtype, 0.3, "sample", "token", 2, **sizes)


def check_frozen(dtype, dropout_p, a_kind, b_kind, groups, **sizes):
    (x, a, b, base, dy), options = draw(a_kind, b_kind, groups, dtype=dtype, **sizes)
    weight, bias = (torch.randn(*s, dtype=dtype, device=DEVICE) for s in ((base.shape[2], x.shape[2]), base.shape[2:]))
    seed = torch.tensor(3, device=DEVICE) if dropout_p else None
    indices, offsets = (options["a_index"], options["b_index"]), options["output_offsets"]

    def fused(x, a, b, weight, bias, dy):
        tail = (a, b, *indices, 1.7)
        keywords = dict(offsets=offsets, seed=seed, dropout_p=dropout_p)
        with poisoned_memory():
            out, t = frozen_linear.frozen_linear_lora(x, weight, bias, *tail, **keywords)
            dx, dt = frozen_linear.frozen_linear_lora_dx(dy, weight, *tail, **keywords)
        want = triton_impl.forward(x, a, b, *indices, None, seed, 1.7, groups, list(offsets), dropout_p)[1]
        torch.testing.assert_close(t, want)
        assert dt.isfinite().all()
        return out, dx

    def plain(x, a, b, weight, bias, dy):
        x = x.clone().requires_grad_()
        base = torch.nn.functional.linear(x, weight, bias)
        out = routed_lora(x, a, b, **options, base=base, seed=seed, dropout_p=dropout_p, backend="reference")
        return out.detach(), *torch.autograd.grad(out, x, dy)

    with launches(frozen_linear, triton_impl) as names:
        assert_in_budget(fused, plain, x, a, b, weight, bias, dy, multiple=4.0)
    assert names[:2] == ["frozen_forward_kernel", "frozen_dx_kernel"]


def test_frozen_linear_says_what_it_cannot_serve():
    (x, a, b, _, dy), options = draw(rank=129, dtype=torch.float32)
    tail = (b, options["a_index"], None, 1.0)
    with pytest.raises(ValueError, match=r"^lora_a: got 129 rows"):
        frozen_linear.frozen_linear_lora(x, x.new_zeros(3, 4), None, a, *tail)
    with pytest.raises(ValueError, match=r"^weight: got shape"):
        frozen_linear.frozen_linear_lora(x, x.new_zeros(3, 5), None, a, *tail)
    with pytest.raises(ValueError, match=r"^weight: got shape"):
        frozen_linear.frozen_linear_lora_dx(dy, x.new_zeros(4, 4), a, *tail)


def test_no_shape_is_known_to_win_with_the_frozen_linear_layer():
    assert not frozen_linear.wins(torch.device(DEVICE), 1024, 3072, 16)
    assert all(os.path.exists(row.partition(":")[0]) for row in frozen_linear.WINS.values())
