"""merge_experts and merge_lora on the reference backend against loops in float64 and finite differences."""

import pytest
import torch
from merge_cases import (
    check_lists_that_differ_in_one_thing,
    check_lora_lists,
    check_results_are_apart,
    check_whole_lora_model,
    lora_layers,
)

from adamix_kernels.functional import merge_experts, merge_lora, routed_lora
from adamix_kernels.ops.merge.api import merge_banks, merge_loras

LOW = (torch.float16, torch.bfloat16)
DTYPES = (*LOW, torch.float32, torch.float64)


def _randn(*shape, dtype=torch.float64, seed=0, grad=False):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return t.requires_grad_(grad)


def _merge_experts_oracle(bank, scores):
    exponentials = [1.0] * bank.shape[0] if scores is None else [s.exp() for s in scores]
    return sum(e * expert for e, expert in zip(exponentials, bank, strict=True)) / sum(exponentials)


def _merge_lora_oracle(weight, lora_a, lora_b, scaling, groups, output_offsets, fan_in_fan_out):
    if lora_a.dim() == 3:
        lora_a = sum(lora_a) / len(lora_a)
    if lora_b.dim() == 3:
        lora_b = sum(lora_b) / len(lora_b)
    out = weight.t() if fan_in_fan_out else weight
    rank, per_group = lora_b.shape[1], lora_b.shape[0] // groups
    for g, offset in enumerate(output_offsets):
        block = lora_b[g * per_group : (g + 1) * per_group] @ lora_a[g * rank : (g + 1) * rank]
        above, below = block.new_zeros(offset, out.shape[1]), block.new_zeros(
            out.shape[0] - offset - per_group, out.shape[1]
        )  # fmt: skip
        out = out + scaling * torch.cat([above, block, below])
    return out.t() if fan_in_fan_out else out


def _lora_case(groups=1, fan=False, experts=None, dtype=torch.float64, factor_dtype=None, features=5, per_group=3, r=2):
    factor_dtype = factor_dtype or dtype
    lead = () if experts is None else (experts,)
    offsets = (0,) if groups == 1 else tuple(2 * g * per_group for g in range(groups))
    rows = offsets[-1] + per_group + (1 if groups > 1 else 0)
    weight = _randn(*((features, rows) if fan else (rows, features)), dtype=dtype, seed=1, grad=True)
    lora_a = _randn(*lead, groups * r, features, dtype=factor_dtype, seed=2, grad=True)
    lora_b = _randn(*lead, groups * per_group, r, dtype=factor_dtype, seed=3, grad=True)
    return (weight, lora_a, lora_b), dict(scaling=1.7, groups=groups, output_offsets=offsets, fan_in_fan_out=fan)


def _gradients(out, leaves):
    return torch.autograd.grad((out * _randn(*out.shape, dtype=out.dtype, seed=9)).sum(), leaves)


def _assert_rounded_once(out, exact, slack):
    """|out - exact| is at most half a unit in out's last place (one rounding) plus slack."""
    up = torch.nextafter(out, torch.full_like(out, float("inf"))).double() - out.double()
    down = out.double() - torch.nextafter(out, torch.full_like(out, -float("inf"))).double()
    assert ((out.double() - exact).abs() <= torch.maximum(up, down) / 2 + slack).all()


