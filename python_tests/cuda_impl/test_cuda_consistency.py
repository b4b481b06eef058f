"""The consistency losses on the C++/CUDA backend: values and gradients (see cuda_host.py)."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
import torch._dynamo.testing
from cuda_host import DEVICE, DTYPES, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_size import pairs

needs_cuda()

from cuda_losses import (
    HOPPER,
    SHAPES,
    SMALL_AMPERE,
    TINY_HOPPER,
    draw_labels,
    draw_mask,
    gradients,
    path_of,
    pretend,
    randn,
)
from loss_cases import check_a_masked_vocabulary, check_nan_and_infinities, one_pass_consistency
from poison import poisoned_memory

from adamix_kernels.functional import adamix_loss, consistency_loss, linear_adamix_loss
from adamix_kernels.ops.consistency import cuda_impl


@pairs(case=SHAPES, detach=[True, False], dtype=DTYPES)
def test_adamix_loss_and_its_gradient(case, detach, dtype, monkeypatch):
    rows, classes, device, way = SHAPES[case]
    pretend(monkeypatch, device)
    assert dtype != torch.float32 or path_of(rows, classes, dtype, device) == way
    labels, mask = draw_labels(rows, classes), draw_mask(rows)

    def loss(backend, logits):
        return adamix_loss(
            logits, labels, weight=0.7, label_smoothing=0.1, mask=mask, detach_target=detach, backend=backend
        )

    gradients(loss, randn(2 * rows[0], *rows[1:], classes, dtype=dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("rows", "classes", "device", "dtype"),
    [
        ((5, 7), 9, HOPPER, torch.float32),
        ((3, 3), 101, HOPPER, torch.float16),
        ((3,), 1027, HOPPER, torch.bfloat16),
        ((1, 3), 1031, TINY_HOPPER, torch.float32),
        ((3,), 1031, SMALL_AMPERE, torch.float32),
        ((1,), 5003, SMALL_AMPERE, torch.float32),
    ],
)
def test_memory_and_barriers(rows, classes, device, dtype, monkeypatch):
    pretend(monkeypatch, device)
    labels, mask = draw_labels(rows, classes), draw_mask(rows)
    run = lambda backend, x: adamix_loss(  # noqa: E731
        x, labels, label_smoothing=0.1, mask=mask, detach_target=False, backend=backend
    )
    gradients(run, randn(2 * rows[0], *rows[1:], classes, dtype=dtype), grad=2.0)


@pytest.mark.parametrize("options", [{}, {"num_items": 11}, {"weight": 0.0}, {"ignore_index": 1}])
def test_options(options):
    labels = torch.randint(5, (6, 4), device=DEVICE)
    gradients(lambda backend, x: adamix_loss(x, labels, backend=backend, **options), randn(12, 4, 5), grad=3.0)


@pytest.mark.parametrize("dtype", [
    torch.int32, torch.int64, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.uint16,
    torch.uint32, torch.float8_e5m2,
])  # fmt: skip
def test_the_number_of_items_of_any_dtype(dtype):
    labels, items = torch.randint(5, (6,), device=DEVICE), torch.tensor(12, device=DEVICE)
    got = adamix_loss(x := randn(12, 5), labels, num_items=items.to(dtype), backend="cuda")
    torch.testing.assert_close(got, adamix_loss(x, labels.int(), num_items=items, backend="reference"))


@pairs(
    case=["3 classes", "many rows of 100", "2 blocks", "tail"],
    detach=[True, False], reduction=["batchmean", "sum", "none"], dtype=DTYPES[::2],
)  # fmt: skip
def test_consistency_loss_and_its_gradients(case, detach, reduction, dtype, monkeypatch):
    rows, classes, device, _ = SHAPES[case]
    pretend(monkeypatch, device)
    mask = draw_mask(rows)

    def loss(backend, a, b):
        return consistency_loss(a, b, mask=mask, detach_target=detach, reduction=reduction, backend=backend)

    tensors = randn(*rows, classes, dtype=dtype), randn(*rows, classes, dtype=dtype)
    gradients(loss, *tensors, grad=1.0 if detach else 3.0)


def test_no_rows_axis_no_mask_and_one_gradient_alone():
    gradients(lambda backend, a, b: consistency_loss(a, b, backend=backend), randn(9), randn(9))
    other = randn(4, 70)
    for first in (True, False):

        def loss(backend, x, first=first):
            pair = (x, other.to(x.dtype)) if first else (other.to(x.dtype), x)
            return consistency_loss(*pair, detach_target=False, backend=backend)

        gradients(loss, randn(4, 70))


@settings(max_examples=12)
@given(data=st.data())
def test_any_shape(data):
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    rows, classes, dtype = (pick(1, 5), pick(1, 7)), pick(1, 300), data.draw(st.sampled_from(DTYPES))
    smoothing, detach = data.draw(st.sampled_from([0.0, 0.2])), data.draw(st.booleans())
    labels = draw_labels(rows, classes)
    grad = data.draw(st.sampled_from([1.0, -0.5]))

    def loss(backend, x):
        return adamix_loss(x, labels, label_smoothing=smoothing, detach_target=detach, backend=backend)

    gradients(loss, randn(2 * rows[0], rows[1], classes, dtype=dtype), grad=grad)


@pytest.mark.parametrize(("classes", "device"), [(7, HOPPER), (3001, TINY_HOPPER), (3001, SMALL_AMPERE)])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("kind", ["huge", "shifted", "close"])
def test_large_logits_stay_exact(kind, detach, classes, device, monkeypatch):
    pretend(monkeypatch, device)
    a = randn(2, classes)
    b = {"huge": randn(2, classes, scale=5e3), "shifted": a + 9000, "close": a + randn(2, classes, scale=1e-2)}[kind]
    a = randn(2, classes, scale=5e3).clamp(-1e4, 1e4) if kind == "huge" else a
    labels = torch.randint(classes, (2,), device=DEVICE)

    def loss(backend, x):
        return adamix_loss(x, labels, label_smoothing=0.1, detach_target=detach, backend=backend)

    logits = torch.cat([a, b.clamp(-1e4, 1e4)])
    assert loss("cuda", logits).loss.isfinite()
    gradients(loss, logits, same_form={2: one_pass_consistency})


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize(
    ("classes", "device", "which"),
    [
        (37, HOPPER, 5),
        (900, HOPPER, 5),
        (9001, HOPPER, 8002),
        (5003, TINY_HOPPER, 4002),
        (9001, SMALL_AMPERE, 5),
        (9001, SMALL_AMPERE, 8002),
    ],
)
def test_a_logit_of_1e38_does_not_make_the_loss_overflow(classes, device, which, dtype, detach, monkeypatch):
    """Its gaps of 1e38 to all other logits add up to more than a float32 holds."""
    pretend(monkeypatch, device)
    a, b = randn(2, classes, dtype=dtype), randn(2, classes, dtype=dtype)
    a[0, which] = 1e38
    found = {}
    for backend in ("cuda", "reference"):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        loss = consistency_loss(*leaves, detach_target=detach, backend=backend)
        found[backend] = loss.detach(), *torch.autograd.grad(loss, leaves)
    assert found["cuda"][0].isfinite()
    torch.testing.assert_close(found["cuda"], found["reference"], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("scale", [1e3, 1e6, 3e9, 1e20])
@pytest.mark.parametrize(
    ("classes", "device"), [(33, HOPPER), (900, HOPPER), (2050, TINY_HOPPER), (5003, SMALL_AMPERE)]
)
def test_large_logits_have_the_gradient_of_their_powers(classes, device, scale, detach, monkeypatch):
    """A power's lift is rounded to 2^-24 of the largest logit."""
    pretend(monkeypatch, device)
    # Eight pairs: both passes' rows begin alike, and whole blocks take the fastest way.
    logits, labels = scale + scale * 0.3 * randn(16, classes), draw_labels((8,), classes)
    found = {}
    for backend in ("cuda", "reference"):
        leaf = logits.bfloat16().requires_grad_()
        out = adamix_loss(leaf, labels, detach_target=detach, backend=backend)
        found[backend] = out.loss.detach(), *torch.autograd.grad(out.loss, leaf)
    torch.testing.assert_close(found["cuda"], found["reference"], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize(("classes", "rows"), [(37, 300), (400, 11), (4000, 5)])
def test_a_full_gradient_of_near_passes_sums_to_nothing(classes, rows):
    """Softmax's derivative has rows that sum to 0, here to the rounding of elements that all but cancel."""
    near = randn(rows, classes)
    leaves = [near.requires_grad_(), (near.detach() + 1e-5 * randn(rows, classes)).requires_grad_()]
    loss = consistency_loss(*leaves, detach_target=False, backend="cuda")
    for grad in torch.autograd.grad(loss, leaves):
        assert grad.double().sum(-1).abs().max() < 0.01 * grad.abs().max()


@pytest.mark.parametrize("detach", [True, False])
def test_a_part_that_counts_nothing_leaves_no_nan(detach, monkeypatch):
    """A block holds none but masked classes, and so does one thread of the row's tail."""
    pretend(monkeypatch, SMALL_AMPERE)
    logits = 3 * randn(4, 2050)
    logits[:, :683] = -torch.inf
    labels = torch.tensor([683, 2049], device=DEVICE)
    losses = [adamix_loss(logits, labels, detach_target=detach, backend=b).loss for b in ("cuda", "reference")]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("classes", "device"), [(7, HOPPER), (90, HOPPER), (2050, TINY_HOPPER), (3001, SMALL_AMPERE)])
