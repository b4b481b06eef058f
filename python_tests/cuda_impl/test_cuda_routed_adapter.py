"""routed_adapter on the C++/CUDA backend: on a GPU, or its kernels on the CPU (see cuda_host.py)."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import functools

import pytest
import torch
from cuda_host import DEVICE, DTYPES, ON_HOST, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st

needs_cuda()

from adapter_cases import ACTIVATIONS, SIDES, by_loop, draw_adapter, index, inputs, run_adapter
from cuda_probes import captured_graph, count_allocations, far_apart

from adamix_kernels import BackendUnavailableError
from adamix_kernels.functional import routed_adapter
from adamix_kernels.ops.routed_adapter import cuda_impl
from adamix_kernels.testing import assert_in_budget

draw = functools.partial(draw_adapter, DEVICE)


def check(tensors, indices, residual="input", activation="gelu"):
    # The maximum over few elements is luck; over many draws the mean errors agree.
    few = min(tensors[0].shape[0] * tensors[0].shape[1], tensors[0].shape[2])
    multiple = 2.0 if few >= 16 else 8.0 if few >= 4 else 32.0
    runs = [run_adapter(backend, tensors, indices, residual, activation) for backend in ("cuda", "reference")]
    assert_in_budget(*runs, *(t for t in tensors if t is not None), multiple=multiple)


@pytest.mark.parametrize("residual", ["none", "input", "other"])
@pytest.mark.parametrize("case", SIDES)
def test_every_kind_of_routing_and_residual(case, residual):
    if residual == "input" and case == "other-width":
        residual = "other"
    check(*draw(torch.float32, *SIDES[case]), residual)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", SIDES)
def test_every_kind_of_routing_in_half_precision(case, dtype):
    check(*draw(dtype, *SIDES[case]), "other" if case == "other-width" else "input")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype):
    check(*draw(dtype, *SIDES["shared-up"]), activation=activation)


SHAPES = {
    "16-byte rows": (2, 67, 96, 16, 3, 2, "sample", "token"),
    "tail tiles of primes": (2, 67, 131, 5, 3, 1, "sample", None),
    "several shares, samples": (5, 61, 37, 4, 3, 2, "sample", "sample"),
    "several shares, tokens": (2, 147, 20, 4, 5, 1, "token", None),
    "more rows than are scanned at a time": (1, 1100, 8, 16, 8, 1, "token", None),
    "one sample": (1, 23, 20, 4, 4, 1, "sample", None),
    "one token": (1, 1, 29, 4, 4, 4, "sample", "token"),
    "one token a sample": (9, 1, 20, 4, 4, 1, "sample", None),
    "rank 1": (2, 5, 7, 1, 9, 1, "token", None),
    "rank 33": (2, 17, 20, 33, 3, 1, "sample", None),
    "rank 64": (2, 16, 20, 64, 2, 2, "sample", "token"),
    "rank 100": (2, 17, 37, 100, 2, 1, "sample", None),
    "rank 256": (2, 16, 37, 256, 2, 1, "sample", None),
    "64 experts": (2, 33, 20, 4, 64, 1, "token", None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SHAPES)
def test_every_shape(case, dtype):
    check(*draw(dtype, *SHAPES[case]))


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("other-width", torch.float32),
        ("per-token", torch.bfloat16),
        ("few-tokens", torch.float16),
        ("16-byte rows", torch.float16),
        ("several shares, tokens", torch.float32),
        ("rank 100", torch.bfloat16),
    ],
)
def test_memory_and_barriers(case, dtype):
    check(*draw(dtype, *(SIDES | SHAPES)[case]), "other")


@settings(max_examples=25)
@given(data=st.data())
def test_any_shape_and_index(data):
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, tokens, hidden, r, down, up = pick(1, 4), pick(1, 40), pick(1, 80), pick(1, 40), pick(1, 6), pick(1, 3)
    kinds = [data.draw(st.sampled_from(["sample", "token"])) for _ in range(2)]
    dtype = data.draw(st.sampled_from(DTYPES))
    check(*draw(dtype, batch, tokens, hidden, r, down, up, *kinds, None, data.draw(st.booleans())))


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_batch_gives_zero_gradients(batch, tokens):
    tensors, indices = draw(torch.float32, batch, tokens, 20, 4, 3, 1, "sample", None)
    out, *grads = run_adapter("cuda", tensors, indices)(*tensors)
    assert out.shape == (batch, tokens, 20)
    assert all(g.eq(0).all() for g in grads)


def test_rank_zero_leaves_the_bias_and_the_residual():
    (x, *banks, dy), indices = draw(torch.float32, 2, 3, 20, 0, 3, 2, "sample", "token")
    out, dx, _, _, _, dup_bias = run_adapter("cuda", (x, *banks, dy), indices)(x, *banks, dy)
    torch.testing.assert_close(out, x + banks[3][indices[1]])
    assert torch.equal(dx, dy)
    torch.testing.assert_close(dup_bias, torch.zeros_like(banks[3]).index_add_(0, indices[1].view(-1), dy.view(-1, 20)))


def test_it_is_the_formula():
    tensors, indices = draw(torch.float32, *SIDES["mixed"])
    indices[1] = indices[1].int()
    *arguments, _ = tensors
    got = routed_adapter(*arguments, *indices, residual=arguments[0], backend="cuda")
    torch.testing.assert_close(got, by_loop(*arguments, *indices, arguments[0]))


@pytest.mark.parametrize("case", ["samples", "few tokens", "tokens", "wide"])
def test_an_unused_expert_gets_an_exactly_zero_gradient(case):
    tokens, r = (3 if case == "few tokens" else 80), (70 if case == "wide" else 4)
    kind = "token" if case in ("tokens", "wide") else "sample"
    tensors, (used, _) = draw(torch.float32, 4, tokens, 20, r, 2, 1, kind, None)
    banks = [torch.cat([bank] * n) for bank, n in zip(tensors[1:5], (2, 2, 4, 4))]
    full = [tensors[0], *banks, tensors[5]]
    _, _, *grads = run_adapter("cuda", full, [used * 2, used * 2])(*full)
    for grad in grads:
        assert grad[[1, 3]].eq(0).all()
        assert grad[[0, 2]].ne(0).any()


@pytest.mark.parametrize("tokens", [3, 17])
def test_a_sample_with_infinities_does_not_reach_other_experts(tokens):
    tensors, _ = draw(torch.float32, 4, tokens, 20, 4, 3, 3, "sample", "sample")
    tensors[0][0] = float("inf")
    chosen = torch.tensor([0, 1, 1, 1], device=DEVICE)
    out, dx, *grads = run_adapter("cuda", tensors, [chosen, chosen])(*tensors)
    assert out[1:].isfinite().all()
    assert dx[1:].isfinite().all()
    for grad in grads:
        assert grad[1].isfinite().all()
        assert grad[2].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["sample", "token"])
def test_infinite_weights_of_one_expert_do_not_reach_rows_of_another(kind, dtype):
    """Bit for bit what finite weights there give; the rows of the poisoned expert itself are not finite."""
    tensors, (chosen, _) = draw(dtype, 6, 17, 20, 4, 4, 4, kind, kind)
    number = torch.arange(chosen.numel(), device=DEVICE).view(chosen.shape)
    indices = [number % 3, number // 2 % 3]
    clean = run_adapter("cuda", tensors, indices)(*tensors)
    poisoned = [t.clone() for t in tensors]
    for bank in poisoned[1:5]:
        bank[0], bank[3] = float("inf"), float("nan")  # expert 3 serves no row
    got = run_adapter("cuda", tensors, indices)(*poisoned)
    theirs = ((indices[0] != 0) & (indices[1] != 0)).view(6, -1).expand(6, 17)
    for mine, before in zip(got[:2], clean[:2]):
        assert torch.equal(mine[theirs], before[theirs])
    assert not got[0][indices[1].view(6, -1).expand(6, 17) == 0].isfinite().any()
    for grad in got[2:]:
        assert grad[3].eq(0).all()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed_is_computed_with_the_same_bits(needs):
    (x, *banks, dy), indices = draw(torch.float32, 3, 20, 20, 4, 3, 1, "sample", None)
    _, pre = cuda_impl.forward(x, *banks, *indices, None, True, "gelu")
    arguments = (dy, x, pre, banks[0], banks[2], *indices)
    want = cuda_impl.backward(*arguments, True, True, True, True, "gelu")
    got = cuda_impl.backward(*arguments, *needs, True, "gelu")
    for mine, full, needed in zip(got, want, (needs[0], *needs[1:2] * 2, *needs[2:] * 2)):
        assert torch.equal(mine, full if needed else x.new_empty(0))


def test_rows_are_shared_out_where_they_are_many():
    """Their planes are one more allocation."""
    counts = []
    for tokens in (40, 400):
        (x, *banks, dy), indices = draw(torch.float32, 2, tokens, 20, 4, 3, 1, "token", None)
        _, pre = cuda_impl.forward(x, *banks, *indices, None, True, "gelu")
        with count_allocations() as made:
            cuda_impl.backward(dy, x, pre, banks[0], banks[2], *indices, True, True, True, True, "gelu")
        counts.append(made())
    assert counts == [6, 7]


def spread(t):
    """The same values, no axis contiguous."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def inside(t):
    """The same values, rows inside longer rows that are not aligned."""
    return torch.nn.functional.pad(t, (1, 2))[..., 1:-2]


