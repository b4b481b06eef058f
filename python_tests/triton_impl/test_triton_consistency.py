"""The consistency losses on the Triton backend: interpreted on the CPU (TRITON_INTERPRET=1), compiled on a GPU."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import functools
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_size import pairs
from triton_spy import DEVICE, DTYPES, launches, needs_triton

needs_triton()

import loss_cases
from loss_cases import check_a_masked_vocabulary, check_errors, check_nan_and_infinities, one_pass_consistency
from poison import poisoned_memory

from adamix_kernels import BackendUnavailableError, _backends
from adamix_kernels._triton_utils import INTERPRETING
from adamix_kernels.functional import adamix_loss, consistency_loss, linear_adamix_loss
from adamix_kernels.ops.consistency import triton_impl
from adamix_kernels.ops.consistency.triton_impl import plan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
randn = functools.partial(loss_cases.randn, DEVICE)
draw_labels = functools.partial(loss_cases.draw_labels, DEVICE)
draw_mask = functools.partial(loss_cases.draw_mask, DEVICE)


def gradients(loss, wanted, *tensors, grad=1.0, same_form=None):
    """Compares loss and gradients of loss(backend, *tensors) on both backends; grad: the incoming one, of a scalar."""

    def on(backend):
        def run(*given):
            leaves = [t.detach().requires_grad_() for t in given]
            out = loss(backend, *leaves)
            first = out if isinstance(out, torch.Tensor) else out[0]
            weights = torch.linspace(-1, 2, first.numel(), device=first.device).view(first.shape)
            extra = () if isinstance(out, torch.Tensor) else tuple(t.detach() for t in out[1:])
            return (
                first.detach(),
                *extra,
                *torch.autograd.grad((first * (weights if first.dim() else grad)).sum(), leaves),
            )

        return run

    def spied(*given):
        with poisoned_memory():
            return on("triton")(*given)

    with launches(triton_impl) as names:
        check_errors(spied, on("reference"), *tensors, same_form=same_form)
    assert names == wanted


# The forward's launches, then the backward's, which has nothing to do where the incoming gradient is 1.
ROWS = ["pair_rows_kernel", "pair_grad_kernel"]
COUNTED = ["pair_count_kernel", *ROWS]
WIDE = ["pair_count_kernel", "pair_wide_kernel", "pair_wide_grad_kernel"]
# (rows, classes, launches): one program, tiles of many rows, rows of many steps.
SHAPES = {
    "2 classes": ((5,), 2, ROWS),
    "3 classes": ((7,), 3, ROWS),
    "1 class": ((4, 3), 1, ROWS),
    "64 classes": ((3, 7), 64, ROWS),
    "many rows of 2": ((190, 7), 2, ROWS),
    "more rows of 3": ((830, 5), 3, COUNTED),
    "many rows of 100": ((4, 23), 100, ROWS),
    "a whole tile": ((3, 3), 4096, COUNTED),
    "steps": ((2,), 9001, WIDE),
    "steps and a rest": ((1, 3), 4097, WIDE),
    "all in step": ((2, 4), 4099, WIDE),
}


@pairs(case=SHAPES, detach=[True, False], dtype=DTYPES)
def test_adamix_loss_and_its_gradient(case, detach, dtype):
    rows, classes, wanted = SHAPES[case]
    labels, mask = draw_labels(rows, classes), draw_mask(rows)

    def loss(backend, logits):
        return adamix_loss(
            logits, labels, weight=0.7, label_smoothing=0.1, mask=mask, detach_target=detach, backend=backend
        )

    gradients(loss, wanted, randn(2 * rows[0], *rows[1:], classes, dtype=dtype))


@pytest.mark.parametrize("options", [{}, {"num_items": 11}, {"weight": 0.0}, {"ignore_index": 1}])
def test_options(options):
    labels = torch.randint(5, (6, 4), device=DEVICE)
    gradients(lambda backend, x: adamix_loss(x, labels, backend=backend, **options), ROWS, randn(12, 4, 5), grad=3.0)


@pairs(
    case=["3 classes", "many rows of 100", "a whole tile", "steps and a rest"],
    detach=[True, False], reduction=["batchmean", "sum", "none"], dtype=DTYPES[::2],
)  # fmt: skip
def test_consistency_loss_and_its_gradients(case, detach, reduction, dtype):
    rows, classes, wanted = SHAPES[case]
    mask = draw_mask(rows)

    def loss(backend, a, b):
        return consistency_loss(a, b, mask=mask, detach_target=detach, reduction=reduction, backend=backend)

    wanted = wanted[reduction == "none" and "count" in wanted[0] :]
    grad = 1.0 if detach else 3.0
    gradients(loss, wanted, randn(*rows, classes, dtype=dtype), randn(*rows, classes, dtype=dtype), grad=grad)


def test_no_rows_axis_and_no_mask():
    gradients(lambda backend, a, b: consistency_loss(a, b, backend=backend), ROWS, randn(9), randn(9))


@settings(max_examples=12)
@given(data=st.data())
def test_any_shape(data):
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    rows, classes, dtype = (pick(1, 5), pick(1, 7)), pick(1, 300), data.draw(st.sampled_from(DTYPES))
    smoothing, detach = data.draw(st.sampled_from([0.0, 0.2])), data.draw(st.booleans())
    labels = draw_labels(rows, classes)
    logits = randn(2 * rows[0], rows[1], classes, dtype=dtype)
    grad = data.draw(st.sampled_from([1.0, -0.5]))

    def loss(backend, x):
        return adamix_loss(x, labels, label_smoothing=smoothing, detach_target=detach, backend=backend)

    gradients(loss, ROWS, logits, grad=grad)


@pairs(kind=["huge", "shifted", "close"], detach=[True, False], classes=[7, 9001], dtype=DTYPES)
def test_large_logits_stay_exact(kind, detach, classes, dtype):
    a = randn(4, classes)
    b = {"huge": randn(4, classes, scale=5e3), "shifted": a + 9000, "close": a + randn(4, classes, scale=1e-2)}[kind]
    a = randn(4, classes, scale=5e3).clamp(-1e4, 1e4) if kind == "huge" else a
    labels = torch.randint(classes, (4,), device=DEVICE)

    def loss(backend, x):
        return adamix_loss(x, labels, label_smoothing=0.1, detach_target=detach, backend=backend)

    logits = torch.cat([a, b.clamp(-1e4, 1e4)]).to(dtype)
    assert loss("triton", logits).loss.isfinite()
    # From one seed to the next J's error is up to three times the reference's budget; of few classes interpreted, it
    # keeps to that.
    one_pass = kind != "huge" and (not INTERPRETING or classes > plan.FEW)
    form = {2: lambda x: one_pass_consistency(x.float())} if one_pass else None
    gradients(loss, WIDE if classes > 4096 else ROWS, logits, same_form=form)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [pytest.param(33003, torch.float16, id="6 held"), pytest.param(37003, torch.bfloat16, id="7 held")],
)
def test_steps_beyond_those_that_are_held(classes, dtype, detach):
    """Of rows of 16 warps' steps, two at a time."""
    assert detach is False or plan.make_wide(classes, 2, keep=plan.HELD).held == (7 if dtype == torch.bfloat16 else 6)
    a, b = randn(1, classes, dtype=dtype), randn(1, classes, dtype=dtype)
    gradients(lambda backend, *x: consistency_loss(*x, detach_target=detach, backend=backend), WIDE, a, b)


