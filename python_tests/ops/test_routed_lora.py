"""routed_lora on the reference backend against a per-token loop and against finite differences."""

import pytest
import torch
import torch.utils.checkpoint
from plain_lora import INDEX_KINDS, gradients, leaves_of, lora_case, per_token_lora
from suite_size import pairs

from adamix_kernels.functional import routed_lora
from adamix_kernels.ops._dropout import keep_mask


CASES = dict(
    a_kind=INDEX_KINDS, b_kind=INDEX_KINDS, dropout_p=[0.0, 0.4], with_base=[True, False], groups=[1, 2],
)  # fmt: skip


@pairs(**CASES, index_dtype=[torch.int32, torch.int64])
def test_equals_the_per_token_definition(a_kind, b_kind, dropout_p, with_base, groups, index_dtype):
    args, options = lora_case(a_kind, b_kind, groups, with_base, index_dtype=index_dtype)
    drop = dict(dropout_p=dropout_p, seed=11)
    out = routed_lora(*args, **options, **drop)
    expected = per_token_lora(*args, **options, **drop)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves = leaves_of(args, options)
    for got, want in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pairs(**CASES)
def test_gradcheck(a_kind, b_kind, dropout_p, with_base, groups):
    """Finite differences see the forward mask, the backward recomputes it: they agree only if it is the same."""
    index_dtype = torch.int32 if a_kind == "sample" else torch.int64
    args, options = lora_case(a_kind, b_kind, groups, with_base, index_dtype=index_dtype)
    base = options.pop("base")
    drop = dict(dropout_p=dropout_p, seed=3)

    def function(x, lora_a, lora_b, base):
        return routed_lora(x, lora_a, lora_b, *args[3:], base=base, **options, **drop)

    assert torch.autograd.gradcheck(function, (*args[:3], base))


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_at_a_time(wanted):
    args, options = lora_case("sample", "token", 2)
    full = gradients(routed_lora(*args, **options), leaves_of(args, options))
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(leaves_of(args, options))]
    options["base"] = leaves[3]
    (grad,) = gradients(routed_lora(*leaves[:3], *args[3:], **options), leaves[wanted : wanted + 1])
    assert torch.equal(grad, full[wanted])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("a_kind", INDEX_KINDS)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 2), (3, 0), (0, 0)])
def test_empty(batch, tokens, a_kind, dropout_p):
    args, options = lora_case(a_kind, a_kind, 2, batch=batch, tokens=tokens)
    out = routed_lora(*args, **options, dropout_p=dropout_p)
    assert out.shape == (batch, tokens, 10)
    leaves = leaves_of(args, options)
    for grad, leaf in zip(gradients(out, leaves), leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("a_kind", INDEX_KINDS)
def test_non_contiguous(a_kind, groups):
    args, options = lora_case(a_kind, "sample", groups)
    dense = gradients(routed_lora(*args, **options, dropout_p=0.3, seed=1), leaves_of(args, options))

    def strided(t):
        if t is None or not t.is_floating_point():
            return t if t is None else torch.stack([t, t], -1)[..., 0]
        return t.detach().mT.contiguous().mT.requires_grad_()

    args = [strided(t) for t in args]
    options["base"] = strided(options["base"])
    assert not args[0].is_contiguous()
    out = routed_lora(*args, **options, dropout_p=0.3, seed=1)
    assert out.is_contiguous()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype).mT.contiguous().mT
    strided_grads = torch.autograd.grad(out, leaves_of(args, options), grad)
    for got, want in zip(strided_grads, dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_base_is_not_written():
    for groups, width in ((1, 3), (2, 10)):
        args, options = lora_case(groups=groups)
        before = options["base"].detach().clone()
        assert before.shape[2] == width
        out = routed_lora(*args, **options)
        assert torch.equal(options["base"], before)
        assert out.data_ptr() != options["base"].data_ptr()


def test_columns_outside_every_group_keep_the_base():
    args, options = lora_case(groups=2)
    out = routed_lora(*args, **options)
    assert torch.equal(out[..., 3:6], options["base"][..., 3:6])
    assert torch.equal(out[..., 9:], options["base"][..., 9:])


def test_offsets_in_any_order():
    args, options = lora_case(groups=2, with_base=False)
    out = routed_lora(*args, **{**options, "output_offsets": (6, 0)})
    swapped = [t.unflatten(1, (2, -1)).flip(1).flatten(1, 2) for t in args[1:3]]
    expected = routed_lora(args[0], *swapped, *args[3:], **options)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_unused_expert_gradient_is_exactly_zero(poison):
    args, options = lora_case("sample", "sample", batch=4)
    x, lora_a, lora_b, _, _ = args
    a_index, b_index = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 0, 2])
    x = x.detach().clone()
    x[1] = poison
    grads = torch.autograd.grad(routed_lora(x, lora_a, lora_b, a_index, b_index, **options).sum(), (lora_a, lora_b))
    assert torch.equal(grads[0][2:], torch.zeros_like(grads[0][2:]))
    assert torch.equal(grads[1][[1, 3]], torch.zeros_like(grads[1][[1, 3]]))
    assert grads[0][0].isfinite().all()  # experts whose samples are finite stay finite
    assert grads[1][2].isfinite().all()
    assert not grads[0][1].isfinite().all()


