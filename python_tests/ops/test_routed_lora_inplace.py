"""routed_lora(inplace=True): the same bits in base's memory, or an error before anything is changed."""

import functools

import pytest
import torch
import torch.utils.checkpoint
from plain_lora import INDEX_KINDS, gradients, lora_case
from torch._dynamo.testing import CompileCounterWithBackend
from triton_spy import DEVICE, GPU, INTERPRET

from adamix_kernels.functional import routed_lora

BACKENDS = ["reference", *(["triton"] if INTERPRET or GPU else [])]


def case(a_kind="sample", b_kind="none", groups=2, **sizes):
    """(source [..., N] that requires grad, the other leaves, indices, options); base is made from source."""
    args, options = lora_case(a_kind, b_kind, groups, **{"dtype": torch.float32, **sizes})
    source = options.pop("base").detach().to(DEVICE).requires_grad_()
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in args[:3]]
    return source, leaves, [i if i is None else i.to(DEVICE) for i in args[3:]], options


def results(source, leaves, indices, options, make=lambda source: source * 3, **keywords):
    """(output and gradients, base, base's address before the call)."""
    base = make(source)
    address = base.data_ptr()
    out = routed_lora(*leaves, *indices, base=base, **options, **keywords)
    assert out.shape == base.shape
    return (out, *gradients(out.cpu(), [*leaves, source])), out, address