def _slack(magnitude, dtype, terms):
    """What float32 (float64 for double) accumulation of `terms` products may add."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return terms * eps * magnitude


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 6), (3,), (1, 2, 3), (5, 2, 0), (2, 2, 2, 2)])
@pytest.mark.parametrize("scored", [False, True])
def test_merge_experts_equals_the_loop(shape, scored):
    bank = _randn(*shape, grad=True)
    scores = _randn(shape[0], seed=1, grad=True) if scored else None
    leaves = [bank, scores] if scored else [bank]
    out, expected = merge_experts(bank, scores), _merge_experts_oracle(bank, scores)
    assert out.shape == shape[1:]
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    for got, want in zip(_gradients(out, leaves), _gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(merge_experts, (bank, scores))


def test_merge_experts_frozen_zero_scores_are_the_uniform_mean():
    bank = _randn(4, 3, 5, dtype=torch.float32)
    assert torch.equal(merge_experts(bank, torch.zeros(4)), merge_experts(bank))


def test_merge_experts_of_one_is_a_copy():
    bank = _randn(1, 3, 5, dtype=torch.bfloat16)
    for scores in (None, torch.tensor([3.0])):
        out = merge_experts(bank, scores)
        assert torch.equal(out, bank[0])
        assert out.data_ptr() != bank.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("experts", [2, 3, 4, 8])
def test_merge_experts_rounds_once(dtype, scored, experts):
    bank = _randn(experts, 32, 16, dtype=dtype)
    scores = _randn(experts, dtype=torch.float32, seed=1) if scored else None
    out = merge_experts(bank, scores)
    assert out.dtype == dtype
    exact = _merge_experts_oracle(bank.double(), None if scores is None else scores.double())
    _assert_rounded_once(out, exact, _slack(bank.double().abs().sum(0), dtype, 4))


def test_merge_experts_does_not_overflow_half():
    bank = torch.full((4, 3), 60000.0, dtype=torch.float16)
    assert torch.equal(merge_experts(bank), bank[0])


@pytest.mark.parametrize("dtype", LOW)
def test_merge_experts_gradients_in_low_precision(dtype):
    bank, scores = _randn(4, 8, 8, dtype=dtype, grad=True), _randn(4, dtype=torch.float32, seed=1, grad=True)
    got = _gradients(merge_experts(bank, scores), (bank, scores))
    assert [g.dtype for g in got] == [dtype, torch.float32]
    wide = [t.detach().double().requires_grad_() for t in (bank, scores)]
    grad = _randn(8, 8, dtype=dtype, seed=9).double()
    want = torch.autograd.grad((_merge_experts_oracle(*wide) * grad).sum(), wide)
    _assert_rounded_once(got[0], want[0], 1e-6 * want[0].abs())
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [2, 3, 7, 16])
def test_the_same_bits_at_any_address(experts, dtype):
    """A BLAS may sum in another order where its operand is aligned otherwise."""

    def moved(t, by):
        return torch.cat([t.new_zeros(by), t.flatten()])[by:].view(t.shape)

    def run(bank, scores, grad):
        leaves = [t.detach().requires_grad_() for t in (bank, scores)]
        means = merge_banks([bank, bank], [None, scores])
        return *means, *torch.autograd.grad(merge_experts(*leaves), leaves, grad)

    for size in (1, 5, 31, 1000, 2**16 + 77):
        bank, scores, grad = (
            _randn(*shape, dtype=dtype, seed=size) for shape in ((experts, size), (experts,), (size,))
        )
        want = run(bank, scores, grad)
        for by in (1, 3, 8):
            got = run(moved(bank, by), moved(scores, by), moved(grad, by))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (size, by)


def test_lists_of_banks():
    draw = lambda *shape, dtype=torch.float32: torch.randn(*shape).to(dtype)  # noqa: E731
    check_lists_that_differ_in_one_thing("auto", draw)
    check_results_are_apart("reference", draw)


@pytest.mark.parametrize("experts", [None, 1, 3])
@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_merge_lora_equals_the_loop(groups, fan, experts):
    args, options = _lora_case(groups, fan, experts)
    out, expected = merge_lora(*args, **options), _merge_lora_oracle(*args, **options)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    for got, want in zip(_gradients(out, args), _gradients(expected, args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *factors: merge_lora(*factors, **options), args)


def test_merge_lora_mixed_ranks():
    """A plain A with a bank of B, as when one side is shared and squeezed."""
    (weight, _, lora_b), options = _lora_case(2, experts=3)
    lora_a = _lora_case(2)[0][1]
    torch.testing.assert_close(
        merge_lora(weight, lora_a, lora_b, **options), merge_lora(weight, lora_a, lora_b.mean(0), **options)
    )


@pytest.mark.parametrize("wanted", range(3))
def test_merge_lora_one_gradient_at_a_time(wanted):
    args, options = _lora_case(2, experts=3)
    full = _gradients(merge_lora(*args, **options), args)
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(args)]
    (grad,) = _gradients(merge_lora(*leaves, **options), leaves[wanted : wanted + 1])
    assert torch.equal(grad, full[wanted])


def test_merge_lora_equals_the_routed_forward():
    """x (W + delta)^T is what routed_lora adds to x W^T."""
    (weight, lora_a, lora_b), options = _lora_case(2)
    x = _randn(2, 3, 5, seed=7)
    merged = x @ merge_lora(weight, lora_a, lora_b, **options).t()
    del options["fan_in_fan_out"]
    adapted = routed_lora(x, lora_a[None], lora_b[None], None, None, base=x @ weight.t(), **options)
    torch.testing.assert_close(merged, adapted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "factor_dtype"), [*((d, d) for d in DTYPES), *((d, torch.float32) for d in LOW), (torch.float32, LOW[1])]
)
@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("experts", [None, 4])
def test_merge_lora_rounds_once(dtype, factor_dtype, fan, experts):
    args, options = _lora_case(2, fan, experts, dtype, factor_dtype, features=64, per_group=32, r=8)
    before = args[0].detach().clone()
    out = merge_lora(*args, **options)
    assert out.dtype == dtype
    assert torch.equal(args[0], before)
    wide = [t.detach().double() for t in args]
    magnitude = _merge_lora_oracle(*(t.abs() for t in wide), **options)
    _assert_rounded_once(out.detach(), _merge_lora_oracle(*wide, **options), _slack(magnitude, dtype, 12))
    untouched = (slice(None), slice(32, 64)) if fan else slice(32, 64)
    assert torch.equal(out[untouched], args[0][untouched])
    grads = _gradients(out, args)
    assert [g.dtype for g in grads] == [dtype, factor_dtype, factor_dtype]


@pytest.mark.parametrize("dtype", LOW)
def test_autocast_changes_nothing(dtype):
    args, options = _lora_case(2, dtype=torch.float32, experts=3, features=32, per_group=16)
    bank, scores = _randn(4, 8, 8, dtype=torch.float32, grad=True), _randn(4, dtype=torch.float32, seed=1, grad=True)

    def run():
        lora, experts = merge_lora(*args, **options), merge_experts(bank, scores)
        return lora, experts, *_gradients(lora, args), *_gradients(experts, (bank, scores))

    plain = run()
    with torch.autocast("cpu", dtype):
        cast = run()
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(cast, plain, strict=True))


@pytest.mark.parametrize("experts", [None, 3])
def test_non_contiguous(experts):
    args, options = _lora_case(2, experts=experts)
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in args]
    out = merge_lora(*strided, **options)
    assert out.is_contiguous()
    dense = merge_lora(*args, **options)
    torch.testing.assert_close(out, dense, rtol=1e-13, atol=1e-13)
    grad = _randn(*out.shape, seed=9).t().contiguous().t()
    for got, want in zip(torch.autograd.grad(out, strided, grad), _gradients(dense, args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    bank, scores = _randn(4, 3, 5).mT.contiguous().mT.requires_grad_(), _randn(8, seed=1)[::2]
    merged = merge_experts(bank, scores)
    assert merged.is_contiguous()
    torch.testing.assert_close(merged, _merge_experts_oracle(bank, scores), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scored", [False, True])
def test_same_bits_twice(scored):
    args, options = _lora_case(2, experts=4, dtype=torch.float32, features=64, per_group=32, r=8)
    bank = _randn(4, 48, 64, dtype=torch.float32, grad=True)
    scores = _randn(4, dtype=torch.float32, seed=1) if scored else None
    runs = []
    for _ in range(2):
        lora, experts = merge_lora(*args, **options), merge_experts(bank, scores)
        runs.append((lora, experts, *_gradients(lora, args), *_gradients(experts, (bank,))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_experts(scored, dtype):
    ops = torch.ops.adamix_kernels
    bank = _randn(4, 3, 5, dtype=dtype, grad=True)
    scores = _randn(4, dtype=torch.float32 if dtype == torch.bfloat16 else dtype, seed=1, grad=True) if scored else None
    torch.library.opcheck(ops.merge_experts.default, (bank, scores, "reference"))
    detached = None if scores is None else scores.detach()
    for need in ((True, scored), (True, False), (False, scored)):
        torch.library.opcheck(
            ops.merge_experts_backward.default,
            (bank.detach()[0].clone(), bank.detach(), detached, *need, "reference"),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_opcheck_lora(groups, fan):
    ops = torch.ops.adamix_kernels
    args, options = _lora_case(groups, fan, experts=3)
    tail = (1.7, groups, list(options["output_offsets"]), fan, "reference")
    torch.library.opcheck(ops.merge_lora.default, (*args, *tail))
    weight, lora_a, lora_b = (t.detach() for t in args)
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            ops.merge_lora_backward.default,
            (weight, lora_a, lora_b, *need, *tail),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    args, options = _lora_case(2, True, experts=3)
    bank, scores = _randn(4, 3, 5, grad=True), _randn(4, seed=1, grad=True)

    def function(scaling):
        lora = merge_lora(*args, **{**options, "scaling": scaling})
        return lora.sum() + (merge_experts(bank, scores) * merge_experts(bank)).sum(), lora

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = (*args, bank, scores)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for got, want in zip(compiled(0.5), function(0.5), strict=True):
                assert torch.equal(got, want)
            # The gradient of lora.sum() is one number expanded, or a whole tensor when compiled: a CPU's matrix product
            # may round those two by different paths.
            got, want = (torch.autograd.grad(f(0.5)[0], leaves) for f in (compiled, function))
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)


BAD_EXPERTS = [
    ("bank", TypeError, None, None),
    ("bank", TypeError, torch.ones(4, 3, dtype=torch.int64), None),
    ("bank", ValueError, torch.tensor(1.0), None),
    ("bank", ValueError, torch.zeros(0, 3), None),
    ("scores", ValueError, torch.zeros(4, 3), torch.zeros(3)),
    ("scores", ValueError, torch.zeros(4, 3), torch.zeros(4, 1)),
    ("scores", TypeError, torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)),
    ("scores", TypeError, torch.zeros(4, 3), [0.25] * 4),
    ("scores", ValueError, torch.zeros(4, 3), torch.zeros(4, device="meta")),
]


@pytest.mark.parametrize(("name", "error", "bank", "scores"), BAD_EXPERTS)
def test_bad_input_of_merge_experts_is_named(name, error, bank, scores):
    with pytest.raises(error, match=f"^{name}: got "):
        merge_experts(bank, scores)


BAD_LORA = [
    ("weight", TypeError, dict(weight=None)),
    ("weight", ValueError, dict(weight=torch.zeros(10))),
    ("lora_a", TypeError, dict(lora_a=None)),
    ("lora_a", ValueError, dict(lora_a=torch.zeros(4))),
    ("lora_a", ValueError, dict(lora_a=torch.zeros(0, 4, 5))),
    ("lora_a", ValueError, dict(lora_a=torch.zeros(4, 6))),
    ("lora_a", ValueError, dict(lora_a=torch.zeros(4, 5, device="meta"))),
    ("lora_a", ValueError, dict(fan_in_fan_out=True)),
    ("lora_b", TypeError, dict(lora_b=torch.zeros(6, 2).half())),
    ("lora_b", ValueError, dict(lora_b=torch.zeros(6, 3))),
    ("lora_b", ValueError, dict(lora_b=torch.zeros(1, 1, 6, 2))),
    ("scaling", TypeError, dict(scaling=None)),
    ("scaling", ValueError, dict(scaling=float("-inf"))),
    ("groups", ValueError, dict(groups=3, output_offsets=(0, 2, 4))),
    ("groups", TypeError, dict(groups=True)),
    ("output_offsets", ValueError, dict(output_offsets=(0, 1))),
    ("output_offsets", ValueError, dict(output_offsets=(0, 8))),
    ("output_offsets", ValueError, dict(output_offsets=(0,))),
    ("backend", ValueError, dict(backend="gpu")),
]


@pytest.mark.parametrize(("name", "error", "changes"), BAD_LORA)
def test_bad_input_of_merge_lora_is_named(name, error, changes):
    args, options = _lora_case(2, dtype=torch.float32)
    arguments = {**dict(zip(("weight", "lora_a", "lora_b"), args, strict=True)), **options, **changes}
    with pytest.raises(error, match=f"^{name}: got "):
        merge_lora(**arguments)


def test_lists_of_lora_layers():
    check_lora_lists("reference", torch.randn)
    check_whole_lora_model("reference", "cpu")
    layers = lora_layers(torch.randn)
    layers[3] = layers[3]._replace(lora_b=layers[3].lora_b[:, 1:])
    with pytest.raises(ValueError, match=r"layers\[3\]\.lora_b: got shape"):
        merge_loras(layers)
    with pytest.raises(TypeError, match=r"layers\[0\]\.weight: got"):
        merge_loras([layers[0]._replace(weight=3)])
