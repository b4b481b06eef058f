"""The gradient that the Triton losses write in their forward: when, in how many launches, and what becomes of it."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import pytest
import torch
from plain_losses import adamix, frozen
from poison import poisoned_memory
from suite_size import pairs
from triton_spy import DEVICE, launches, needs_triton

needs_triton()

from adamix_kernels.functional import adamix_loss, consistency_loss, linear_adamix_loss
from adamix_kernels.ops.consistency import triton_impl
from adamix_kernels.ops.consistency.triton_impl import plan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
OPS = torch.ops.adamix_kernels
ROWS = ["pair_rows_kernel", "pair_grad_kernel"]
WIDE = ["pair_wide_kernel", "pair_wide_grad_kernel"]
OPTIONS = (0.7, -100, 0.1, False)
# (rows, classes): one program, with one tile or some, many programs, rows of many steps.
SHAPES = {
    "one": ((5,), 3),
    "few": ((2, 18), 100),
    "many of 2": ((9000,), 2),
    "many of 3": ((4400,), 3),
    "wide": ((2,), 9001),
}


def case(name, dtype=torch.float32):
    rows, classes = SHAPES[name]
    logits = (torch.randn(2 * rows[0], *rows[1:], classes) * 2).to(dtype).to(DEVICE)
    labels = torch.where(torch.rand(rows) < 0.2, -100, torch.randint(classes, rows)).to(DEVICE)
    return logits, labels, (torch.rand(rows) < 0.7).to(DEVICE)


def run(logits, labels, mask, grad=1.0, **options):
    leaf = logits.detach().requires_grad_()
    out = adamix_loss(leaf, labels, mask=mask, weight=0.7, label_smoothing=0.1, backend="triton", **options)
    return out.loss.detach(), *torch.autograd.grad(out.loss * grad, leaf)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_launches_of_a_forward(name):
    logits, labels, mask = case(name)
    forward = ["pair_wide_kernel" if name == "wide" else "pair_rows_kernel"]
    if name not in ("one", "few"):
        forward = ["pair_count_kernel", *forward]
    for given in (logits, logits.detach().requires_grad_(), logits.half()):
        with launches(triton_impl) as names:
            adamix_loss(given, labels, mask=mask, backend="triton")
        assert names == forward


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("many of 3", torch.bfloat16), ("few", torch.float32), ("wide", torch.bfloat16), ("wide", torch.float32)],
)
def test_it_has_the_bits_of_the_two_steps_and_is_handed_over_once(name, dtype):
    logits, labels, mask = case(name, dtype)
    stats = OPS.adamix_loss(logits, labels, mask, None, *OPTIONS, "triton")[3:]
    rest = labels, mask, *stats, *OPTIONS
    for grad in (torch.tensor(1.0, device=DEVICE), torch.tensor(-0.3, device=DEVICE)):
        want = OPS.adamix_loss_backward(grad, logits, *rest, "triton")
        leaf = logits.detach().requires_grad_()
        out = adamix_loss(
            leaf, labels, mask=mask, weight=0.7, label_smoothing=0.1, detach_target=False, backend="triton"
        )
        (first,) = torch.autograd.grad(out.loss, leaf, grad, retain_graph=True)
        assert torch.equal(first, want)
        first.zero_()
        (second,) = torch.autograd.grad(out.loss, leaf, grad)
        assert torch.equal(second, want)


@pytest.mark.parametrize("name", ["few", "wide"])
def test_the_expected_gradient_leaves_it_alone(name):
    logits, labels, mask = case(name)
    stats = OPS.adamix_loss(logits, labels, mask, None, *OPTIONS, "triton")[3:]
    for expected, grad in ((1.0, 1.0), (1.0, 1.0000001), (1.0, 0.0), (0.1, 0.1), (0.1, 1.0), (None, 1.0)):
        grad = torch.tensor(grad, device=DEVICE)
        marked = torch.full_like(logits, 7.0)
        triton_impl.adamix_backward(grad, logits, labels, mask, *stats, *OPTIONS, marked, expected)
        want = OPS.adamix_loss_backward(grad, logits, labels, mask, *stats, *OPTIONS, "triton")
        alone = expected is not None and grad == expected
        assert torch.equal(marked, torch.full_like(logits, 7.0) if alone else want)
        over = logits.clone()
        triton_impl.adamix_backward(grad, over, labels, mask, *stats, *OPTIONS, over, expected)
        assert torch.equal(over, logits if alone else want)
    for factor in (1.0, 0.5, 0.0):
        marked = torch.full_like(logits, 7.0)
        triton_impl.rescale(marked, torch.tensor(factor, device=DEVICE))
        assert torch.equal(marked, torch.full_like(marked, 7.0 * factor))
    marked = torch.tensor([float("nan"), 1.0], device=DEVICE)
    triton_impl.rescale(marked, torch.tensor(1.0, device=DEVICE))
    assert marked[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["few", "wide"])
def test_a_gradient_for_what_is_expected_has_the_bits_of_the_two_steps(name, dtype):
    logits, labels, mask = case(name, dtype)
    *_, stats, scales = OPS.adamix_loss(logits, labels, mask, None, *OPTIONS, "triton")
    expected = 1024.0 if dtype == torch.float16 else 0.1
    grad = torch.tensor(expected, device=DEVICE)
    want = OPS.adamix_loss_backward(grad, logits, labels, mask, stats, scales, *OPTIONS, "triton")
    for into in (torch.empty_like(logits), logits):
        triton_impl.adamix_forward_grad(logits, labels, mask, None, *OPTIONS, expected, into)
        assert torch.equal(into, want)


@pytest.mark.parametrize("name", ["many of 3", "few", "wide"])
def test_the_number_of_programs_changes_no_bit(name, monkeypatch):
    logits, labels, mask = case(name)
    want, scaled = run(logits, labels, mask), run(logits, labels, mask, grad=-2.0)
    items = int((mask & (labels != -100)).sum())
    given = run(logits, labels, mask, num_items=items)
    for patched in (triton_impl, plan):
        monkeypatch.setattr(patched, "GRID", 2)
    monkeypatch.setattr(plan, "PROCESSORS", 1)
    plan._processors.cache_clear()
    with poisoned_memory():
        assert same(run(logits, labels, mask), want)
        assert same(run(logits, labels, mask, grad=-2.0), scaled)
        assert same(run(logits, labels, mask, num_items=torch.tensor(items, device=DEVICE)), given)
    plan._processors.cache_clear()


@pytest.mark.parametrize(
    ("name", "reduction", "scale"), [("few", "batchmean", 2.5), ("wide", "sum", 1.0), ("wide", "batchmean", 2.5)]
)
def test_only_the_wanted_gradient_of_a_pair_is_written(name, reduction, scale):
    logits, _, mask = case(name)
    # Rows that begin at other places between 16-byte boundaries are summed up in another order.
    a, b = (t.clone() for t in logits.chunk(2))
    loss = lambda a, b: consistency_loss(a, b, mask=mask, detach_target=False, reduction=reduction, backend="triton")  # noqa: E731
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    wanted = torch.autograd.grad(loss(x, y) * scale, (x, y))
    assert torch.equal(torch.autograd.grad(loss(x, b) * scale, x)[0], wanted[0])
    assert torch.equal(torch.autograd.grad(loss(a, y) * scale, y)[0], wanted[1])


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("loss", ["adamix_loss", "consistency_loss", "linear_adamix_loss"])
def test_finite_differences_in_float32(loss, detach):
    """Gradients of the kernels against slopes of the formula in double, its targets held still if detached."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels, head, hidden = torch.tensor([[0, 4, -100], [2, 2, 1]]), draw(5, 7), draw(4, 3, 7)
    logits, direction = hidden @ head.t(), draw(4, 3, 7) if loss == "linear_adamix_loss" else draw(4, 3, 5)
    point = hidden if loss == "linear_adamix_loss" else logits
    entropy = 0.0 if loss == "consistency_loss" else 1.0
    kept = torch.where(labels == -100, 3, labels) if loss == "consistency_loss" else labels

    def value(x):
        x = x @ head.t() if loss == "linear_adamix_loss" else x
        at = logits if detach else x
        full = frozen(x, at, kept)
        return full if entropy else full - adamix(x, kept)[1]

    leaf = point.float().to(DEVICE).requires_grad_()
    options, targets = dict(detach_target=detach, backend="triton"), labels.to(DEVICE)
    if loss == "adamix_loss":
        out = adamix_loss(leaf, targets, **options).loss
    elif loss == "linear_adamix_loss":
        out = linear_adamix_loss(leaf, head.float().to(DEVICE), targets, chunk_rows=2, **options).loss
    else:
        out = consistency_loss(leaf[:2], leaf[2:], **options)
    (grad,) = torch.autograd.grad(out, leaf)
    step = 1e-6
    slope = (value(point + step * direction) - value(point - step * direction)) / (2 * step)
    torch.testing.assert_close((grad.double().cpu() * direction).sum(), slope, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double().cpu().detach(), value(point), rtol=1e-5, atol=1e-6)