def assert_same(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("drop", [{}, dict(dropout_p=0.4, seed=3)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kinds", [(a, "none") for a in INDEX_KINDS] + [("token", "sample")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_in_bases_memory(backend, kinds, groups, drop):
    given = case(*kinds, groups, batch=2, tokens=17, features=20, rank=5, per_group=17)
    want, fresh, address = results(*given, backend=backend, **drop)
    assert fresh.data_ptr() != address
    got, out, address = results(*given, backend=backend, inplace=True, **drop)
    assert out.data_ptr() == address
    assert_same(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_of_no_group_are_not_touched(backend):
    source, leaves, indices, options = case()
    base = source.detach().clone()
    base[..., 3:6] = base[..., 9:] = float("nan")
    with torch.no_grad():
        out = routed_lora(*leaves, *indices, base=base, **options, backend=backend, inplace=True)
    assert out.data_ptr() == base.data_ptr()
    assert out[..., 3:6].isnan().all()
    assert out[..., 9:].isnan().all()
    assert out[..., [0, 1, 2, 6, 7, 8]].isfinite().all()
    assert not torch.equal(base[..., :3], source[..., :3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_any_contiguous_tensor_will_do(mode, backend):
    source, leaves, indices, options = case()
    want = routed_lora(*leaves, *indices, base=source, **options, backend=backend)
    with mode():
        for base in (source.clone(), torch.stack([source] * 2)[1], source.detach().clone().requires_grad_()):
            out = routed_lora(*leaves, *indices, base=base, **options, backend=backend, inplace=True)
            assert out.data_ptr() == base.data_ptr()
            assert torch.equal(out, want)


@pytest.mark.parametrize(
    "make",
    [
        lambda source: (source * 3).flatten(0, 1).view(source.shape),
        lambda source: (source.flatten(0, 1) * 3).view(source.shape),
        lambda source: (source.unsqueeze(0) * 3).squeeze(0).contiguous(),
    ],
)
def test_all_of_another_tensor_through_a_view(make):
    given = case()
    want, *_ = results(*given)
    got, out, address = results(*given, make=make, inplace=True)
    assert out.data_ptr() == address
    assert_same(got, want)


def test_base_itself_is_the_output_afterwards():
    source, leaves, indices, options = case()
    want, *_ = results(source, leaves, indices, options)
    base = (source.flatten(0, 1) * 3).view(source.shape)
    routed_lora(*leaves, *indices, base=base, **options, inplace=True)
    assert_same((base, *gradients(base.cpu(), [*leaves, source])), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_that_needs_the_old_value_raises(backend):
    source, leaves, indices, options = case()
    out = routed_lora(*leaves, *indices, base=source.sigmoid(), **options, backend=backend, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(out.cpu(), [source])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 2), (3, 0)])
def test_empty(batch, tokens, backend):
    given = case(batch=batch, tokens=tokens)
    assert_same(results(*given, backend=backend, inplace=True)[0], results(*given, backend=backend)[0])


BAD = {
    "none": (lambda s, x: None, TypeError, "None"),
    "leaf": (lambda s, x: s, ValueError, "a leaf that requires grad"),
    "view of a leaf": (lambda s, x: s.flatten(0, 1).view(s.shape), ValueError, "a leaf that requires grad"),
    "part": (lambda s, x: torch.stack([s, s])[1], ValueError, "a view of a tensor"),
    "other rows": (lambda s, x: (s.flatten() * 3).view(s.shape), ValueError, "a view of a tensor"),
    "strided": (lambda s, x: (s * 3).mT.contiguous().mT, ValueError, "strides"),
    "other order": (lambda s, x: (s.transpose(0, 1) * 3).transpose(0, 1), ValueError, "a view of a tensor"),
    "expanded": (lambda s, x: (s[:1] * 3).expand(s.shape), ValueError, "strides"),
    "x itself": (lambda s, x: x, ValueError, "a tensor in x's memory"),
    "x, detached": (lambda s, x: x.detach(), ValueError, "a tensor in x's memory"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_overwritten_is_named_and_left_alone(name):
    make, error, got = BAD[name]
    source, (x, a, b), indices, options = case("sample", "none", 1, features=3, per_group=3)
    base = make(source, x)
    before = [t.detach().clone() for t in (source, x, base if base is not None else x)]
    with pytest.raises(error, match=f"^base: got {got}"):
        routed_lora(x, a, b, *indices, base=base, **options, inplace=True)
    assert_same([source, x, base if base is not None else x], before)


def test_other_bad_arguments():
    source, leaves, indices, options = case()
    call = functools.partial(routed_lora, *leaves, **options)
    with pytest.raises(TypeError, match=r"^inplace: got 'yes'"):
        call(*indices, base=source * 3, inplace="yes")
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(TypeError, match=r"^base: got torch\.float32"):
        call(*indices, base=source * 3, inplace=True)
    base = source * 3
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match=r"^a_index: got"):
            call(indices[0] + 4, indices[1], base=base, inplace=True)
    assert torch.equal(base, source * 3)


def test_under_autocast_a_base_of_its_dtype_is_overwritten():
    given = case()
    make = lambda source: (source * 3).bfloat16()  # noqa: E731
    with torch.autocast(DEVICE, torch.bfloat16):
        want, *_ = results(*given, make=make)
        got, out, address = results(*given, make=make, inplace=True)
    assert out.data_ptr() == address
    assert_same(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    source, leaves, indices, options = case()
    want, *_ = results(source, leaves, indices, options, dropout_p=0.4, seed=1)

    def function(source, *leaves):
        return routed_lora(*leaves, *indices, base=source * 3, **options, dropout_p=0.4, seed=1, inplace=True)

    out = torch.utils.checkpoint.checkpoint(function, source, *leaves, use_reentrant=reentrant)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (out * weight.to(out)).sum().backward()
    assert_same((out, *(t.grad for t in (*leaves, source))), want)


def test_compile_overwrites_base_too():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(source, leaves, indices):
        base = source * 3
        out = routed_lora(*leaves, *indices, base=base, scaling=1.7, groups=2, output_offsets=(0, 6), inplace=True)
        return out, base

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for batch in (5, 7, 9):
        source, leaves, indices, options = case(batch=batch, tokens=11, features=20)
        want, *_ = results(source, leaves, indices, options)
        out, base = compiled(source, leaves, indices)
        assert torch.equal(base, out)
        assert_same((out, *gradients(out.cpu(), [*leaves, source])), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    source, leaves, indices, options = case("token", "sample")
    inputs = (*(t.detach() for t in leaves), *indices, source.detach().clone(), torch.tensor(3, device=DEVICE),
              1.7, 2, list(options["output_offsets"]), 0.3, backend)  # fmt: skip
    op = torch.ops.adamix_kernels.routed_lora_.default
    torch.library.opcheck(op, inputs, test_utils=("test_schema", "test_faketensor"))
