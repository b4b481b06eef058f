"""routed_adapter on the Triton backend: interpreted on the CPU (TRITON_INTERPRET=1), compiled where there is a GPU."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import functools
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_size import singles
from triton_spy import DEVICE, DTYPES, GPU, launches, needs_triton

needs_triton()

from adapter_cases import ACTIVATIONS, SIDES, by_loop, draw_adapter, index, inputs, run_adapter
from poison import poisoned_memory

from adamix_kernels import BackendUnavailableError, _backends
from adamix_kernels._triton_utils import INTERPRETING
from adamix_kernels.functional import routed_adapter
from adamix_kernels.ops import _adapter_planes
from adamix_kernels.ops import _routed_plan as plan
from adamix_kernels.ops.routed_adapter import triton_impl
from adamix_kernels.ops.routed_adapter.triton_impl import weights
from adamix_kernels.testing import assert_in_budget

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
spied_launches = functools.partial(launches, triton_impl, weights, _adapter_planes)


draw = functools.partial(draw_adapter, DEVICE)


def check(tensors, indices, residual="input", activation="gelu"):
    # The maximum over few elements is luck; over many draws the mean errors agree.
    fewest = min(tensors[0].shape[0] * tensors[0].shape[1], tensors[0].shape[2])
    multiple = 2.0 if fewest >= 16 else 8.0
    # Without TF32 a GPU takes three TF32 products, which err by up to 2^-22 of a term: more than float32 itself in sums
    # of some 20 terms, less in those of a model's width (test_float32_of_a_models_width).
    if tensors[0].dtype == torch.float32 and not INTERPRETING and fewest < 64:
        multiple = max(multiple, 4.0)
    runs = [run_adapter(backend, tensors, indices, residual, activation) for backend in ("triton", "reference")]
    with spied_launches() as names:
        assert_in_budget(*runs, *(t for t in tensors if t is not None), multiple=multiple)
    assert names[:2] == ["adapter_forward_kernel", "adapter_input_grad_kernel"]


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


def test_float32_of_a_models_width():
    check(*draw(torch.float32, 4, 16, 768, 16, 2, 1, "sample", None))


SHAPES = {
    "tail tiles of primes": (2, 67, 131, 5, 3, 1, "sample", None),
    "several splits, samples": (5, 61, 37, 4, 3, 2, "sample", "sample"),
    "several splits, tokens": (2, 83, 20, 4, 5, 1, "token", None),
    "one sample": (1, 23, 20, 4, 4, 1, "sample", None),
    "one token": (1, 1, 29, 4, 4, 4, "sample", "token"),
    "one token a sample": (9, 1, 20, 4, 4, 1, "sample", None),
    "rank 1": (2, 5, 7, 1, 9, 1, "token", None),
    "rank 33": (2, 17, 20, 33, 3, 1, "sample", None),
    "rank 64": (2, 16, 20, 64, 2, 2, "sample", "token"),
    "rank 100": (2, 17, 37, 100, 2, 1, "sample", None),
    "rank 256": (2, 16, 37, 256, 2, 1, "sample", None),
    "64 experts": (2, 3, 20, 4, 64, 1, "sample", None),
    "grouped by one side": (2, 33, 20, 40, 9, 1, "token", None),
    "grouped by both sides": (1, 37, 20, 129, 3, 2, "token", "token"),
    "grouped by one, masked other": (3, 11, 20, 33, 9, 2, "sample", "token"),
    "rows stay": (2, 37, 192, 5, 3, 1, "sample", None),
    "rows stay, tokens": (2, 19, 128, 6, 3, 1, "token", None),
    "rows stay, wide": (1, 70, 64, 40, 2, 1, "sample", None),
    "rows stay, model's width": (1, 70, 768, 16, 2, 1, "sample", None),
    "rows stay, model's width, wide": (1, 70, 768, 48, 2, 1, "sample", None),
    "rows stay, grouped": (2, 33, 64, 40, 9, 1, "token", None),
}


@singles(case=SHAPES, dtype=[torch.float32, torch.bfloat16])
def test_every_shape(case, dtype):
    check(*draw(dtype, *SHAPES[case]))


@pytest.mark.parametrize("case", [case for case in SHAPES if case.startswith("rows stay")])
def test_rows_stay_on_the_chip_where_the_residual_is_x(case):
    tensors, indices = draw(torch.bfloat16, *SHAPES[case])
    stays = [True, case != "rows stay, tokens"]
    for residual, want in (("input", stays), ("other", [False, False])):
        options = []
        with spied_launches(options=options):
            run_adapter("triton", tensors, indices, residual)(*tensors)
        assert [one["KEEP"] for one in options[:2]] == want


@pytest.mark.parametrize("case", ["per-token", "both-routed", "grouped by both sides", "few-tokens"])
def test_more_splits_than_tiles_of_an_expert(case):
    with mock.patch.object(weights, "count_splits", return_value=15), spied_launches() as names:
        check(*draw(torch.bfloat16, *(SIDES | SHAPES)[case]))
    assert "adapter_plane_sum_kernel" in names


@pytest.mark.parametrize("splits", [12, 28])
def test_a_split_may_begin_and_end_within_samples_of_several_tiles(splits):
    """An expert has a quarter of so many. Compiled, Triton dropped a loop's sum here (benchmarks/aot/loops.py)."""
    tensors, _ = draw(torch.bfloat16, 6, 300, 32, 4, 4, 1, "sample", None)
    sample = torch.tensor([0, 3, 3, 1, 3, 3], device=DEVICE)
    with mock.patch.object(weights, "count_splits", return_value=splits), spied_launches() as names:
        check(tensors, [sample, None])
    assert "adapter_plane_sum_kernel" in names


