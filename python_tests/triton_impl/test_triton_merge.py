"""Merging on the Triton backend: interpreted on the CPU (TRITON_INTERPRET=1), compiled where there is a GPU."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_size import pairs
from triton_spy import DEVICE, DTYPES, launches, needs_triton

needs_triton()

from merge_cases import (
    LORA_BANKS,
    check_lists_that_differ_in_one_thing,
    check_lora_banks,
    check_lora_lists,
    check_results_are_apart,
    check_whole_lora_model,
    check_whole_model,
    experts_on,
    lora_case,
    lora_on,
)
from poison import poisoned_memory

from adamix_kernels import BackendUnavailableError, _backends
from adamix_kernels.functional import merge_experts, merge_lora
from adamix_kernels.ops.merge import triton_impl
from adamix_kernels.ops.merge.api import merge_banks
from adamix_kernels.testing import assert_in_budget

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def check_experts(*tensors):
    with launches(triton_impl) as names:
        assert_in_budget(experts_on("triton"), experts_on("reference"), *tensors)
    want = ["merge_experts_kernel", "merge_experts_grad_kernel", "merge_scores_grad_kernel"]
    assert names == want[: 2 if len(tensors) == 2 else 3]


@pairs(shape=[(4, 3, 5), (4, 60, 37), (1, 40), (3,), (9, 17, 2), (64, 41), (2, 1)], scored=[False, True], dtype=DTYPES)
def test_the_mean_and_its_gradients(shape, scored, dtype):
    scores = [randn(shape[0], dtype=dtype)] if scored else []
    check_experts(randn(*shape, dtype=dtype), randn(*shape[1:], dtype=dtype), *scores)


@settings(max_examples=15)
@given(experts=st.integers(1, 9), size=st.integers(1, 3000), scored=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_any_size(experts, size, scored, dtype):
    scores = [randn(experts, dtype=dtype)] if scored else []
    check_experts(randn(experts, size, dtype=dtype), randn(size, dtype=dtype), *scores)


def test_sums_of_many_programs(monkeypatch):
    monkeypatch.setattr(triton_impl, "MAX_PROGRAMS", 3)
    check_experts(randn(4, 3001), randn(3001), randn(4))


def test_uniform_scores_are_the_mean_and_one_expert_a_copy():
    bank = randn(3, 100, dtype=torch.bfloat16)
    assert torch.equal(
        merge_experts(bank, bank.new_zeros(3), backend="triton"), merge_experts(bank, None, backend="triton")
    )
    assert torch.equal(merge_experts(bank[:1], None, backend="triton"), bank[0])
    big = torch.full((4, 3), 60000.0, dtype=torch.float16, device=DEVICE)
    assert torch.equal(merge_experts(big, backend="triton"), big[0])


def test_scores_of_another_dtype_and_empty_banks():
    bank, scores = randn(3, 20), randn(3, dtype=torch.float64)
    got = merge_experts(bank, scores, backend="triton")
    assert torch.equal(got, merge_experts(bank, scores, backend="reference"))
    (grad,) = torch.autograd.grad(
        merge_experts(bank[:, :0], s := scores.clone().requires_grad_(), backend="triton").sum(), s
    )
    assert grad.eq(0).all()


# Banks of whole models: both sides, weights and biases; odd sizes, one expert, nothing.
SHAPES = [(4, 16, 64), (4, 16), (4, 64, 16), (4, 64), (3, 7, 5), (1, 33), (2, 1100), (4, 0), (9, 3), (4, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scored", ["none", "all", "some"])
def test_a_list_of_banks_in_one_launch(scored, dtype):
    banks = [randn(*shape, dtype=dtype) for shape in SHAPES]
    which = {"none": 0, "all": 1, "some": 2}[scored]
    scores = [randn(len(bank)) if which and n % which == 0 else None for n, bank in enumerate(banks)]
    with launches(triton_impl) as names, poisoned_memory():
        got = merge_banks(banks, scores, backend="triton")
    assert names == ["merge_banks_kernel"]
    for out, bank, score in zip(got, banks, scores, strict=True):
        torch.testing.assert_close(out, merge_experts(bank, score, backend="reference"))


def test_a_list_of_unaligned_slices_and_of_mixed_dtypes():
    whole = randn(4 * 40 + 1)
    banks = [whole[1:].view(4, 40), randn(4, 40), randn(4, 40, dtype=torch.float16), randn(5, 8).t()]
    with launches(triton_impl) as names:
        got = merge_banks(banks, [None] * 4, backend="triton")
    assert names == ["merge_banks_kernel"] * 2
    for out, bank in zip(got, banks, strict=True):
        assert torch.equal(out, merge_experts(bank, backend="triton"))
    assert merge_banks([], [], backend="triton") == []


def test_bad_lists_are_named():
    with pytest.raises(ValueError, match="scores: got 1 of them"):
        merge_banks([randn(2, 3), randn(2, 3)], [None])
    with pytest.raises(ValueError, match=r"banks\[1\]: got shape \(0, 3\)"):
        merge_banks([randn(2, 3), randn(0, 3)], [None, None])
    with pytest.raises(ValueError, match=r"scores\[0\]"):
        merge_banks([randn(2, 3)], [randn(3)])


def test_a_list_is_no_other_list():
    check_lists_that_differ_in_one_thing("triton", randn)


def test_the_results_of_a_list_are_apart():
    check_results_are_apart("triton", randn)


def test_a_whole_model_merges_in_one_launch_and_back_to_the_same_bits():
    assert check_whole_model("triton", DEVICE, lambda: launches(triton_impl)) == ["merge_banks_kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize(("groups", "experts", "r"), [(1, 1, 4), (2, 3, 5), (3, 1, 17)])
def test_lora_into_a_weight(groups, experts, r, fan, dtype):
    tensors, options = lora_case(randn, groups, experts, r, fan, dtype)
    with launches(triton_impl) as names:
        assert_in_budget(lora_on("triton", **options), lora_on("reference", **options), *tensors)
    assert names == ["merge_experts_kernel"] * (experts > 1) + ["merge_lora_kernel"]


def test_lora_layers_that_are_alike_in_one_launch():
    """Five kinds in a list of seven, one of them of two banks."""
    names = check_lora_lists("triton", randn, lambda: launches(triton_impl))
    assert sorted(names) == ["merge_experts_kernel"] * 2 + ["merge_lora_kernel"] * 5
    whole = check_whole_lora_model("triton", DEVICE, lambda: launches(triton_impl))
    assert whole == ["merge_banks_kernel", "merge_lora_kernel"]


@pytest.mark.parametrize(("dtype", "fan"), [(torch.bfloat16, False), (torch.float16, True)])
def test_banks_are_merged_and_averaged_in_one_launch(dtype, fan):
    """But for scores of 16 bits."""
    around = lambda: launches(triton_impl, directly=True)  # noqa: E731
    names = check_lora_banks("triton", randn, dtype, dtype, fan, around=around)
    assert names == [["merge_lora_kernel"]] * 2 + [["merge_banks_kernel", "merge_lora_kernel"], ["merge_lora_kernel"]]


def test_banks_of_float32_are_averaged_first():
    banks = LORA_BANKS[:1]
    names = check_lora_banks(
        "triton", randn, torch.bfloat16, torch.float32, False, banks, lambda: launches(triton_impl)
    )
    assert names == [["merge_banks_kernel", "merge_lora_kernel"]]


@pytest.mark.parametrize("fan", [False, True])
def test_what_no_group_touches_keeps_its_bits(fan):
    weight = torch.full((50, 50), -0.0, device=DEVICE)
    out = merge_lora(
        weight, randn(4, 50), randn(20, 4), scaling=2.0, output_offsets=(5,), fan_in_fan_out=fan, backend="triton"
    )
    rest = (out.t() if fan else out)[[*range(5), *range(25, 50)]]
    assert torch.signbit(rest).all()
    assert weight.eq(0).all()


def test_factors_of_another_dtype():
    weight, a, b = randn(33, 20, dtype=torch.bfloat16), randn(4, 20), randn(33, 4)
    got = merge_lora(weight, a, b, scaling=0.5, backend="triton")
    exact = weight.double() + 0.5 * b.double() @ a.double()
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_the_same_bits_twice_whatever_the_strides():
    bank, dy, scores = randn(4, 50, 41), randn(50, 41), randn(4)
    want = experts_on("triton")(bank, dy, scores)
    assert all(torch.equal(a, b) for a, b in zip(want, experts_on("triton")(bank, dy, scores)))
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (bank, dy)]
    spread = torch.stack([scores, scores], -1)[:, 0]
    assert all(torch.equal(a, b) for a, b in zip(want, experts_on("triton")(*strided, spread)))


def test_no_tensor_value_reaches_python():
    meta = lambda *shape: torch.empty(shape, device="meta")  # noqa: E731
    with launches(triton_impl, run=False) as names:
        triton_impl.experts_forward(meta(4, 30, 7), meta(4))
        triton_impl.experts_backward(meta(30, 7), meta(4, 30, 7), meta(4), True, True)
        triton_impl.lora_forward(meta(9, 7), meta(1, 2, 7), meta(3, 9, 2), 2.0, 1, [0], False)
        triton_impl.banks_forward([meta(4, 30), meta(3, 5)], [meta(4), None])
    assert len(names) == 6


def test_torch_compile_and_opcheck():
    bank, scores, weight = randn(4, 30).requires_grad_(), randn(4).requires_grad_(), randn(30, 5).requires_grad_()

    def loss(bank, scores, weight):
        merged = merge_experts(bank, scores, backend="triton")
        a, b = merged[:10].view(2, 5), merged.view(15, 2).repeat(2, 1)
        lora = merge_lora(weight, a, b, scaling=2.0, backend="triton")
        return lora.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = bank, scores, weight
    got, want = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    torch.testing.assert_close(got, want)
    torch.library.opcheck(torch.ops.adamix_kernels.merge_experts.default, (bank, scores, "triton"))
    banks = [bank.detach(), randn(3, 7)]
    torch.library.opcheck(
        torch.ops.adamix_kernels.merge_banks.default,
        (banks, [scores.detach(), None], "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_float64_is_refused_and_auto_never_interprets():
    with pytest.raises(BackendUnavailableError, match="float16, bfloat16 and float32"):
        merge_experts(randn(2, 3, dtype=torch.float64), backend="triton")
    chosen = _backends.select("merge", "auto", "cpu", torch.float32)
    assert chosen.__name__.endswith("merge.reference")