@pytest.mark.parametrize("a_kind", ["sample", "token"])
def test_unused_expert_gradient_is_exactly_zero_per_kind(a_kind):
    args, options = lora_case(a_kind, a_kind, 2)
    grads = gradients(routed_lora(*args, **options, dropout_p=0.2, seed=0), args[1:3])
    for grad, index in zip(grads, args[3:], strict=True):
        used = set(index.flatten().tolist())
        for expert in range(4):
            assert (grad[expert] == 0).all() == (expert not in used)


def test_dropout_seed():
    args, options = lora_case(features=64)
    run = lambda **drop: routed_lora(*args, **options, **drop)  # noqa: E731
    clean = run()
    assert torch.equal(run(dropout_p=0.0, seed=5), clean)
    assert torch.equal(run(dropout_p=0.5, seed=5), run(dropout_p=0.5, seed=torch.tensor(5)))
    assert not torch.equal(run(dropout_p=0.5, seed=5), run(dropout_p=0.5, seed=6))
    torch.manual_seed(1)
    first, second = run(dropout_p=0.5), run(dropout_p=0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(run(dropout_p=0.5), first)


def test_no_draw_without_need():
    args, options = lora_case()
    state = torch.get_rng_state()
    routed_lora(*args, **options)
    routed_lora(*args, **options, dropout_p=0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_keeps_the_mean():
    """Over many seeds the mean output is the output without dropout."""
    args, options = lora_case(features=16, with_base=False)
    args = [t.detach() if t is not None else None for t in args]
    outs = torch.stack([routed_lora(*args, **options, dropout_p=0.5, seed=s) for s in range(400)])
    error = (outs.mean(0) - routed_lora(*args, **options)).abs() / (outs.std(0) / 400**0.5)
    assert error.max() < 5


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(reentrant):
    args, options = lora_case(features=32)

    def function(x):
        return routed_lora(x, *args[1:], **options, dropout_p=0.5)

    torch.manual_seed(2)
    plain = gradients(function(args[0]), args[:2])
    torch.manual_seed(2)
    out = torch.utils.checkpoint.checkpoint(function, args[0], use_reentrant=reentrant)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    (out * weight).sum().backward()
    assert torch.equal(args[0].grad, plain[0])
    assert torch.equal(args[1].grad, plain[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("a_kind", INDEX_KINDS)
def test_low_precision(dtype, a_kind):
    """The error against fp64 is at most a small multiple of what the plain PyTorch expression errs."""
    args, options = lora_case(a_kind, "none", batch=4, tokens=16, features=64, rank=8, per_group=32, dtype=dtype)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in args]
    exact = per_token_lora(*wide, **{**options, "base": options["base"].double()}, dropout_p=0.25, seed=4)
    keep = keep_mask(torch.tensor(4), 64, 64, 0.25).view(4, 16, 64)
    factor = args[1][torch.zeros(4, 16, dtype=torch.int64) if args[3] is None else args[3]]
    factor = factor.unsqueeze(1).expand(-1, 16, -1, -1) if factor.dim() == 3 else factor  # [B, S, r, K]
    dropped = (args[0] * keep / 0.75).unsqueeze(-1)
    plain = options["base"] + options["scaling"] * ((factor @ dropped).squeeze(-1) @ args[2][0].t())
    out = routed_lora(*args, **options, dropout_p=0.25, seed=4)
    assert out.dtype == dtype
    budget = (plain.double() - exact).abs().max()
    assert 0 < (out.double() - exact).abs().max() <= 2 * budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("a_kind", INDEX_KINDS)
def test_autocast(a_kind, dtype):
    args, options = lora_case(a_kind, "sample", 2, dtype=torch.float32)
    leaves = leaves_of(args, options)
    with torch.autocast("cpu", dtype):
        out = routed_lora(*args, **options, dropout_p=0.25, seed=4)
    grads = gradients(out, leaves)
    assert out.dtype == dtype
    assert all(g.dtype == torch.float32 for g in grads)
    cast = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in args]
    expected = routed_lora(*cast, **{**options, "base": options["base"].to(dtype)}, dropout_p=0.25, seed=4)
    assert torch.equal(out, expected)
    for got, want in zip(grads, gradients(expected, leaves), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("a_kind", INDEX_KINDS)
def test_same_bits_twice(a_kind):
    args, options = lora_case(a_kind, "sample", 2, dtype=torch.float32, batch=8, tokens=16, features=64)
    runs = []
    for _ in range(2):
        out = routed_lora(*args, **options, dropout_p=0.25, seed=4)
        runs.append((out, *gradients(out, leaves_of(args, options))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def _bad(name, error, **changes):
    return pytest.param(name, error, changes, id=f"{name}-{next(iter(changes))}-{error.__name__}")


BAD = [
    _bad("x", ValueError, x=torch.randn(2, 4)),
    _bad("x", TypeError, x=torch.ones(3, 2, 4, dtype=torch.int64)),
    _bad("x", TypeError, x=[1.0]),
    _bad("lora_a", ValueError, lora_a=torch.randn(4, 2)),
    _bad("lora_a", ValueError, lora_a=torch.randn(4, 4, 5)),
    _bad("lora_a", TypeError, lora_a=torch.randn(4, 4, 4).double()),
    _bad("lora_a", TypeError, lora_a=None),
    _bad("lora_b", TypeError, lora_b=torch.randn(1, 6, 2).half()),
    _bad("lora_b", ValueError, lora_b=torch.randn(1, 6, 3)),
    _bad("lora_b", ValueError, lora_b=torch.randn(6, 2)),
    _bad("lora_b", ValueError, lora_b=torch.randn(1, 6, 2, device="meta")),
    _bad("a_index", ValueError, a_index=None),
    _bad("a_index", ValueError, a_index=torch.zeros(4, dtype=torch.int64)),
    _bad("a_index", ValueError, a_index=torch.zeros(3, 3, dtype=torch.int64)),
    _bad("a_index", TypeError, a_index=torch.zeros(3)),
    _bad("a_index", TypeError, a_index=[0, 1, 2]),
    _bad("a_index", IndexError, a_index=torch.tensor([0, 4, 1])),
    _bad("a_index", IndexError, a_index=torch.tensor([0, -1, 1])),
    _bad("b_index", IndexError, b_index=torch.tensor([0, 1, 0])),
    _bad("base", ValueError, base=torch.randn(3, 2)),
    _bad("base", ValueError, base=torch.randn(3, 1, 10)),
    _bad("base", TypeError, base=torch.randn(3, 2, 10).double()),
    _bad("output_offsets", ValueError, base=torch.randn(3, 2, 8)),
    _bad("scaling", TypeError, scaling="1"),
    _bad("scaling", ValueError, scaling=float("inf")),
    _bad("scaling", ValueError, scaling=float("nan")),
    _bad("groups", ValueError, groups=0),
    _bad("groups", ValueError, groups=3),
    _bad("groups", TypeError, groups=2.0),
    _bad("groups", ValueError, groups=4, output_offsets=(0, 1, 2, 3)),
    _bad("output_offsets", ValueError, output_offsets=(0,)),
    _bad("output_offsets", ValueError, output_offsets=(0, 2)),
    _bad("output_offsets", ValueError, output_offsets=(-1, 6)),
    _bad("output_offsets", ValueError, output_offsets=(0, 8)),
    _bad("output_offsets", TypeError, output_offsets=(0, 6.0)),
    _bad("output_offsets", TypeError, output_offsets=0),
    _bad("dropout_p", ValueError, dropout_p=1.0),
    _bad("dropout_p", ValueError, dropout_p=-0.1),
    _bad("dropout_p", ValueError, dropout_p=float("nan")),
    _bad("dropout_p", TypeError, dropout_p="0.1"),
    _bad("seed", TypeError, dropout_p=0.1, seed=1.5),
    _bad("seed", ValueError, dropout_p=0.1, seed=2**63),
    _bad("seed", ValueError, dropout_p=0.1, seed=torch.tensor([1])),
    _bad("seed", ValueError, dropout_p=0.1, seed=torch.tensor(1, dtype=torch.int32)),
    _bad("seed", ValueError, dropout_p=0.1, seed=torch.zeros((), dtype=torch.int64, device="meta")),
    _bad("backend", ValueError, backend="gpu"),
]


@pytest.mark.parametrize(("name", "error", "changes"), BAD)
def test_bad_input_is_named(name, error, changes):
    args, options = lora_case(groups=2, dtype=torch.float32)
    names = ("x", "lora_a", "lora_b", "a_index", "b_index")
    args = [changes.get(n, a) for n, a in zip(names, args, strict=True)]
    options.update({k: v for k, v in changes.items() if k not in names})
    with pytest.raises(error, match=f"^{name}: got "):
        routed_lora(*args, **options)