def test_planes_cost_at_most_a_quarter_of_what_they_sum():
    for rows, experts, r in ((65536, 5, 16), (8192, 5, 16), (8192, 128, 64), (64, 5, 16)):
        splits = weights.count_splits(rows, 16, 32, experts * r, 4)
        assert splits == 1 or 4 * splits * experts * r <= rows * 4 / 4
        assert splits > 1 or rows == 64 or experts == 128


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_batch_gives_zero_gradients(batch, tokens):
    tensors, indices = draw(torch.float32, batch, tokens, 20, 4, 3, 1, "sample", None)
    with poisoned_memory(), spied_launches() as names:
        out, *grads = run_adapter("triton", tensors, indices)(*tensors)
    assert out.shape == (batch, tokens, 20)
    assert all(g.eq(0).all() for g in grads)
    assert names == []


@settings(max_examples=25)
@given(data=st.data())
def test_any_shape_and_index(data):
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, tokens, hidden, r, down, up = pick(1, 4), pick(1, 20), pick(1, 33), pick(1, 20), pick(1, 6), pick(1, 3)
    kinds = [data.draw(st.sampled_from(["sample", "token"])) for _ in range(2)]
    dtype = data.draw(st.sampled_from(DTYPES))
    check(*draw(dtype, batch, tokens, hidden, r, down, up, *kinds, None, data.draw(st.booleans())))


def test_it_is_the_formula():
    tensors, indices = draw(torch.float32, *SIDES["mixed"])
    indices[1] = indices[1].int()
    *arguments, _ = tensors
    got = routed_adapter(*arguments, *indices, residual=arguments[0], backend="triton")
    torch.testing.assert_close(got, by_loop(*arguments, *indices, arguments[0]))


@pytest.mark.parametrize("case", ["samples", "few tokens", "tokens", "grouped"])
def test_an_unused_expert_gets_an_exactly_zero_gradient(case):
    tokens = 3 if case == "few tokens" else 40
    r = 70 if case == "grouped" else 4
    kind = "sample" if "tokens" != case != "grouped" else "token"
    tensors, (used, _) = draw(torch.float32, 4, tokens, 20, r, 2, 1, kind, None)
    banks = [torch.cat([bank] * n) for bank, n in zip(tensors[1:5], (2, 2, 4, 4))]
    full = [tensors[0], *banks, tensors[5]]
    with poisoned_memory():
        _, _, *grads = run_adapter("triton", full, [used * 2, used * 2])(*full)
    for grad in grads:
        assert grad[[1, 3]].eq(0).all()
        assert grad[[0, 2]].ne(0).any()


