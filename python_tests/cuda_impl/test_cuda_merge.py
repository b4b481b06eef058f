"""Merging on the C++/CUDA backend: on a GPU, or its kernels on the CPU (see cuda_host.py)."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
import torch._dynamo.testing
from cuda_host import DEVICE, DTYPES, ON_HOST, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_size import pairs

needs_cuda()

from cuda_probes import captured_graph
from merge_cases import (
    check_lists_that_differ_in_one_thing,
    check_results_are_apart,
    check_whole_model,
    experts_on,
)
from poison import poisoned_memory

from adamix_kernels import BackendUnavailableError
from adamix_kernels.functional import merge_experts, merge_lora
from adamix_kernels.ops.merge import cuda_impl, reference
from adamix_kernels.ops.merge.api import merge_banks
from adamix_kernels.testing import assert_in_budget

OPS = torch.ops.adamix_cuda


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def check_experts(*tensors):
    # A maximum over few elements is luck.
    multiple = 2.0 if tensors[1].numel() >= 100 else 8.0
    assert_in_budget(experts_on("cuda"), experts_on("reference"), *tensors, multiple=multiple)


def draw_experts(shape, scored, dtype):
    scores = [randn(shape[0], dtype=dtype)] if scored else []
    return randn(*shape, dtype=dtype), randn(*shape[1:], dtype=dtype), *scores


@pairs(
    shape=[(4, 3, 5), (4, 60, 37), (1, 40), (3,), (9, 17, 2), (64, 41), (2, 1), (4, 2056)],
    scored=[False, True], dtype=DTYPES,
)  # fmt: skip
def test_the_mean_and_its_gradients(shape, scored, dtype):
    check_experts(*draw_experts(shape, scored, dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 60, 37), torch.float32), ((3, 2056), torch.float16), ((7, 5), torch.bfloat16)]
)
def test_memory_and_barriers_of_the_mean(shape, dtype):
    check_experts(*draw_experts(shape, True, dtype))


@settings(max_examples=15)
@given(experts=st.integers(1, 9), size=st.integers(1, 3000), scored=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_any_size(experts, size, scored, dtype):
    check_experts(*draw_experts((experts, size), scored, dtype))


def test_sums_of_more_chunks_than_blocks():
    """1,024 blocks take 1,024 float32 elements at a time."""
    if ON_HOST:
        pytest.skip("takes long on the CPU")
    check_experts(*draw_experts((2, 2**20 + 3001), True, torch.float32))


def test_uniform_scores_are_the_mean_and_one_expert_a_copy():
    bank = randn(3, 100, dtype=torch.bfloat16)
    mean = merge_experts(bank, None, backend="cuda")
    assert torch.equal(merge_experts(bank, bank.new_zeros(3), backend="cuda"), mean)
    single = torch.full((1, 9), -0.0, device=DEVICE)
    assert torch.signbit(merge_experts(single, None, backend="cuda")).all()
    big = torch.full((4, 3), 60000.0, dtype=torch.float16, device=DEVICE)
    assert torch.equal(merge_experts(big, backend="cuda"), big[0])


def test_scores_of_another_dtype_are_summed_in_float64():
    bank, scores, dy = randn(3, 700), randn(3, dtype=torch.float64), randn(700)
    got = experts_on("cuda")(bank, dy, scores)
    want = experts_on("reference")(bank, dy, scores)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[2], want[2], rtol=1e-13, atol=1e-13)
    half = merge_experts(bank, scores.half(), backend="cuda")
    torch.testing.assert_close(half, merge_experts(bank, scores.half(), backend="reference"))


def test_nothing_to_merge_and_infinite_scores():
    scores = randn(3).requires_grad_()
    empty = merge_experts(randn(3, 20)[:, :0], scores, backend="cuda")
    assert torch.autograd.grad(empty.sum(), scores)[0].eq(0).all()
    off = torch.tensor([0.0, -float("inf"), 0.0], device=DEVICE)
    bank = randn(3, 20)
    torch.testing.assert_close(merge_experts(bank, off, backend="cuda"), (bank[0] + bank[2]) / 2)
    scores = torch.tensor([0.0, float("nan"), 0.0], device=DEVICE)
    assert merge_experts(bank, scores, backend="cuda").isnan().all()


def test_an_infinite_expert_stays_in_its_columns():
    bank, dy, scores = randn(3, 700), randn(700), randn(3)
    bank[1, 350] = float("inf")
    out, dbank, dscores = experts_on("cuda")(bank, dy, scores)
    assert out.isfinite().sum() == 699
    assert dbank.isfinite().all()
    assert not dscores.isfinite().any()


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed_is_computed_with_the_same_bits(needs):
    bank, dy, scores = draw_experts((4, 1300), True, torch.float32)
    want = cuda_impl.experts_backward(dy, bank, scores, True, True)
    got = cuda_impl.experts_backward(dy, bank, scores, *needs)
    for mine, full, needed in zip(got, want, needs, strict=True):
        assert torch.equal(mine, full if needed else bank.new_empty(0))


# Banks of whole models: both sides, weights and biases; odd sizes, one expert, nothing.
BANKS = [(4, 16, 64), (4, 16), (4, 64, 16), (4, 64), (3, 7, 5), (1, 33), (2, 1100), (4, 0), (9, 3), (4, 1)]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scored", ["none", "all", "some"])
def test_a_list_of_banks(scored, dtype):
    banks = [randn(*shape, dtype=dtype) for shape in BANKS]
    which = {"none": 0, "all": 1, "some": 2}[scored]
    scores = [randn(len(bank)) if which and n % which == 0 else None for n, bank in enumerate(banks)]
    with poisoned_memory():
        got = merge_banks(banks, scores, backend="cuda")
    for out, bank, score in zip(got, banks, scores, strict=True):
        assert torch.equal(out, merge_experts(bank, score, backend="cuda"))
        torch.testing.assert_close(out, merge_experts(bank, score, backend="reference"))


def test_a_list_of_more_banks_than_the_parameters_of_one_launch_hold():
    banks = [randn(2, n % 5) for n in range(300)]
    with poisoned_memory():
        got = merge_banks(banks, [None] * 300, backend="cuda")
    assert all(torch.equal(out, (bank[0] + bank[1]) / 2) for out, bank in zip(got, banks, strict=True))


def test_a_list_of_unaligned_slices_and_of_mixed_dtypes():
    whole = randn(4 * 40 + 1)
    banks = [whole[1:].view(4, 40), randn(4, 40), randn(4, 40, dtype=torch.float16), randn(5, 8).t()]
    got = merge_banks(banks, [None] * 4, backend="cuda")
    for out, bank in zip(got, banks, strict=True):
        assert torch.equal(out, merge_experts(bank.clone(), backend="cuda"))
    assert merge_banks([], [], backend="cuda") == []


def test_a_list_is_no_other_list():
    check_lists_that_differ_in_one_thing("cuda", randn)


def test_the_results_of_a_list_are_apart():
    check_results_are_apart("cuda", randn)


def test_a_whole_model_merges_and_unmerges_to_the_same_bits():
    check_whole_model("cuda", DEVICE)


def spread(t):
    """The same values, no axis contiguous."""
    return torch.stack([t, t], -1)[..., 0]


@pytest.mark.parametrize("layout", [spread, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)])
def test_the_same_bits_twice_whatever_the_strides(layout):
    bank, dy, scores = randn(4, 50, 41), randn(50, 41), randn(4)
    want = experts_on("cuda")(bank, dy, scores)
    assert all(torch.equal(a, b) for a, b in zip(want, experts_on("cuda")(bank, dy, scores)))
    assert all(torch.equal(a, b) for a, b in zip(want, experts_on("cuda")(*(layout(t) for t in (bank, dy, scores)))))
    weight, lora_a, lora_b = randn(30, 21), randn(2, 4, 21), randn(2, 30, 4)
    merged = merge_lora(weight, lora_a, lora_b, scaling=2.0, backend="cuda")
    strided = merge_lora(*(layout(t) for t in (weight, lora_a, lora_b)), scaling=2.0, backend="cuda")
    assert torch.equal(merged, strided)


@pytest.mark.skipif(not ON_HOST, reason="a GPU's order is its own")
def test_the_order_of_blocks_and_threads_does_not_matter(monkeypatch):
    tensors, weight = draw_experts((5, 4100), True, torch.float32), randn(70, 30)
    lora_a, lora_b = randn(2, 4, 30), randn(1, 70, 4)

    def run(order):
        monkeypatch.setenv("ADAMIX_HOST_ORDER", order)
        merged = merge_banks([tensors[0], tensors[0][:, :77]], [tensors[2], None], backend="cuda")
        lora = merge_lora(weight, lora_a, lora_b, scaling=2.0, backend="cuda")
        return *merged, lora, *experts_on("cuda")(*tensors)

    want = run("forward")
    for order in ("reverse", "3"):
        assert all(torch.equal(a, b) for a, b in zip(run(order), want, strict=True))


def test_torch_compile_and_opcheck():
    bank, scores, weight = randn(4, 30).requires_grad_(), randn(4).requires_grad_(), randn(30, 5).requires_grad_()

    def loss(bank, scores, weight):
        merged = merge_experts(bank, scores, backend="cuda")
        a, b = merged[:10].view(2, 5), merged.view(15, 2).repeat(2, 1)
        return merge_lora(weight, a, b, scaling=2.0, backend="cuda").square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = bank, scores, weight
    got, want = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    torch.testing.assert_close(got, want)
    torch.library.opcheck(torch.ops.adamix_kernels.merge_experts.default, (bank, scores, "cuda"))


@pytest.mark.skipif(ON_HOST, reason="CUDA graphs are the GPU's")
def test_a_graph_replays_it():
    bank, scores = randn(4, 500), randn(4)
    captured, graph = captured_graph(lambda: merge_banks([bank, bank[:, 1:]], [scores, None], backend="cuda"))
    bank.copy_(randn(4, 500))
    graph.replay()
    for got, want in zip(captured, reference.banks_forward([bank, bank[:, 1:]], [scores, None]), strict=True):
        torch.testing.assert_close(got, want)


def test_float64_is_refused():
    with pytest.raises(BackendUnavailableError, match="float16, bfloat16 and float32"):
        merge_experts(randn(2, 3, dtype=torch.float64), backend="cuda")


BANK, SCORES = torch.zeros(2, 3, device=DEVICE), torch.zeros(2, device=DEVICE)
WEIGHT, LORA_A, LORA_B = (torch.zeros(shape, device=DEVICE) for shape in ((6, 5), (1, 4, 5), (1, 4, 2)))
OTHER = "cpu" if DEVICE == "cuda" else "meta"


@pytest.mark.parametrize(
    ("message", "op", "arguments"),
    [
        ("weight: got none of them", "merge_loras_forward", ([], [], [], 1.0, 2, [0, 2], False)),
        ("lora_a: got 1 of them", "merge_loras_forward", ([WEIGHT] * 2, [LORA_A], [LORA_B] * 2, 1.0, 2, [0, 2], False)),
        (
            r"weight\[1\]: got shape",
            "merge_loras_forward",
            ([WEIGHT, WEIGHT.new_zeros(7, 5)], [LORA_A] * 2, [LORA_B] * 2, 1.0, 2, [0, 2], False),
        ),
        (
            r"lora_a\[1\]: got Half",
            "merge_loras_forward",
            ([WEIGHT] * 2, [LORA_A, LORA_A.half()], [LORA_B, LORA_B.half()], 1.0, 2, [0, 2], False),
        ),
        (r"banks\[1\]: got Double, expected", "merge_banks_forward", ([BANK, BANK.double()], [None, None], [0, 3], 6)),
        (
            r"banks\[1\]: got Half, expected Float",
            "merge_banks_forward",
            ([BANK, BANK.half()], [None, None], [0, 3], 6),
        ),
        (r"banks\[0\]: got shape \(0, 3\)", "merge_banks_forward", ([BANK[:0]], [None], [0], 3)),
        (r"banks: got none of them", "merge_banks_forward", ([], [], [], 0)),
        (r"scores: got 1 of them", "merge_banks_forward", ([BANK, BANK], [None], [0, 3], 6)),
        (r"scores\[1\]: got Long", "merge_banks_forward", ([BANK, BANK], [None, SCORES.long()], [0, 3], 6)),
        (r"offsets: got 1 of them", "merge_banks_forward", ([BANK, BANK], [None, None], [0], 6)),
        (r"offsets: got 4", "merge_banks_forward", ([BANK, BANK], [None, None], [0, 4], 6)),
        (r"offsets: got -1", "merge_banks_forward", ([BANK], [None], [-1], 3)),
        (r"scores\[0\]: got shape \(3,\), expected \[M\] = \(2,\)", "merge_banks_forward", ([BANK], [BANK[0]], [0], 3)),
        ("bank: got shape", "merge_experts_forward", (BANK[0, 0], None)),
        ("scores: got Long", "merge_experts_forward", (BANK, SCORES.long())),
        ("scores: got another device", "merge_experts_forward", (BANK, SCORES.to(OTHER))),
        ("grad_out: got shape", "merge_experts_backward", (BANK, BANK, None, True, False)),
        ("grad_out: got Half", "merge_experts_backward", (BANK[0].half(), BANK, None, True, False)),
        ("scores: got none", "merge_experts_backward", (BANK[0], BANK, None, True, True)),
        ("weight: got Double", "merge_lora_forward", (WEIGHT.double(), LORA_A, LORA_B, 1.0, 2, [0, 2], False)),
        ("weight: got shape", "merge_lora_forward", (WEIGHT[0], LORA_A, LORA_B, 1.0, 2, [0, 2], False)),
        ("lora_a: got Int", "merge_lora_forward", (WEIGHT, LORA_A.int(), LORA_B, 1.0, 2, [0, 2], False)),
        ("lora_a: got shape", "merge_lora_forward", (WEIGHT, LORA_A[..., 1:], LORA_B, 1.0, 2, [0, 2], False)),
        ("lora_a: got shape", "merge_lora_forward", (WEIGHT, LORA_A, LORA_B, 1.0, 3, [0, 2, 4], False)),
        ("lora_b: got Half", "merge_lora_forward", (WEIGHT, LORA_A, LORA_B.half(), 1.0, 2, [0, 2], False)),
        ("lora_b: got shape", "merge_lora_forward", (WEIGHT, LORA_A, LORA_B[..., 1:], 1.0, 2, [0, 2], False)),
        ("lora_b: got shape", "merge_lora_forward", (WEIGHT, LORA_A, LORA_B[:, 1:], 1.0, 2, [0, 2], False)),
        ("groups: got 0", "merge_lora_forward", (WEIGHT, LORA_A, LORA_B, 1.0, 0, [], False)),
        ("offsets: got 1 of them", "merge_lora_forward", (WEIGHT, LORA_A, LORA_B, 1.0, 2, [0], False)),
        ("offsets: got 5", "merge_lora_forward", (WEIGHT, LORA_A, LORA_B, 1.0, 2, [0, 5], False)),
        ("offsets: got -1", "merge_lora_forward", (WEIGHT, LORA_A, LORA_B, 1.0, 2, [0, -1], False)),
    ],
)
def test_bad_arguments_are_named_by_the_library(message, op, arguments):
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, op)(*arguments)