def assert_close_to_the_reference(a, b, rtol):
    """consistency_loss and its gradients of a and b."""
    found = {}
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        loss = consistency_loss(*leaves, backend=backend)
        found[backend] = loss.detach(), *torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(found["triton"], found["reference"], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("classes", "which"), [(37, 5), (12301, 5), (12301, 9005)])
def test_a_logit_of_1e38_does_not_make_the_loss_overflow(classes, which, dtype):
    a, b = randn(2, classes, dtype=dtype), randn(2, classes, dtype=dtype)
    a[0, which] = 1e38
    assert_close_to_the_reference(a, b, rtol=2e-2)


@pairs(label=[3, 9202], dtype=[torch.float16, torch.bfloat16], detach=[True, False])
def test_columns_far_above_those_that_a_lane_began_with(label, dtype, detach):
    """A lane's powers are of its first columns and of the label: whatever comes, results are right."""
    apart = torch.tensor([-1e4, -95.0, -60.0, -30.0, 60.0], device=DEVICE, dtype=dtype)
    logits = randn(10, 9203, dtype=dtype)
    logits[:, :9100] += apart.repeat(2)[:, None]
    labels = torch.full((5,), label, device=DEVICE)
    gradients(lambda backend, x: adamix_loss(x, labels, detach_target=detach, backend=backend), WIDE, logits)