@pytest.mark.parametrize("tokens", [3, 17])
def test_a_sample_with_infinities_does_not_reach_other_experts(tokens):
    tensors, _ = draw(torch.float32, 4, tokens, 20, 4, 3, 3, "sample", "sample")
    tensors[0][0] = float("inf")
    chosen = torch.tensor([0, 1, 1, 1], device=DEVICE)
    out, dx, *grads = run_adapter("triton", tensors, [chosen, chosen])(*tensors)
    assert out[1:].isfinite().all()
    assert dx[1:].isfinite().all()
    for grad in grads:
        assert grad[1].isfinite().all()
        assert grad[2].eq(0).all()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("few tokens", d) for d in DTYPES] + [(c, torch.float32) for c in ("samples", "tokens", "grouped")],
)
def test_infinite_weights_of_one_expert_do_not_reach_rows_of_another(case, dtype):
    """Bit for bit what finite weights there give; the rows of the poisoned expert itself are not finite."""
    tokens, r = (3 if case == "few tokens" else 17), (70 if case == "grouped" else 4)
    kind = "sample" if case in ("samples", "few tokens") else "token"
    tensors, (chosen, _) = draw(dtype, 6, tokens, 20, r, 4, 4, kind, kind)
    number = torch.arange(chosen.numel(), device=DEVICE).view(chosen.shape)
    indices = [number % 3, number // 2 % 3]
    clean = run_adapter("triton", tensors, indices)(*tensors)
    poisoned = [t.clone() for t in tensors]
    for bank in poisoned[1:5]:
        bank[0], bank[3] = float("inf"), float("nan")  # expert 3 serves no row
    got = run_adapter("triton", tensors, indices)(*poisoned)
    theirs = ((indices[0] != 0) & (indices[1] != 0)).view(6, -1).expand(6, tokens)
    for mine, before in zip(got[:2], clean[:2]):
        assert torch.equal(mine[theirs], before[theirs])
    assert not got[0][indices[1].view(6, -1).expand(6, tokens) == 0].isfinite().any()
    for grad in got[2:]:
        assert grad[3].eq(0).all()


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
@pytest.mark.parametrize(("hidden", "dtype"), [(20, torch.float32), (64, torch.bfloat16)])
def test_only_what_is_needed_is_computed_with_the_same_bits(hidden, dtype, needs):
    (x, *banks, dy), indices = draw(dtype, 3, 60, hidden, 4, 3, 1, "sample", None)
    _, pre = triton_impl.forward(x, *banks, *indices, None, True, "gelu")
    arguments = (dy, x, pre, banks[0], banks[2], *indices)
    want = triton_impl.backward(*arguments, True, True, True, True, "gelu")
    got = triton_impl.backward(*arguments, *needs, True, "gelu")
    for mine, full, needed in zip(got, want, (needs[0], *needs[1:2] * 2, *needs[2:] * 2)):
        assert torch.equal(mine, full if needed else x.new_empty(0))


def test_frozen_arguments_get_no_gradient_launch():
    (x, *banks, _), indices = draw(torch.float32, *SIDES["shared-up"])
    with spied_launches() as names:
        routed_adapter(x.requires_grad_(), *banks, *indices, backend="triton").sum().backward()
    assert names == ["adapter_forward_kernel", "adapter_input_grad_kernel"]


def test_strides_do_not_matter_and_inputs_are_not_written():
    (x, *banks, dy), indices = draw(torch.float32, 3, 18, 20, 4, 3, 2, "sample", "token")
    spread = lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)  # noqa: E731
    strided, strided_indices = [spread(t) for t in (x, *banks, dy)], [torch.stack([t, t], -1)[..., 0] for t in indices]
    before = [t.clone() for t in strided]

    def raw(x, dw, db, uw, ub, dy, indices):
        leaves = [t.detach().requires_grad_() for t in (x, dw, db, uw, ub)]
        out = routed_adapter(*leaves, *indices, residual=leaves[0], backend="triton")
        return out, *torch.autograd.grad(out, leaves, dy)

    got = raw(*strided, strided_indices)
    assert all(torch.equal(a, b) for a, b in zip(got, raw(x, *banks, dy, indices)))
    assert all(torch.equal(a, b) for a, b in zip(before, strided))


