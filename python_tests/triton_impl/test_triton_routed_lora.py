"""routed_lora on the Triton backend: interpreted on the CPU (TRITON_INTERPRET=1), compiled where there is a GPU."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import functools

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_size import pairs
from triton_spy import DEVICE, DTYPES, GPU, launches, needs_triton

needs_triton()

from plain_lora import INDEX_KINDS, draw_lora, per_token_lora, run_lora
from poison import poisoned_memory

from adamix_kernels import BackendUnavailableError, _backends
from adamix_kernels.functional import routed_lora
from adamix_kernels.ops._dropout import keep_mask
from adamix_kernels.ops.routed_lora import triton_impl
from adamix_kernels.ops.routed_lora.triton_impl import plan, tables, weights
from adamix_kernels.testing import assert_in_budget

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
spied_launches = functools.partial(launches, triton_impl, weights)


draw = functools.partial(draw_lora, DEVICE)


def check(tensors, options, dropout_p=0.0):
    # The maximum over few elements is luck; over many draws the mean errors agree.
    multiple = 2.0 if min(tensors[0].shape[0] * tensors[0].shape[1], *tensors[2].shape[1:]) >= 16 else 8.0
    runs = [run_lora(backend, tensors, options, dropout_p) for backend in ("triton", "reference")]
    with spied_launches() as names:
        assert_in_budget(*runs, *(t for t in tensors if t is not None), multiple=multiple)
    assert names[:3] == ["lora_forward_kernel", "lora_dx_kernel", "lora_grads_kernel"]
    assert names[3:] in ([], ["lora_sum_kernel"])


@pairs(b_kind=INDEX_KINDS, a_kind=INDEX_KINDS, dropout_p=[0.0, 0.3], with_base=[True, False], groups=[1, 2])
def test_every_kind_of_routing(a_kind, b_kind, dropout_p, with_base, groups):
    index_dtype = torch.int32 if with_base else torch.int64
    sizes = dict(batch=3, tokens=6, features=19, rank=4, per_group=7, dtype=torch.float32, index_dtype=index_dtype)
    check(*draw(a_kind, b_kind, groups, with_base, **sizes), dropout_p)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    "kinds", [("sample", "none"), ("none", "sample"), ("token", "sample"), ("sample", "token"), ("token", "token")]
)
def test_every_kind_of_routing_in_half_precision(kinds, dtype):
    check(*draw(*kinds, 2, batch=3, tokens=9, features=37, rank=4, per_group=19, dtype=dtype), 0.3)


SHAPES = {
    "tail tiles of primes": dict(batch=2, tokens=37, features=131, rank=5, per_group=41),
    "three groups": dict(groups=3, batch=2, tokens=19, features=23, rank=3, per_group=17),
    "several splits, samples": dict(b_kind="sample", batch=5, tokens=31, features=37, per_group=11),
    "parts of samples": dict(b_kind="sample", batch=2, tokens=150, features=20, per_group=11),
    "several splits, tokens": dict(a_kind="token", batch=2, tokens=137, features=20, per_group=11),
    "one sample": dict(batch=1, tokens=23, features=20),
    "one token": dict(b_kind="token", batch=1, tokens=1, features=29, groups=2),
    "one token a sample": dict(b_kind="sample", batch=9, tokens=1, features=20),
    "rank 1": dict(a_kind="token", batch=2, tokens=5, rank=1, features=7),
    "rank 8, q and v": dict(groups=2, batch=2, tokens=17, rank=8, features=32, per_group=32),
    "rank 33": dict(groups=2, batch=2, tokens=17, rank=33, features=20),
    "rank 256 in chunks": dict(b_kind="sample", batch=2, tokens=17, rank=256, features=37),
    "grouped rank in chunks": dict(a_kind="token", groups=2, batch=2, tokens=17, rank=100, features=20),
    "sorted by one side": dict(a_kind="token", batch=2, tokens=41, rank=70, features=20),
    "sorted by both sides": dict(a_kind="token", b_kind="token", batch=5, tokens=17, rank=70, features=20),
}


@pytest.mark.parametrize("case", SHAPES)
def test_every_shape(case):
    dtype = (
        torch.float32
        if case in ("several splits, samples", "parts of samples", "one token", "rank 1")
        else torch.bfloat16
    )
    check(*draw(**SHAPES[case], dtype=dtype), 0.3)


def test_it_is_the_formula():
    tensors, options = draw("token", "sample", 2, batch=2, tokens=5, features=20, dtype=torch.float32)
    *leaves, base, _ = tensors
    a_index, b_index = options.pop("a_index"), options.pop("b_index")
    arguments = (*leaves, a_index, b_index)
    options |= dict(base=base, dropout_p=0.3, seed=4)
    expected = per_token_lora(*(t.cpu() for t in arguments), **{**options, "base": base.cpu()})
    torch.testing.assert_close(routed_lora(*arguments, **options, backend="triton").cpu(), expected)


@pytest.mark.parametrize(
    ("seed", "p", "dtype"),
    [
        (0, 0.1, torch.float32),
        (-1, 0.5, torch.float16),
        (2**63 - 1, 0.9, torch.float32),
        (0x0123456789ABCDEF, 0.3, torch.bfloat16),
    ],
)
def test_the_mask_is_keep_mask_bit_for_bit(p, seed, dtype):
    """Identity factors show the mask itself: in the output, in dx and, one row a rank, in dA."""
    rows, cols = 37, 61
    keep = keep_mask(torch.tensor(seed), rows, cols, p)
    eye = torch.eye(cols, device=DEVICE, dtype=dtype).unsqueeze(0).requires_grad_()
    x = torch.ones(1, rows, cols, device=DEVICE, dtype=dtype, requires_grad=True)
    out = routed_lora(x, eye, eye.detach(), None, None, dropout_p=p, seed=seed, backend="triton")
    scale = torch.tensor(1 / (1 - p), dtype=dtype)
    assert torch.equal(out[0].cpu(), torch.where(keep, scale, 0))
    dx, da = torch.autograd.grad(out, (x, eye), torch.ones_like(out))
    assert torch.equal(dx[0].cpu(), torch.where(keep, scale, 0))
    one_hot = torch.eye(rows, cols, device=DEVICE, dtype=dtype).unsqueeze(0)
    (da,) = torch.autograd.grad(
        routed_lora(x, eye, eye.detach(), None, None, dropout_p=p, seed=seed, backend="triton"), eye, one_hot
    )
    assert torch.equal(da[0, :rows].cpu(), torch.where(keep, scale, 0))


def test_dropped_elements_are_zero_whatever_they_hold():
    tensors, options = draw(batch=2, tokens=5, features=20, dtype=torch.float32)
    keep = keep_mask(torch.tensor(11), 10, 20, 0.5).view(2, 5, 20).to(DEVICE)
    clean = run_lora("triton", tensors, options, 0.5)(*tensors)
    tensors[0] = torch.where(keep, tensors[0], float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(clean, run_lora("triton", tensors, options, 0.5)(*tensors)))


def test_columns_outside_every_group_keep_the_base():
    tensors, options = draw(groups=2, batch=2, tokens=17, features=20, per_group=3, dtype=torch.bfloat16)
    *leaves, base, _ = tensors
    before = base.clone()
    out = routed_lora(*leaves, base=base, **options, backend="triton")
    assert torch.equal(base, before)
    outside = [3, 4, 5, 9]
    assert torch.equal(out[..., outside], base[..., outside])
    assert out.ne(base)[..., :3].any()


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_batch_gives_zero_gradients(batch, tokens):
    tensors, options = draw(groups=2, batch=batch, tokens=tokens, dtype=torch.float32)
    with poisoned_memory(), spied_launches() as names:
        out, *grads = run_lora("triton", tensors, options, 0.3)(*tensors)
    assert out.shape == (batch, tokens, 10)
    assert all(g.eq(0).all() for g in grads)
    assert names == []


@settings(max_examples=20)
@given(data=st.data())
def test_any_shape_and_index(data):
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kinds = [data.draw(st.sampled_from(INDEX_KINDS)) for _ in range(2)]
    sizes = dict(batch=pick(1, 3), tokens=pick(1, 18), features=pick(1, 33), rank=pick(1, 20), per_group=pick(1, 20))
    dtype = data.draw(st.sampled_from(DTYPES))
    check(*draw(*kinds, pick(1, 2), data.draw(st.booleans()), dtype=dtype, **sizes), pick(0, 2) * 0.3)


@pytest.mark.parametrize("case", ["samples", "few tokens", "tokens", "sorted"])
def test_an_unused_expert_gets_an_exactly_zero_gradient(case):
    kind = "sample" if case in ("samples", "few tokens") else "token"
    sizes = dict(batch=4, tokens=3 if case == "few tokens" else 20, rank=70 if case == "sorted" else 4)
    tensors, options = draw(kind, kind, features=20, dtype=torch.float32, **sizes)
    options |= {name: options[name] % 2 * 2 for name in ("a_index", "b_index")}
    with poisoned_memory():
        _, _, da, db, _ = run_lora("triton", tensors, options, 0.3)(*tensors)
    for grad in (da, db):
        assert grad[[1, 3]].eq(0).all()
        assert grad[[0, 2]].ne(0).any()


@pytest.mark.parametrize("kind", ["sample", "token"])
@pytest.mark.parametrize("tokens", [3, 17])
def test_infinities_of_one_expert_do_not_reach_another(tokens, kind):
    """Neither a poisoned sample nor a poisoned expert reaches rows and gradients of the other experts."""
    tensors, options = draw("sample", "sample", batch=4, tokens=tokens, features=20, dtype=torch.float32)
    chosen = torch.tensor([0, 1, 1, 1], device=DEVICE)
    chosen = chosen if kind == "sample" else chosen.unsqueeze(1).expand(4, tokens)
    options |= dict(a_index=chosen, b_index=chosen)
    tensors[0][0] = float("inf")
    tensors[1][0], tensors[2][0], tensors[1][3] = float("inf"), float("nan"), float("nan")
    out, dx, da, db, _ = run_lora("triton", tensors, options)(*tensors)
    for t in (out[1:], dx[1:], da[1], db[1]):
        assert t.isfinite().all()
    for grad in (da, db):
        assert grad[2:].eq(0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_infinite_weights_of_one_expert_leave_the_tokens_of_another(inplace):
    """Bit for bit what finite weights there give, whether base is kept or overwritten."""
    tensors, options = draw("none", "token", 2, batch=2, tokens=17, features=20, per_group=19, dtype=torch.float32)
    x, a, b, base, _ = tensors
    offsets = options["output_offsets"]

    def run():
        given = base.clone()
        out = routed_lora(x, a, b, None, options["b_index"], base=given, groups=2, output_offsets=offsets,
                          inplace=inplace, backend="triton")  # fmt: skip
        assert (out.data_ptr() == given.data_ptr()) == inplace
        return out

    clean = run()
    b[1, 3:30] = float("inf")
    others = options["b_index"] != 1
    out = run()
    assert others.any()
    assert not others.all()
    assert torch.equal(out[others], clean[others])
    assert not out[~others][..., 3:19].isfinite().any()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed_is_computed_with_the_same_bits(needs):
    (x, a, b, _, dy), options = draw(groups=2, batch=3, tokens=60, features=20, dtype=torch.float32, with_base=False)
    seed = torch.tensor(3, device=DEVICE)
    head, tail = (x, a, b, options["a_index"], None), (1.7, 2, [0, 6], 0.3)
    _, t = triton_impl.forward(*head, None, seed, *tail)
    arguments = (dy, x, t, *head[1:], seed)
    want = triton_impl.backward(*arguments, True, True, True, *tail)
    with spied_launches() as names:
        got = triton_impl.backward(*arguments, *needs, *tail)
    for mine, full, needed in zip(got, want, needs):
        assert torch.equal(mine, full if needed else x.new_empty(0))
    assert ("lora_dx_kernel" in names) == (needs[0] or needs[1])
    assert ("lora_grads_kernel" in names) == (needs[1] or needs[2])


def test_strides_do_not_matter_and_inputs_are_not_written():
    tensors, options = draw("sample", "token", 2, batch=3, tokens=18, features=20, dtype=torch.float32)
    want = run_lora("triton", tensors, options, 0.3)(*tensors)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    before = [t.clone() for t in strided]
    leaves = [t.detach().requires_grad_() for t in strided[:4]]
    options |= {name: torch.stack([options[name]] * 2, -1)[..., 0] for name in ("a_index", "b_index")}
    out = routed_lora(*leaves[:3], base=leaves[3], **options, dropout_p=0.3, seed=11, backend="triton")
    got = (out, *torch.autograd.grad(out, leaves, strided[4]))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(before, strided))


@pytest.mark.parametrize("batch", [5, 85])
def test_one_index_of_both_sides_groups_rows_by_itself(batch):
    """A pack's: M groups, not M * M; by sample too, where a sample is one token."""
    kind = "token" if batch == 5 else "sample"
    sizes = SHAPES["sorted by both sides"] | dict(a_kind=kind, b_kind=kind, batch=batch, tokens=85 // batch)
    tensors, options = draw(**sizes, dtype=torch.float32)
    few = min(tensors[1].shape[0], tensors[2].shape[0])
    tensors[1], tensors[2] = tensors[1][:few].contiguous(), tensors[2][:few].contiguous()
    index = options["a_index"] % few
    tiles = []
    for other in (index, index[:], index.clone()):
        options |= dict(a_index=index, b_index=other)
        check(tensors, options)
        made = plan.make_call(*tensors[0].shape[:2], *tensors[1:3], index, other, list(options["output_offsets"]), 20)
        tiles.append((made.plan.keys, plan.group_rows(made.plan, 16).tiles))
    assert tiles == [(few, 6 + few)] * 2 + [(few * few, 6 + few * few)]


@pytest.mark.parametrize("case", ["several splits, samples", "sorted by both sides"])
def test_the_same_bits_twice(case):
    tensors, options = draw(**SHAPES[case], dtype=torch.float32)
    run = run_lora("triton", tensors, options, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(run(*tensors), run(*tensors)))


@pytest.mark.parametrize("kinds", [("sample", "none"), ("token", "token")])
@pytest.mark.parametrize("case", SHAPES)
def test_no_tensor_value_reaches_python(case, kinds):
    """Meta tensors have no values, so everything around the launches is decided without them."""
    tensors, options = draw(**{**SHAPES[case], "a_kind": kinds[0], "b_kind": kinds[1]}, dtype=torch.bfloat16)
    x, a, b, base, dy = (t.to("meta") for t in tensors)
    indices = [options[name] if options[name] is None else options[name].to("meta") for name in ("a_index", "b_index")]
    offsets = options["output_offsets"]
    seed, tail = torch.zeros((), dtype=torch.int64, device="meta"), (1.7, len(offsets), list(offsets), 0.3)
    with spied_launches(run=False) as names:
        out, t = triton_impl.forward(x, a, b, *indices, base, seed, *tail)
        grads = triton_impl.backward(dy, x, t, a, b, *indices, seed, True, True, True, *tail)
    assert out.shape == base.shape
    assert [g.shape for g in grads] == [x.shape, a.shape, b.shape]
    assert len(names) in (3, 4)


def test_torch_compile_whole_graph_no_recompile_per_batch_size():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(x, a, b, base, chosen):
        out = routed_lora(x, a, b, chosen, None, base=base, scaling=1.7, dropout_p=0.3, seed=5, backend="triton")
        return out.square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    with spied_launches() as names:
        for batch, tokens in ((5, 11), (6, 9), (9, 17)):
            tensors, options = draw(batch=batch, tokens=tokens, features=20, dtype=torch.float32)
            leaves = [t.requires_grad_() for t in tensors[:4]]
            got = torch.autograd.grad(compiled(*leaves, options["a_index"]), leaves)
            torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves, options["a_index"]), leaves))
            compilations.append(counter.frame_count)
    assert compilations == [1, 1, 1]
    assert names.count("lora_forward_kernel") == 6


