"""routed_lora on the C++/CUDA backend: on a GPU, or its kernels on the CPU (see cuda_host.py)."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import ctypes
import functools
import mmap

import pytest
import torch
from cuda_host import DEVICE, DTYPES, ON_HOST, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_size import pairs

needs_cuda()

from cuda_probes import captured_graph, count_allocations, far_apart, spread
from plain_lora import INDEX_KINDS, draw_lora, per_token_lora, run_lora

from adamix_kernels import BackendUnavailableError
from adamix_kernels.functional import routed_lora
from adamix_kernels.ops._dropout import keep_mask
from adamix_kernels.ops.routed_lora import cuda_impl
from adamix_kernels.testing import assert_in_budget

draw = functools.partial(draw_lora, DEVICE)


def check(tensors, options, dropout_p=0.0):
    # The maximum over few elements is luck; over many draws the mean errors agree.
    multiple = 2.0 if min(tensors[0].shape[0] * tensors[0].shape[1], *tensors[2].shape[1:]) >= 16 else 8.0
    runs = [run_lora(backend, tensors, options, dropout_p) for backend in ("cuda", "reference")]
    assert_in_budget(*runs, *(t for t in tensors if t is not None), multiple=multiple)


def raw(tensors, options, dropout_p=0.3, seed=11):
    """The output and every gradient, straight from the backend."""
    x, a, b, base, dy = tensors
    indices = options["a_index"], options["b_index"]
    seed = torch.tensor(seed, device=DEVICE) if dropout_p else None
    tail = options["scaling"], options["groups"], list(options["output_offsets"]), dropout_p
    out, t = cuda_impl.forward(x, a, b, *indices, base, seed, *tail)
    return out, *cuda_impl.backward(dy, x, t, a, b, *indices, seed, True, True, True, *tail)


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
    "16-byte rows": dict(groups=2, batch=2, tokens=35, features=96, rank=8, per_group=64),
    "tail tiles of primes": dict(batch=2, tokens=67, features=131, rank=5, per_group=71),
    "three groups": dict(groups=3, batch=2, tokens=19, features=23, rank=3, per_group=17),
    "three groups of small rank, wide together": dict(groups=3, b_kind="token", batch=2, tokens=33, rank=8),
    "several shares, samples": dict(b_kind="sample", batch=5, tokens=61, features=37, per_group=11),
    "several shares, tokens": dict(a_kind="token", groups=2, batch=2, tokens=137, features=20, per_group=11),
    "more rows than are scanned at a time": dict(
        a_kind="token", b_kind="token", batch=1, tokens=1100, rank=32, features=8, per_group=8
    ),
    "one sample": dict(batch=1, tokens=23, features=20),
    "one token": dict(b_kind="token", batch=1, tokens=1, features=29, groups=2),
    "one token a sample": dict(b_kind="sample", batch=9, tokens=1, features=20),
    "rank 1": dict(a_kind="token", batch=2, tokens=5, rank=1, features=7),
    "rank 33": dict(groups=2, batch=2, tokens=17, rank=33, features=20),
    "rank 256": dict(b_kind="sample", batch=2, tokens=17, rank=256, features=37),
    "two groups of rank 100": dict(a_kind="token", b_kind="token", groups=2, batch=2, tokens=17, rank=100, features=20),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SHAPES)
def test_every_shape(case, dtype):
    check(*draw(**SHAPES[case], dtype=dtype), 0.3)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("16-byte rows", torch.float16),
        ("three groups", torch.float32),
        ("three groups of small rank, wide together", torch.bfloat16),
        ("several shares, tokens", torch.float32),
        ("two groups of rank 100", torch.float16),
        ("one token", torch.bfloat16),
    ],
)
def test_memory_and_barriers(case, dtype):
    check(*draw(**SHAPES[case], dtype=dtype), 0.3)


@settings(max_examples=25)
@given(data=st.data())
def test_any_shape_and_index(data):
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kinds = [data.draw(st.sampled_from(INDEX_KINDS)) for _ in range(2)]
    sizes = dict(batch=pick(1, 3), tokens=pick(1, 40), features=pick(1, 80), rank=pick(1, 30), per_group=pick(1, 80))
    dtype = data.draw(st.sampled_from(DTYPES))
    check(*draw(*kinds, pick(1, 3), data.draw(st.booleans()), dtype=dtype, **sizes), pick(0, 2) * 0.3)


def test_it_is_the_formula():
    tensors, options = draw("token", "sample", 2, batch=2, tokens=5, features=20, dtype=torch.float32)
    *leaves, base, _ = tensors
    a_index, b_index = options.pop("a_index"), options.pop("b_index")
    arguments = (*leaves, a_index, b_index)
    options |= dict(base=base, dropout_p=0.3, seed=4)
    expected = per_token_lora(*(t.cpu() for t in arguments), **{**options, "base": base.cpu()})
    torch.testing.assert_close(routed_lora(*arguments, **options, backend="cuda").cpu(), expected)


def test_groups_may_come_in_any_order():
    tensors, options = draw(groups=2, batch=2, tokens=5, features=20, dtype=torch.float32)
    options["output_offsets"] = options["output_offsets"][::-1]
    check(tensors, options)


@pytest.mark.parametrize(("seed", "p"), [(0, 0.1), (-1, 0.5), (2**63 - 1, 0.9), (0x0123456789ABCDEF, 0.3)])
def test_the_mask_is_keep_mask_bit_for_bit(p, seed):
    """Identity factors show the mask itself: in the output, in dx and, one row a rank, in dA."""
    rows, cols = 70, 75
    keep = keep_mask(torch.tensor(seed), rows, cols, p).view(2, rows // 2, cols)
    expected = torch.where(keep, torch.tensor(1 / (1 - p)), 0)
    eye = torch.eye(cols, device=DEVICE).unsqueeze(0).requires_grad_()
    x = torch.ones(2, rows // 2, cols, device=DEVICE, requires_grad=True)
    out = routed_lora(x, eye, eye.detach(), None, None, dropout_p=p, seed=seed, backend="cuda")
    assert torch.equal(out.cpu(), expected)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)
    assert torch.equal(dx.cpu(), expected)
    one_hot = torch.eye(rows, cols, device=DEVICE).view_as(x)
    (da,) = torch.autograd.grad(out, eye, one_hot)
    assert torch.equal(da[0, :rows].view_as(x).cpu(), expected)


def test_dropped_elements_are_zero_whatever_they_hold():
    tensors, options = draw(batch=2, tokens=5, features=20, dtype=torch.float32)
    keep = keep_mask(torch.tensor(11), 10, 20, 0.5).view(2, 5, 20).to(DEVICE)
    clean = run_lora("cuda", tensors, options, 0.5)(*tensors)
    tensors[0] = torch.where(keep, tensors[0], float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(clean, run_lora("cuda", tensors, options, 0.5)(*tensors)))


@pytest.mark.parametrize("per_group", [3, 8])
def test_columns_outside_every_group_keep_the_base(per_group):
    tensors, options = draw(groups=2, batch=2, tokens=17, features=20, per_group=per_group, dtype=torch.bfloat16)
    *leaves, base, _ = tensors
    before = base.clone()
    out = routed_lora(*leaves, base=base, **options, backend="cuda")
    assert torch.equal(base, before)
    outside = [*range(per_group, 2 * per_group), 3 * per_group]
    assert torch.equal(out[..., outside], base[..., outside])
    assert out.ne(base)[..., :per_group].any()


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_same_bits_in_the_bases_memory(dtype):
    tensors, options = draw("token", "sample", 2, batch=3, tokens=25, features=20, per_group=9, dtype=dtype)
    want = run_lora("cuda", tensors, options, 0.3)(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors[:4]]
    base = leaves[3] * 1
    out = routed_lora(*leaves[:3], base=base, **options, dropout_p=0.3, seed=11, inplace=True, backend="cuda")
    assert out.data_ptr() == base.data_ptr()
    got = (out.detach().clone(), *torch.autograd.grad(out, leaves, tensors[4]))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.skipif(not ON_HOST, reason="protects pages of the CPU's memory")
@torch.no_grad()
def test_in_place_neither_reads_nor_writes_columns_outside_every_group():
    page = mmap.PAGESIZE // 4  # in floats
    x, a, b = torch.randn(2, 3, 20), torch.randn(1, 8, 20), torch.randn(1, 2 * page, 4)
    memory = mmap.mmap(-1, 6 * 3 * mmap.PAGESIZE)  # each row of base three pages, no group in the second
    base = torch.frombuffer(memory, dtype=torch.float32).view(2, 3, 3 * page)
    options = dict(scaling=1.7, groups=2, output_offsets=(0, 2 * page), backend="cuda")
    want = routed_lora(x, a, b, None, None, base=base, **options)
    protect = ctypes.CDLL(None).mprotect
    gaps = [ctypes.c_void_p(base.data_ptr() + (3 * row + 1) * mmap.PAGESIZE) for row in range(6)]
    assert not any(protect(gap, ctypes.c_size_t(mmap.PAGESIZE), 0) for gap in gaps)
    routed_lora(x, a, b, None, None, base=base, **options, inplace=True)
    assert not any(protect(gap, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE) for gap in gaps)
    assert torch.equal(base, want)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_batch_gives_zero_gradients(batch, tokens):
    tensors, options = draw(groups=2, batch=batch, tokens=tokens, dtype=torch.float32)
    out, *grads = run_lora("cuda", tensors, options, 0.3)(*tensors)
    assert out.shape == (batch, tokens, 10)
    assert all(g.eq(0).all() for g in grads)


def test_rank_zero_leaves_the_base():
    tensors, options = draw(groups=2, rank=0, dtype=torch.float32)
    out, dx, da, db, dbase = run_lora("cuda", tensors, options)(*tensors)
    assert torch.equal(out, tensors[3])
    assert dx.eq(0).all()
    assert da.numel() == db.numel() == 0
    assert torch.equal(dbase, tensors[4])


@pytest.mark.parametrize("case", ["samples", "few tokens", "tokens", "wide"])
def test_an_unused_expert_gets_an_exactly_zero_gradient(case):
    kind = "sample" if case in ("samples", "few tokens") else "token"
    sizes = dict(batch=4, tokens=3 if case == "few tokens" else 80, rank=70 if case == "wide" else 4)
    tensors, options = draw(kind, kind, features=20, dtype=torch.float32, **sizes)
    options |= {name: options[name] % 2 * 2 for name in ("a_index", "b_index")}
    _, _, da, db, _ = run_lora("cuda", tensors, options, 0.3)(*tensors)
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
    out, dx, da, db, _ = run_lora("cuda", tensors, options)(*tensors)
    for t in (out[1:], dx[1:], da[1], db[1]):
        assert t.isfinite().all()
    for grad in (da, db):
        assert grad[2:].eq(0).all()


def test_infinities_of_one_group_do_not_reach_another():
    tensors, options = draw("none", "none", 2, batch=2, tokens=5, features=20, rank=3, dtype=torch.float32)
    tensors[1][0, 3:] = float("inf")
    out = run_lora("cuda", tensors, options)(*tensors)[0]
    assert out[..., :3].isfinite().all()
    assert not out[..., 6:9].isfinite().any()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed_is_computed_with_the_same_bits(needs):
    (x, a, b, _, dy), options = draw(groups=2, batch=3, tokens=20, features=20, dtype=torch.float32, with_base=False)
    seed = torch.tensor(3, device=DEVICE)
    head, tail = (x, a, b, options["a_index"], None), (1.7, 2, [0, 6], 0.3)
    _, t = cuda_impl.forward(*head, None, seed, *tail)
    arguments = (dy, x, t, *head[1:], seed)
    want = cuda_impl.backward(*arguments, True, True, True, *tail)
    got = cuda_impl.backward(*arguments, *needs, *tail)
    for mine, full, needed in zip(got, want, needs):
        assert torch.equal(mine, full if needed else x.new_empty(0))


def test_rows_are_shared_out_where_they_are_many():
    """Their planes are one more allocation; the forward makes two, and the seed is one."""
    counts = []
    for tokens in (40, 400):
        tensors, options = draw("token", "none", 2, batch=2, tokens=tokens, features=20, dtype=torch.float32)
        with count_allocations() as made:
            raw(tensors, options)
        counts.append(made())
    assert counts == [7, 8]


def inside(t):
    """The same values, rows inside longer rows that are not aligned."""
    return torch.nn.functional.pad(t, (1, 2))[..., 1:-2]


@pytest.mark.parametrize("layout", [spread, inside])
def test_strides_do_not_matter_and_inputs_are_not_written(layout):
    tensors, options = draw("sample", "token", 2, batch=3, tokens=18, features=20, dtype=torch.float32)
    want = run_lora("cuda", tensors, options, 0.3)(*tensors)
    strided = [layout(t) for t in tensors]
    before = [t.clone() for t in strided]
    leaves = [t.detach().requires_grad_() for t in strided[:4]]
    options |= {name: torch.stack([options[name]] * 2, -1)[..., 0] for name in ("a_index", "b_index")}
    out = routed_lora(*leaves[:3], base=leaves[3], **options, dropout_p=0.3, seed=11, backend="cuda")
    got = (out, *torch.autograd.grad(out, leaves, strided[4]))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(before, strided))


def test_samples_may_be_farther_apart_than_32_bits_count():
    (x, a, b, base, dy), options = draw("sample", "token", 2, batch=3, tokens=5, features=24, dtype=torch.float16)
    far = far_apart(x, base, dy)
    assert min(t.stride(0) * 2 for t in far) > 2**31
    got = raw((far[0], a, b, *far[1:]), options)
    assert all(torch.equal(mine, near) for mine, near in zip(got, raw((x, a, b, base, dy), options)))


@pytest.mark.parametrize("case", ["several shares, samples", "several shares, tokens"])
def test_the_same_bits_twice(case):
    tensors, options = draw(**SHAPES[case], dtype=torch.float32)
    run = run_lora("cuda", tensors, options, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(run(*tensors), run(*tensors)))


@pytest.mark.skipif(not ON_HOST, reason="a GPU orders its threads itself")
@pytest.mark.parametrize("order", ["reverse", "1", "2"])
@pytest.mark.parametrize("case", ["16-byte rows", "several shares, tokens", "two groups of rank 100"])
def test_the_same_bits_in_any_order_of_threads_and_blocks(case, order, monkeypatch):
    tensors, options = draw(**SHAPES[case], dtype=torch.bfloat16)
    run = run_lora("cuda", tensors, options, 0.3)
    want = run(*tensors)
    monkeypatch.setenv("ADAMIX_HOST_ORDER", order)
    assert all(torch.equal(a, b) for a, b in zip(run(*tensors), want))


def test_opcheck():
    (x, a, b, base, _), options = draw("token", "sample", 2, batch=2, tokens=3, dtype=torch.float32)
    indices = options["a_index"], options["b_index"]
    leaves = [t.requires_grad_() for t in (x, a, b, base)]
    seed = torch.tensor(3, device=DEVICE)
    op = torch.ops.adamix_kernels.routed_lora.default
    torch.library.opcheck(op, (*leaves[:3], *indices, leaves[3], seed, 1.7, 2, [0, 6], 0.3, "cuda"))


def test_float64_is_refused_with_the_reason():
    tensors, options = draw()
    with pytest.raises(BackendUnavailableError, match="float16, bfloat16 and float32, not"):
        run_lora("cuda", tensors, options)(*tensors)


@pytest.mark.skipif(ON_HOST, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("case", ["several shares, samples", "several shares, tokens"])
def test_a_cuda_graph_replays_new_values(case):
    tensors, options = draw(**SHAPES[case], dtype=torch.bfloat16)
    seed = torch.tensor(5, device=DEVICE)
    indices = options["a_index"], options["b_index"]
    tail = options["scaling"], options["groups"], list(options["output_offsets"]), 0.3
    x, a, b, base, dy = tensors

    def run():
        out, t = cuda_impl.forward(x, a, b, *indices, base, seed, *tail)
        return out, *cuda_impl.backward(dy, x, t, a, b, *indices, seed, True, True, True, *tail)

    captured, graph = captured_graph(run)
    for t in (*tensors, seed):
        t.copy_(torch.randn_like(t) if t.is_floating_point() else t + 1)
    indices[0].copy_(indices[0].flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run()))