@pytest.mark.parametrize("case", ["several splits, samples", "several splits, tokens", "grouped by one side"])
def test_the_same_bits_twice(case):
    tensors, indices = draw(torch.float32, *SHAPES[case])
    first, second = (run_adapter("triton", tensors, indices)(*tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(("tokens", "last"), [(17, "adapter_weight_grad_kernel"), (80, "adapter_plane_sum_kernel")])
def test_one_launch_forward_and_at_most_three_backward(tokens, last):
    tensors, indices = draw(torch.bfloat16, 4, tokens, 20, 4, 3, 1, "sample", None)
    with spied_launches() as names:
        run_adapter("triton", tensors, indices)(*tensors)
    assert names[:3] == ["adapter_forward_kernel", "adapter_input_grad_kernel", "adapter_weight_grad_kernel"]
    assert names[-1] == last
    assert len(names) <= 4


@pytest.mark.parametrize("case", [*SIDES, *SHAPES])
def test_no_tensor_value_reaches_python(case):
    """Meta tensors have no values, so everything around the launches is decided without them."""
    tensors, indices = draw(torch.bfloat16, *(SIDES | SHAPES)[case])
    (x, *banks, dy), indices = ([t if t is None else t.to("meta") for t in ts] for ts in (tensors, indices))
    with spied_launches(run=False) as names:
        out, pre = triton_impl.forward(x, *banks, *indices, None, False, "gelu")
        grads = triton_impl.backward(dy, x, pre, banks[0], banks[2], *indices, True, True, True, False, "gelu")
    assert out.shape == dy.shape
    assert [g.shape for g in grads] == [x.shape, *(s for w in (banks[0], banks[2]) for s in (w.shape, w.shape[:2]))]
    assert len(names) in (3, 4)


def test_rows_in_groups_cover_every_row_once():
    key = torch.tensor([2, 0, 2, 2, 7, 0, 2, 2])
    side = plan.Side(None, 1, False, 1, 1)
    groups = plan.group_rows(plan.Plan(1, 8, 16, side, side, key, 8), rows=2)
    tiles = [
        groups.perm[a : min(a + 2, b)].tolist() for a, b in zip(groups.start.tolist(), groups.stop.tolist()) if a < b
    ]
    assert tiles == [[1, 5], [0, 2], [3, 6], [7], [4]]
    assert groups.tiles == len(groups.start) == 4 + 8


def test_torch_compile_whole_graph_no_recompile_per_batch_size():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(x, chosen, *banks):
        return routed_adapter(x, *banks, chosen, None, residual=x, backend="triton").square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    _, *banks = (t.detach().to(DEVICE).requires_grad_() for t in inputs(dtype=torch.float32))
    with spied_launches() as names:
        for batch, tokens in ((4, 11), (6, 9), (9, 17), (12, 13)):
            x = torch.randn(batch, tokens, 5, device=DEVICE, requires_grad=True)
            chosen = index("sample", 3, batch).to(DEVICE)
            got = torch.autograd.grad(compiled(x, chosen, *banks), (x, *banks))
            torch.testing.assert_close(got, torch.autograd.grad(loss(x, chosen, *banks), (x, *banks)))
    assert counter.frame_count == 1
    assert names.count("adapter_forward_kernel") == 8


@pytest.mark.parametrize("kind", ["sample", "token"])
def test_opcheck(kind):
    x, *banks = (t.detach().to(DEVICE).requires_grad_() for t in inputs(dtype=torch.float32))
    op = torch.ops.adamix_kernels.routed_adapter.default
    torch.library.opcheck(op, (x, *banks, index(kind, 3).to(DEVICE), None, None, True, "gelu", "triton"))


def test_autocast_gives_gradients_in_their_own_dtype():
    x, *banks = (t.detach().to(DEVICE).requires_grad_() for t in inputs(dtype=torch.float32))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = routed_adapter(x, *banks, index("sample", 3).to(DEVICE), None, residual=x, backend="triton")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, *banks))


def test_float64_is_refused_with_the_reason():
    tensors, indices = draw(torch.float64, *SIDES["plain"])
    with pytest.raises(BackendUnavailableError, match="float16, bfloat16 and float32, not"):
        run_adapter("triton", tensors, indices)(*tensors)


def test_auto_never_interprets():
    assert _backends.select("routed_adapter", "auto", "cpu", torch.float32).__name__.endswith("reference")


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("case", ["several splits, samples", "several splits, tokens", "grouped by one side"])
def test_a_cuda_graph_replays_new_values(case):
    tensors, indices = draw(torch.bfloat16, *SHAPES[case])
    run = run_adapter("triton", tensors, indices)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*tensors)
    for t in tensors:
        t.copy_(torch.randn_like(t))
    indices[0].copy_(indices[0].flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(*tensors)))