def test_opcheck():
    (x, a, b, base, _), options = draw("token", "sample", 2, batch=2, tokens=3, dtype=torch.float32)
    indices = options["a_index"], options["b_index"]
    leaves = [t.requires_grad_() for t in (x, a, b, base)]
    seed = torch.tensor(3, device=DEVICE)
    op = torch.ops.adamix_kernels.routed_lora.default
    torch.library.opcheck(op, (*leaves[:3], *indices, leaves[3], seed, 1.7, 2, [0, 6], 0.3, "triton"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", tables.TABLES)
def test_every_shape_class_has_a_configuration_on_every_gpu(kernel, dtype):
    widths = [16, 32, 64, 128] + ([256] if kernel in ("lora_forward_kernel", "lora_dx_kernel") else [])
    for capability in (0, 80, 86, 89, 90, 100, 103, 120):
        for width in widths:
            rows, cols, warps, stages = tables.config(kernel, capability, dtype.itemsize, width)
            assert min(rows, cols) >= 16
            assert rows & (rows - 1) == cols & (cols - 1) == 0
            assert warps in (4, 8)
            assert 1 <= stages <= 5


def test_gaps_are_the_columns_outside_every_group():
    assert plan.gaps([0, 6], 3, 10) == ((3, 3), (9, 1))
    assert plan.gaps([7, 2], 2, 9) == ((0, 2), (4, 3))
    assert plan.gaps([0], 5, 5) == ()


def test_float64_is_refused_with_the_reason():
    tensors, options = draw()
    with pytest.raises(BackendUnavailableError, match="float16, bfloat16 and float32, not"):
        run_lora("triton", tensors, options)(*tensors)


def test_auto_never_interprets():
    assert _backends.select("routed_lora", "auto", "cpu", torch.float32).__name__.endswith("routed_lora.reference")


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("case", ["several splits, samples", "several splits, tokens", "sorted by both sides"])
def test_a_cuda_graph_replays_new_values(case):
    tensors, options = draw(**SHAPES[case], dtype=torch.bfloat16)
    run = run_lora("triton", tensors, options, 0.3, torch.tensor(5, device=DEVICE))
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
    options["a_index"].copy_(options["a_index"].flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(*tensors)))
