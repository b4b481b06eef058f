"""The gradient that the Triton losses write in their forward: when, in how many launches, and what becomes of it."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import pytest
import torch
from plain_losses import adamix, frozen
from poison import poisoned_memory
from triton_spy import DEVICE, launches, needs_triton

needs_triton()

from adamix_kernels.functional import adamix_loss, consistency_loss, linear_adamix_loss
from adamix_kernels.ops.consistency import triton_impl
from adamix_kernels.ops.consistency.triton_impl import plan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
OPS = torch.ops.adamix_kernels
ROWS = ["pair_rows_kernel", "pair_grad_kernel"]
OPTIONS = (0.7, -100, 0.1, False)
# (rows, classes): one program, few programs, many of them, parts of rows.
SHAPES = {
    "one": ((5,), 3),
    "few": ((2, 18), 100),
    "many of 2": ((1100,), 2),
    "many of 3": ((1100,), 3),
    "parts": ((2,), 9001),
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
def test_one_launch_forward(name, monkeypatch):
    logits, labels, mask = case(name)
    if name == "one":
        # A program alone needs no ticket, which would be a fill.
        monkeypatch.setattr(triton_impl, "_ticket", None)
    forward = ["pair_parts_kernel" if name == "parts" else "pair_rows_kernel"]
    with launches(triton_impl) as names:
        adamix_loss(logits, labels, mask=mask, backend="triton")
    assert names == forward
    with launches(triton_impl) as names:
        adamix_loss(logits.requires_grad_(), labels, mask=mask, backend="triton")
    assert names == forward + ["pair_grad_kernel"] * (name == "parts")
    with launches(triton_impl) as names:
        adamix_loss(logits.half(), labels, mask=mask, backend="triton")
    assert names == forward


@pytest.mark.parametrize(
    ("name", "dtype"), [("many of 3", torch.bfloat16), ("few", torch.float32), ("parts", torch.bfloat16)]
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


def test_a_gradient_of_one_leaves_it_alone():
    logits, labels, mask = case("few")
    stats = OPS.adamix_loss(logits, labels, mask, None, *OPTIONS, "triton")[3:]
    for grad in (1.0, 1.0000001, 0.0):
        grad = torch.tensor(grad, device=DEVICE)
        marked = torch.full_like(logits, 7.0)
        OPS.adamix_loss_correct(grad, logits, labels, mask, *stats, *OPTIONS, marked, "triton")
        want = OPS.adamix_loss_backward(grad, logits, labels, mask, *stats, *OPTIONS, "triton")
        assert torch.equal(marked, torch.full_like(logits, 7.0) if grad == 1 else want)
        marked = torch.full_like(logits, 7.0)
        OPS.loss_rescale(marked, grad, "triton")
        assert torch.equal(marked, 7.0 * grad.expand_as(logits))
    marked = torch.tensor([float("nan"), 1.0], device=DEVICE)
    OPS.loss_rescale(marked, torch.tensor(1.0, device=DEVICE), "triton")
    assert marked[0].isnan()


def test_counting_first_and_a_small_grid_change_no_bit(monkeypatch):
    logits, labels, mask = case("many of 3")
    want, scaled = run(logits, labels, mask), run(logits, labels, mask, grad=-2.0)
    items = int((mask & (labels != -100)).sum())
    with monkeypatch.context() as patch, launches(triton_impl) as names, poisoned_memory():
        patch.setattr(plan, "MAX_COUNTED", 0)
        assert same(run(logits, labels, mask), want)
        given = run(logits, labels, mask, num_items=items)
    assert names == ["pair_count_kernel", *ROWS, *ROWS]
    for patched in (triton_impl, plan):
        monkeypatch.setattr(patched, "GRID", 2)
    assert same(run(logits, labels, mask), want)
    assert same(run(logits, labels, mask, grad=-2.0), scaled)
    assert same(run(logits, labels, mask, num_items=torch.tensor(items, device=DEVICE)), given)


@pytest.mark.parametrize(("name", "reduction", "scale"), [("few", "batchmean", 2.5), ("parts", "sum", 1.0)])
def test_only_the_wanted_gradient_of_a_pair_is_written(name, reduction, scale):
    logits, _, mask = case(name)
    a, b = logits.chunk(2)
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


def test_the_largest_vocabulary(monkeypatch):
    logits = torch.randn(2, 262144, device=DEVICE) * 3
    labels = torch.tensor([262143], device=DEVICE)
    wide = logits.double().requires_grad_()
    exact = adamix_loss(wide, labels, backend="reference")
    (wanted,) = torch.autograd.grad(exact.loss, wide)
    for programs in (plan.PROGRAMS, 1):
        monkeypatch.setattr(plan, "PROGRAMS", programs)
        leaf = logits.detach().requires_grad_()
        out = adamix_loss(leaf, labels, backend="triton")
        torch.testing.assert_close(tuple(t.double() for t in out), tuple(exact), rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-9)


def test_opcheck():
    backend = "triton"
    logits, labels, mask = case("few", torch.bfloat16)
    a, b = logits.chunk(2)
    into, one = torch.empty_like, torch.tensor(2.0, device=DEVICE)
    stats = OPS.adamix_loss(logits, labels, mask, None, *OPTIONS, backend)[3:]
    _, pair_stats, scale = OPS.consistency(a, b, mask, True, "sum", backend)
    calls = [
        (OPS.adamix_loss_grad, (logits, labels, mask, None, *OPTIONS, into(logits), backend)),
        (OPS.adamix_loss_correct, (one, logits, labels, mask, *stats, *OPTIONS, into(logits), backend)),
        (OPS.consistency_grad, (a, b, mask, False, "batchmean", into(a), None, backend)),
        (OPS.consistency_correct, (one, a, b, mask, pair_stats, scale, True, into(a), into(b), backend)),
        (OPS.loss_rescale, (torch.ones_like(logits), one, backend)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))