def test_a_masked_vocabulary_adds_nothing(classes, device, detach, monkeypatch):
    """-inf in both passes, here in whole blocks and at the front."""
    pretend(monkeypatch, device)
    check_a_masked_vocabulary(randn(4, classes), detach, "cuda")


@pytest.mark.parametrize(("classes", "device"), [(5, HOPPER), (200, HOPPER), (1500, TINY_HOPPER), (1500, SMALL_AMPERE)])
def test_nan_gives_nan_and_what_is_masked_may_hold_it(classes, device, monkeypatch):
    pretend(monkeypatch, device)
    check_nan_and_infinities(randn(8, classes), "cuda")


@pytest.mark.parametrize("rows", [(0,), (0, 3), (2, 0)])
def test_no_rows_no_loss(rows):
    x = randn(2 * rows[0], *rows[1:], 5).requires_grad_()
    with poisoned_memory():
        out = adamix_loss(x, torch.zeros(rows, dtype=torch.long, device=DEVICE), backend="cuda")
        (grad,) = torch.autograd.grad(out.loss, x)
    assert [t.item() for t in out] == [0, 0, 0]
    assert grad.shape == x.shape
    assert consistency_loss(x, x, reduction="none", backend="cuda").shape == x.shape[:-1]


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_nothing_labelled_gives_zeros(dtype):
    x = randn(6, 4, dtype=dtype).requires_grad_()
    out = adamix_loss(x, torch.full((3,), -100, device=DEVICE), backend="cuda")
    assert [t.item() for t in out] == [0, 0, 0]
    assert torch.autograd.grad(out.loss, x)[0].eq(0).all()