@pytest.mark.parametrize("gap", [60.0, 89.0, 95.0])
def test_what_counts_in_a_lane_that_began_far_below(gap, monkeypatch):
    """A lane began with `gap` below the row's maximum, and one of its later columns counts. On a GPU exp2 gives 0 for
    what is below the least normal number; the interpreter's gives that only here."""
    if INTERPRETING:
        from triton.runtime.interpreter import InterpreterBuilder

        def flushed(self, arg):
            return self.unary_op(arg, lambda x: np.where(x < -126, np.float32(0), np.exp2(x)))

        monkeypatch.setattr(InterpreterBuilder, "create_exp2", flushed)
    a = torch.full((1, 4200), -30.0, device=DEVICE, dtype=torch.bfloat16)
    a[0, 0], a[0, 40:48] = 10.0, 10.0 - gap
    b = a.clone()
    a[0, 2091], b[0, 2091] = 7.0, 6.0
    assert_close_to_the_reference(a, b, rtol=1e-2)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("classes", [7, 9001])
def test_a_masked_vocabulary_adds_nothing(classes, detach):
    """-inf in both passes, here in whole chunks and at the front."""
    check_a_masked_vocabulary(randn(6, classes), detach, "triton")


@pytest.mark.parametrize("classes", [5, 9001])
def test_nan_gives_nan_and_what_is_masked_may_hold_it(classes):
    check_nan_and_infinities(randn(8, classes), "triton")


@pytest.mark.parametrize(("rows", "classes"), [((0,), 5), ((0, 3), 5), ((2, 0), 5), ((0,), 5000)])
def test_no_rows_no_loss(rows, classes):
    x = randn(2 * rows[0], *rows[1:], classes).requires_grad_()
    with poisoned_memory():
        out = adamix_loss(x, torch.zeros(rows, dtype=torch.long, device=DEVICE), backend="triton")
        (grad,) = torch.autograd.grad(out.loss, x)
    assert [t.item() for t in out] == [0, 0, 0]
    assert grad.shape == x.shape


def test_nothing_labelled_gives_zeros():
    x = randn(6, 4).requires_grad_()
    out = adamix_loss(x, torch.full((3,), -100, device=DEVICE), backend="triton")
    assert [t.item() for t in out] == [0, 0, 0]
    assert torch.autograd.grad(out.loss, x)[0].eq(0).all()


def test_a_label_out_of_range_that_was_not_checked_gives_nan():
    labels = torch.tensor([1, 9], device=DEVICE)
    loss, *_ = triton_impl.adamix_forward(randn(4, 5), labels, None, None, 1.0, -100, 0.0, True)
    assert loss.isnan()


def test_sliced_logits_are_read_in_place_with_the_same_bits():
    whole, labels, mask = randn(4, 6, 9), draw_labels((2, 6), 9), draw_mask((2, 6))
    run = lambda x, *rest: gradients_of(adamix_loss(x, rest[0], mask=rest[1], backend="triton"), x)  # noqa: E731

    def gradients_of(out, x):
        return out.loss.detach(), *torch.autograd.grad(out.loss, x)

    sliced = whole[:, :-1].requires_grad_()
    dense = whole[:, :-1].detach().clone().requires_grad_()
    got = run(sliced, labels[:, 1:], mask[:, 1:])
    want = run(dense, labels[:, 1:].clone(), mask[:, 1:].clone())
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    rows = plan.make_rows(sliced[:2], sliced[2:], labels[:, 1:], mask[:, 1:])
    assert rows.a.data_ptr() == whole.data_ptr()
    turned = whole.transpose(0, -1).contiguous().transpose(0, -1)[:, :-1].requires_grad_()
    assert all(torch.equal(a, b) for a, b in zip(run(turned, labels[:, 1:], mask[:, 1:]), want))


@pytest.mark.parametrize("case", ["3 classes", "many rows of 100", "a whole tile", "steps and a rest"])
def test_the_same_bits_twice(case):
    rows, classes, _ = SHAPES[case]
    x, labels = randn(2 * rows[0], *rows[1:], classes).requires_grad_(), draw_labels(rows, classes)

    def run():
        out = adamix_loss(x, labels, backend="triton")
        return (*(t.detach() for t in out), *torch.autograd.grad(out.loss, x))

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("detach", [True, False])
def test_linear_loss_in_chunks(detach, dtype):
    labels, mask = draw_labels((3, 5), 33), draw_mask((3, 5))

    def loss(backend, hidden, head, bias):
        return linear_adamix_loss(
            hidden, head, labels, bias=bias, mask=mask, weight=0.5, label_smoothing=0.1, detach_target=detach,
            chunk_rows=4, backend=backend,
        )  # fmt: skip

    tensors = randn(6, 5, 8, dtype=dtype), randn(33, 8, dtype=dtype, scale=0.5), randn(33, dtype=dtype)
    gradients(loss, ["pair_rows_kernel"] * 4, *tensors)


