"""The consistency losses on the C++/CUDA backend: strides, alignment, in place, the same bits."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import contextlib

import pytest
import torch
import torch._dynamo.testing
from cuda_host import DEVICE, DTYPES, ON_HOST, needs_cuda

needs_cuda()

from cuda_losses import (
    HOPPER,
    SHAPES,
    SMALL_AMPERE,
    TINY_HOPPER,
    draw_labels,
    draw_mask,
    gradients,
    pretend,
    randn,
)

from adamix_kernels.functional import adamix_loss, consistency_loss
from adamix_kernels.ops.consistency import cuda_impl
from reliability.fuzz_cuda import launches


@pytest.mark.parametrize(("classes", "device"), [(8, HOPPER), (9, HOPPER), (1032, TINY_HOPPER), (1031, SMALL_AMPERE)])
def test_strides_do_not_matter(classes, device, monkeypatch):
    """Rows are read where they lie. The order of their sums follows the 16-byte pieces that they lie in."""
    pretend(monkeypatch, device)
    whole, labels, mask = randn(4, 4, classes), draw_labels((2, 4), classes), draw_mask((2, 4))

    def run(x, labels, mask):
        x = x.detach().requires_grad_()
        out = adamix_loss(x, labels, mask=mask, backend="cuda")
        return out.loss.detach(), *torch.autograd.grad(out.loss, x)

    want = run(whole[:, :-1].clone(), labels[:, 1:].clone(), mask[:, 1:].clone())
    padded = torch.nn.functional.pad(whole, (3, 2, 0, 0))[..., 3:-2]
    turned = whole.transpose(0, -1).contiguous().transpose(0, -1)
    for layout in (whole, padded, turned):
        got = run(layout[:, :-1], labels[:, 1:], mask[:, 1:])
        if layout is not padded and classes % 8 == 0:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", range(980, 1000))
def test_a_row_that_counts_nothing_has_no_gradient_anywhere(classes, monkeypatch):
    """Where shared memory ends within the last piece of a row, or of one that begins elsewhere."""
    pretend(monkeypatch, SMALL_AMPERE)
    x = randn(2, classes).bfloat16().requires_grad_()
    loss = adamix_loss(x, torch.tensor([-100], device=DEVICE), backend="cuda").loss
    assert not torch.autograd.grad(loss, x)[0].any()


@pytest.mark.parametrize("device", [HOPPER, TINY_HOPPER, SMALL_AMPERE])
@pytest.mark.parametrize("offset", range(4))
def test_passes_at_any_distance_from_16_bytes(offset, device, monkeypatch):
    pretend(monkeypatch, device)
    b = randn(3 * 1030 + offset)[offset:].view(3, 1030)

    def loss(backend, a):
        return consistency_loss(a, b.to(a.dtype) if a.dtype != b.dtype else b, detach_target=False, backend=backend)

    gradients(loss, randn(3, 1030))


@pytest.mark.parametrize("case", ["3 classes", "many rows of 2", "many rows of 100", "4 blocks", "tail", "mostly tail"])
def test_the_same_bits_twice_and_in_any_order(case, monkeypatch):
    """On the CPU: of the blocks, and of the threads between two barriers."""
    rows, classes, device, _ = SHAPES[case]
    pretend(monkeypatch, device)
    x, labels = randn(2 * rows[0], *rows[1:], classes).requires_grad_(), draw_labels(rows, classes)

    def run(order):
        monkeypatch.setenv("ADAMIX_HOST_ORDER", order)
        out = adamix_loss(x, labels, detach_target=False, backend="cuda")
        return (*(t.detach() for t in out), *torch.autograd.grad(out.loss * 2, x))

    want = run("forward")
    for order in ("forward", "reverse", "3"):
        assert all(torch.equal(a, b) for a, b in zip(run(order), want, strict=True))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.sanitize)]
)
@pytest.mark.parametrize("case", ["3 classes", "many rows of 100", "4 blocks", "mostly tail"])
def test_in_place_the_gradient_takes_the_logits_place(case, dtype, monkeypatch):
    rows, classes, device, _ = SHAPES[case]
    pretend(monkeypatch, device)
    logits = randn(2 * rows[0], *rows[1:], classes, dtype=dtype)
    labels, mask = draw_labels(rows, classes), draw_mask(rows)

    def run(inplace, grad):
        leaf = logits.clone().requires_grad_()
        x = torch.nn.functional.pad(leaf * 1, (1, 2))[..., 1:-2] if inplace else leaf
        out = adamix_loss(x, labels, mask=mask, detach_target=False, inplace=inplace, backend="cuda")
        return out.loss.detach(), *torch.autograd.grad(out.loss * grad, leaf)

    for grad in (1.0, 64.0):
        for got, want in zip(run(True, grad), run(False, grad), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6)


def test_in_place_through_logits_without_contiguous_rows():
    leaf, labels = randn(6, 9), draw_labels((3,), 9)

    def run(inplace):
        x = leaf.clone().requires_grad_()
        out = adamix_loss((x * 1).t().contiguous().t(), labels, inplace=inplace, backend="cuda")
        return out.loss.detach(), *torch.autograd.grad(out.loss * 2, x)

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_a_correction_leaves_the_gradient_alone_where_the_incoming_one_is_1():
    logits, labels = randn(6, 40), draw_labels((3,), 40)
    options = 1.0, -100, 0.0, True
    out = torch.full_like(logits, 7.0)
    *_, stats, scales = cuda_impl.adamix_forward(logits, labels, None, None, *options)
    one = torch.ones((), device=DEVICE)
    assert cuda_impl.adamix_backward(one, logits, labels, None, stats, scales, *options, out, 1.0).eq(7).all()
    twice = cuda_impl.adamix_backward(2 * one, logits, labels, None, stats, scales, *options, out, 1.0)
    torch.testing.assert_close(twice, 2 * cuda_impl.adamix_backward(one, logits, labels, None, stats, scales, *options))
    cuda_impl.rescale(out, one)
    assert torch.equal(out, twice)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["3 classes", "many rows of 100", "a block", "4 blocks", "mostly tail"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_forward_writes_the_gradient_that_is_expected(inplace, case, dtype, monkeypatch):
    """The same bits whether the guess is right or wrong; in place a wrong one costs a rounding."""
    rows, classes, device, _ = SHAPES[case]
    pretend(monkeypatch, device)
    logits, labels = randn(2 * rows[0], *rows[1:], classes, dtype=dtype), draw_labels(rows, classes)

    def run(expected, grad):
        leaf = logits.clone().requires_grad_()
        x = leaf * 1 if inplace else leaf
        with launches() if ON_HOST else contextlib.nullcontext([]) as kernels:
            out = adamix_loss(
                x, labels, label_smoothing=0.1, detach_target=False, inplace=inplace, expected_grad=expected,
                backend="cuda",
            )  # fmt: skip
            (got,) = torch.autograd.grad(out.loss * grad, leaf)
        return got, kernels

    want, _ = run(None, 640.0)
    for expected in (640.0, 2.0):
        got, kernels = run(expected, 640.0)
        if inplace:
            torch.testing.assert_close(got, want, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-4)
        else:
            assert torch.equal(got, want)
        if ON_HOST:
            assert kernels.count("pair_loss_kernel") == 1


def test_an_expected_gradient_is_written_once():
    logits, labels, out = randn(6, 40, dtype=torch.float16), draw_labels((3,), 40), torch.empty(6, 40).half()
    options = 1.0, -100, 0.0, True
    out = out.to(logits.device)
    *_, stats, scales = cuda_impl.adamix_forward_grad(logits, labels, None, None, *options, 1024.0, out)
    want, grad = out.clone(), torch.tensor(1024.0, device=DEVICE)
    out.fill_(7)
    cuda_impl.adamix_backward(grad, logits, labels, None, stats, scales, *options, out, 1024.0)
    assert out.eq(7).all()
    cuda_impl.adamix_backward(grad, logits, labels, None, stats, scales, *options, out, 512.0)
    assert torch.equal(out, want)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("classes", "device"), [(100, HOPPER), (1031, HOPPER), (1031, TINY_HOPPER), (1031, SMALL_AMPERE)]
)
def test_gradients_that_lie_otherwise_than_the_logits(classes, device, dtype, monkeypatch):
    """Rows of logits[:, :-1] and of two passes with an odd number of logits each, in place and not."""
    pretend(monkeypatch, device)
    logits, labels = randn(2, 4, classes, dtype=dtype), draw_labels((1, 3), classes)
    want = None
    for part in (logits[:, :-1], logits[:, :-1].clone()):
        for inplace in (False, True):
            leaf = part.detach().requires_grad_()
            x = torch.nn.functional.pad(leaf * 1, (0, 0, 0, 1))[:, :-1] if inplace else leaf
            out = adamix_loss(x, labels, inplace=inplace, expected_grad=64.0, backend="cuda")
            (got,) = torch.autograd.grad(out.loss * 64, leaf)
            want = got if want is None else want
            torch.testing.assert_close(got, want, rtol=2e-3 if dtype.itemsize == 2 else 1e-5, atol=1e-5)
    gradients(lambda backend, x: adamix_loss(x[:, :-1], labels, backend=backend), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 7, 1031])
def test_rescaling_in_place(classes, dtype):
    x, by = randn(3, 5, classes + 3, dtype=dtype), torch.tensor(0.3, device=DEVICE)
    for part in (x[:, 1:, 1:-2], x.transpose(0, 1)):
        want = (part.float() * by).to(dtype)
        cuda_impl.rescale(part, by)
        assert torch.equal(part, want)