@pytest.mark.parametrize("layout", [spread, inside])
def test_strides_do_not_matter_and_inputs_are_not_written(layout):
    (x, *banks, dy), indices = draw(torch.float32, 3, 18, 20, 4, 3, 2, "sample", "token")
    strided, strided_indices = [layout(t) for t in (x, *banks, dy)], [torch.stack([t, t], -1)[..., 0] for t in indices]
    before = [t.clone() for t in strided]

    def raw(x, dw, db, uw, ub, dy, indices):
        leaves = [t.detach().requires_grad_() for t in (x, dw, db, uw, ub)]
        out = routed_adapter(*leaves, *indices, residual=leaves[0], backend="cuda")
        return out, *torch.autograd.grad(out, leaves, dy)

    got = raw(*strided, strided_indices)
    assert all(torch.equal(a, b) for a, b in zip(got, raw(x, *banks, dy, indices)))
    assert all(torch.equal(a, b) for a, b in zip(before, strided))


def test_samples_may_be_farther_apart_than_32_bits_count():
    (x, *banks, dy), indices = draw(torch.float16, 3, 5, 24, 4, 3, 2, "sample", "token")
    residual = torch.randn_like(dy)
    far = far_apart(x, dy, residual)
    assert min(t.stride(0) * 2 for t in far) > 2**31

    def raw(x, dy, residual):
        out, pre = cuda_impl.forward(x, *banks, *indices, residual, False, "gelu")
        return out, *cuda_impl.backward(dy, x, pre, banks[0], banks[2], *indices, True, True, True, False, "gelu")

    assert all(torch.equal(a, b) for a, b in zip(raw(*far), raw(x, dy, residual)))


