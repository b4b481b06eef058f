"""inplace=True of adamix_loss and consistency_loss: the gradient takes the logits' memory, on every backend here."""

import importlib.util

import pytest
import torch
from plain_losses import adamix
from triton_spy import DEVICE, GPU, INTERPRET

from adamix_kernels.functional import adamix_loss, consistency_loss
from adamix_kernels.modules.loss import AdaMixLoss

TRITON = importlib.util.find_spec("triton") is not None and (INTERPRET or GPU)
BACKENDS = ["reference"] + ["triton"] * TRITON
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = [pytest.mark.parametrize("backend", BACKENDS), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
LABELS = torch.tensor([[0, 3, -100], [1, 1, 4]], device=DEVICE)


def source(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2).to(dtype).to(DEVICE).requires_grad_()


LAYOUTS = {
    "whole": lambda x: x * 1,
    "sliced": lambda x: (x * 1)[:, :3],
    "turned": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_gradient_and_losses_are_the_same_and_lie_where_the_logits_lay(backend, layout, scale):
    x = source(4, 4 if layout == "sliced" else 3, 5)
    options = dict(weight=0.7, label_smoothing=0.1, detach_target=False, backend=backend)
    logits = LAYOUTS[layout](x)
    want = adamix_loss(logits, LABELS, **options)
    (wanted,) = torch.autograd.grad(want.loss * scale, logits)
    logits, seen = LAYOUTS[layout](x), []
    logits.register_hook(seen.append)
    got = adamix_loss(logits, LABELS, inplace=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert not got.consistency.requires_grad
    (got.loss * scale).backward()
    torch.testing.assert_close(seen[0], wanted)
    assert seen[0].data_ptr() == logits.data_ptr()
    assert torch.equal(seen[0], logits)
    (through,) = torch.autograd.grad(LAYOUTS[layout](x), x, wanted)
    torch.testing.assert_close(x.grad, through)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_and_no_underflow(backend, dtype):
    """float16, under a loss scale, is rounded twice, and has the gradient of a mean over very many rows."""
    labels, items, scale = LABELS.clamp_min(0), 2**22, 65536.0 if dtype == torch.float16 else 1.0
    x = source(4, 3, 5, dtype=dtype)
    out = adamix_loss(x * 1, labels, num_items=items, weight=3.0, inplace=True, backend=backend)
    (got,) = torch.autograd.grad(out.loss * scale, x)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(adamix(wide, labels, num_items=items, weight=3.0)[0] * scale, wide)
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() * (2 if dtype == torch.float16 else 1)
    assert ((got.double() - exact).abs() <= rounding + 1e-6 * exact.abs().max()).all()


def test_only_what_needs_a_gradient_is_overwritten(backend):
    a, b = source(6, 5), source(6, 5, seed=1).detach()
    kept = b.clone()
    for detach in (True, False):
        want = consistency_loss(a, b, detach_target=detach, backend=backend)
        logits = a * 1
        got = consistency_loss(logits, b, detach_target=detach, inplace=True, backend=backend)
        assert torch.equal(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, a), torch.autograd.grad(want, a))
        assert torch.equal(b, kept)
        got = consistency_loss(b, a * 1, detach_target=detach, inplace=True, backend=backend)
        want = torch.autograd.grad(consistency_loss(b, a, detach_target=detach, backend=backend), a)
        torch.testing.assert_close(torch.autograd.grad(got, a), want)
        assert torch.equal(b, kept)
    logits = a * 1
    both = consistency_loss(logits[:3], logits[3:], reduction="sum", inplace=True, backend=backend)
    want = consistency_loss(a[:3], a[3:], reduction="sum", backend=backend)
    torch.testing.assert_close(torch.autograd.grad(both, a), torch.autograd.grad(want, a))
    with torch.no_grad():
        consistency_loss(kept, b, inplace=True, backend=backend)
        adamix_loss(b[:, None].expand(6, 1, 5), LABELS[:1].t(), inplace=True, backend=backend)
    assert torch.equal(b, kept)


def test_misuse_is_autograds_to_report(backend):
    x = source(4, 3, 5)
    out = adamix_loss(x.exp(), LABELS, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()
    logits = x * 1
    first = adamix_loss(logits, LABELS, backend=backend)
    adamix_loss(logits, LABELS, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.loss.backward()
    logits = x * 1
    out = adamix_loss(logits, LABELS, inplace=True, backend=backend)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()
    logits = x * 1
    out = adamix_loss(logits, LABELS, inplace=True, backend=backend)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace: got a second backward"):
        out.loss.backward()


def test_what_cannot_be_overwritten_is_named_before_anything_is_changed(backend):
    x = source(4, 3, 5)
    before = x.detach().clone()
    grown = (x[:, :, :1] * 1).expand(4, 3, 5)
    for logits in (x, x.view(4, 3, 5), x[:, :], grown):
        with pytest.raises(ValueError, match=r"^logits: got .* expected .*inplace=True"):
            adamix_loss(logits, LABELS, inplace=True, backend=backend)
    flat = (x * 1).flatten()
    for a, b in ((flat[:10], flat[5:15]), (flat[5:15], flat[:10]), (flat, flat)):
        with pytest.raises(ValueError, match=r"^logits_[ab]: got memory that overlaps"):
            consistency_loss(a, b, inplace=True, backend=backend)
    with pytest.raises(ValueError, match=r'^inplace: got True, expected False with reduction="none"'):
        consistency_loss(x * 1, x * 1, reduction="none", inplace=True, backend=backend)
    with pytest.raises(IndexError, match="labels: got class 5"):
        adamix_loss(x * 1, torch.where(LABELS == 4, 5, LABELS), inplace=True, backend=backend)
    assert torch.equal(x, before)


def test_without_rows_and_in_compiled_code(backend):
    empty = source(0, 5)
    out = adamix_loss(empty * 1, LABELS.new_empty(0), inplace=True, backend=backend)
    out.loss.backward()
    assert out.loss.item() == 0
    assert empty.grad.shape == (0, 5)
    x = source(4, 3, 5)
    module = AdaMixLoss(inplace=True, backend=backend)
    assert "inplace=True" in repr(module)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: module(x * 1, LABELS).loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(module(x * 1, LABELS).loss, x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), want)