def test_linear_loss_of_many_classes_and_of_frozen_heads():
    labels, hidden, head = draw_labels((3,), 4500), randn(6, 8), randn(4500, 8, scale=0.5)

    def loss(backend, x):
        return linear_adamix_loss(x, head.to(x.dtype), labels, chunk_rows=2, backend=backend)

    gradients(loss, ["pair_wide_kernel"] * 2, hidden)
    with torch.no_grad():
        torch.testing.assert_close(loss("triton", hidden), loss("reference", hidden))


@pytest.mark.parametrize("case", SHAPES)
def test_no_tensor_value_reaches_python(case):
    rows, classes, wanted = SHAPES[case]
    meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    logits, labels = meta(2 * rows[0], *rows[1:], classes), meta(*rows, dtype=torch.int64)
    with launches(triton_impl, run=False) as names:
        *_, stats, scales = triton_impl.adamix_forward(logits, labels, None, None, 1.0, -100, 0.1, False)
        triton_impl.adamix_backward(meta(), logits, labels, None, stats, scales, 1.0, -100, 0.1, False)
        head = meta(classes, 8)
        triton_impl.linear_forward(
            meta(2 * rows[0], *rows[1:], 8), head, None, labels, None, None, 1.0, -100, 0.0, True, 10**9,
            True, True, True,
        )  # fmt: skip
    assert names == [*wanted, "pair_wide_kernel" if wanted == WIDE else "pair_rows_kernel"]


@pytest.mark.parametrize(("begin", "gap"), [(0, 0), (0, 7), (1, 7), (5, 7), (5, 2)])
@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_rows_that_begin_anywhere(dtype, begin, gap):
    """Rows of an odd size, of both passes in one memory: equally far from 16-byte boundaries with a gap of 7."""
    shape = 3, 4099
    memory = randn(begin + gap + 2 * math.prod(shape), dtype=dtype)

    def loss(backend, x):
        a, b = (x[at:][: math.prod(shape)].view(shape) for at in (begin, begin + gap + math.prod(shape)))
        return consistency_loss(a, b, detach_target=begin == 0, backend=backend)

    x = memory[begin:][: math.prod(shape)].view(shape)
    y = memory[begin + gap + math.prod(shape) :].view(shape)
    assert plan.in_step(x, y, 16 // dtype.itemsize) == (gap == 7)
    gradients(loss, WIDE, memory, grad=2.0)


def test_labels_in_every_part_of_a_row():
    """Its head, steps, rest and edge; rows of odd size begin at every distance from a 16-byte boundary."""
    labels = torch.tensor([0, 4098, 1, 4097, 2, 4096, 5, 4095], device=DEVICE)
    for dtype in DTYPES:
        gradients(
            lambda backend, x: adamix_loss(x, labels, label_smoothing=0.1, backend=backend),
            WIDE, randn(16, 4099, dtype=dtype),
        )  # fmt: skip


def test_torch_compile_opcheck_and_autocast():
    labels = draw_labels((3, 4), 5)
    run = lambda x: adamix_loss(x, labels, backend="triton").loss  # noqa: E731
    torch._dynamo.reset()
    x = randn(6, 4, 5).requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(run(x), x)[0])
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(run(x), run(x).float())
    ops = torch.ops.adamix_kernels
    torch.library.opcheck(ops.adamix_loss.default, (x, labels, None, None, 1.0, -100, 0.0, True, "triton"))
    torch.library.opcheck(
        ops.consistency.default, (x, x.detach().clone().requires_grad_(), None, False, "batchmean", "triton")
    )


def test_float64_is_refused_and_auto_never_interprets():
    with pytest.raises(BackendUnavailableError, match="float16, bfloat16 and float32"):
        consistency_loss(randn(2, 3, dtype=torch.float64), randn(2, 3, dtype=torch.float64), backend="triton")
    chosen = _backends.select("consistency", "auto", "cpu", torch.float32)
    assert chosen.__name__.endswith("consistency.reference")