@pytest.mark.parametrize("case", ["several shares, samples", "several shares, tokens", "rank 100"])
def test_the_same_bits_twice(case):
    tensors, indices = draw(torch.float32, *SHAPES[case])
    first, second = (run_adapter("cuda", tensors, indices)(*tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.skipif(not ON_HOST, reason="a GPU orders its threads itself")
@pytest.mark.parametrize("order", ["reverse", "1", "2"])
@pytest.mark.parametrize("case", ["16-byte rows", "several shares, tokens", "rank 100"])
def test_the_same_bits_in_any_order_of_threads_and_blocks(case, order, monkeypatch):
    tensors, indices = draw(torch.bfloat16, *SHAPES[case])
    run = run_adapter("cuda", tensors, indices, "other")
    want = run(*tensors)
    monkeypatch.setenv("ADAMIX_HOST_ORDER", order)
    assert all(torch.equal(a, b) for a, b in zip(run(*tensors), want))


@pytest.mark.parametrize("kind", ["sample", "token"])
def test_opcheck(kind):
    x, *banks = (t.detach().to(DEVICE).requires_grad_() for t in inputs(dtype=torch.float32))
    op = torch.ops.adamix_kernels.routed_adapter.default
    torch.library.opcheck(op, (x, *banks, index(kind, 3).to(DEVICE), None, None, True, "gelu", "cuda"))


def test_autocast_gives_gradients_in_their_own_dtype():
    x, *banks = (t.detach().to(DEVICE).requires_grad_() for t in inputs(dtype=torch.float32))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = routed_adapter(x, *banks, index("sample", 3).to(DEVICE), None, residual=x, backend="cuda")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, *banks))


def test_float64_is_refused_with_the_reason():
    tensors, indices = draw(torch.float64, *SIDES["plain"])
    with pytest.raises(BackendUnavailableError, match="float16, bfloat16 and float32, not"):
        run_adapter("cuda", tensors, indices)(*tensors)


@pytest.mark.skipif(ON_HOST, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("case", ["several shares, samples", "several shares, tokens"])
def test_a_cuda_graph_replays_new_values(case):
    (x, *banks, dy), indices = draw(torch.bfloat16, *SHAPES[case])

    def run():
        out, pre = cuda_impl.forward(x, *banks, *indices, None, True, "gelu")
        return out, *cuda_impl.backward(dy, x, pre, banks[0], banks[2], *indices, True, True, True, True, "gelu")

    captured, graph = captured_graph(run)
    for t in (x, *banks, dy):
        t.copy_(torch.randn_like(t))
    indices[0].copy_(indices[0].flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run()))