def test_a_label_out_of_range_that_was_not_checked_gives_nan():
    labels = torch.tensor([1, 2**32], device=DEVICE)
    loss, *_ = cuda_impl.adamix_forward(randn(4, 5), labels, None, None, 1.0, -100, 0.0, True)
    assert loss.isnan()


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
    gradients(loss, *tensors)


@pytest.mark.parametrize("device", [TINY_HOPPER, SMALL_AMPERE])
def test_linear_loss_of_many_classes_and_of_frozen_heads(device, monkeypatch):
    pretend(monkeypatch, device)
    labels, hidden, head = draw_labels((3,), 2051), randn(6, 8), randn(2051, 8, scale=0.5)

    def loss(backend, x):
        return linear_adamix_loss(x, head.to(x.dtype), labels, chunk_rows=2, backend=backend)

    gradients(loss, hidden)
    with torch.no_grad():
        torch.testing.assert_close(loss("cuda", hidden), loss("reference", hidden))


def test_finite_differences():
    logits, labels = randn(4, 3, 5), draw_labels((2, 3), 5)
    run = lambda x: adamix_loss(x, labels, detach_target=False, backend="cuda").loss  # noqa: E731
    x = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(run(x), x)
    direction = randn(*logits.shape, scale=1.0)
    step = 1e-2
    slope = (run(logits + step * direction) - run(logits - step * direction)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=2e-3, atol=1e-4)