def test_tracing_and_float16_take_two_steps(monkeypatch):
    logits, labels, mask = case("few")
    want = run(logits, labels, mask)
    half = run(logits.half(), labels, mask)
    monkeypatch.setattr(triton_impl, "adamix_forward_grad", None)
    torch._dynamo.reset()
    step = torch.compile(
        lambda x: adamix_loss(x, labels, mask=mask, weight=0.7, label_smoothing=0.1, backend="triton").loss,
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    leaf = logits.detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(step(leaf), leaf)[0], want[1])
    assert same(run(logits.half(), labels, mask), half)
    with pytest.raises(TypeError):
        run(logits, labels, mask)


def test_the_largest_vocabulary():
    logits = torch.randn(2, 262144, device=DEVICE) * 3
    labels = torch.tensor([262143], device=DEVICE)
    wide = logits.double().requires_grad_()
    exact = adamix_loss(wide, labels, backend="reference")
    (wanted,) = torch.autograd.grad(exact.loss, wide)
    leaf = logits.detach().requires_grad_()
    out = adamix_loss(leaf, labels, backend="triton")
    torch.testing.assert_close(tuple(t.double() for t in out), tuple(exact), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-9)


@pairs(
    kind=["masked", "lowest", "lowest in front", "highest", "all lowest"],
    detach=[True, False],
    dtype=[torch.bfloat16, torch.float16],
)
def test_rows_that_cannot_be_told_in_powers_of_two(kind, detach, dtype):
    """In 16 bits rows are read in powers of two; -inf, or the dtype's ends, as masks have them, are not, or not all."""
    logits = (torch.randn(6, 9001) * 2).to(dtype).to(DEVICE)
    end = torch.finfo(dtype)
    if kind == "masked":
        logits[:, 3000:3300] = -torch.inf
    elif kind == "lowest":
        logits[:, ::2] = end.min
    elif kind == "lowest in front":
        logits[:, :8000] = end.min
    elif kind == "highest":
        logits[:, 17] = end.max
    else:
        logits[:] = end.min
    labels = torch.tensor([17] * 3 if kind == "highest" else [9000, 8999, 8001], device=DEVICE)

    def both(x, backend):
        leaf = x.detach().requires_grad_()
        out = adamix_loss(leaf, labels, detach_target=detach, backend=backend)
        return *(t.detach() for t in out), *torch.autograd.grad(out.loss, leaf)

    found, wanted = both(logits, "triton"), both(logits.float(), "reference")
    assert all(t.isfinite().all() for t in wanted)
    for result, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            result.float(), want, rtol=3 * end.eps, atol=1e-6 + 3 * end.eps * want.abs().max().item()
        )
