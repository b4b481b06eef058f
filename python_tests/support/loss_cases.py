"""What the tests of every backend of the consistency losses draw, and what each must do with -inf and NaN."""

import math

import torch

from adamix_kernels.functional import adamix_loss

INF = float("inf")
# How many times PyTorch's own error a loss or a gradient may err; of how many draws that is the worst.
MULTIPLE, TURNS = 8.0, 4


def randn(device, *shape, dtype=torch.float32, scale=2.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).to(device)


def draw_labels(device, rows, classes):
    labels = torch.randint(classes, rows)
    labels[torch.rand(rows) < 0.2] = -100
    return labels.to(device)


def draw_mask(device, rows):
    return (torch.rand(rows) < 0.7).to(device)


def one_pass_consistency(logits):
    """J of [2B, ..., V] as a kernel forms it that reads once: half of E_p c - E_q c, c being d plus a row's constant.

    The two means cancel to what the reference adds up term by term, so where p is nearly q their roundings are J's
    error, in PyTorch too.
    """
    (a, p), (b, q) = ((x - x.amax(-1, keepdim=True), x.softmax(-1)) for x in logits.chunk(2))
    return (((p * (a - b)).sum(-1) - (q * (a - b)).sum(-1)) / 2).mean()


def check_errors(found, plain, *tensors, same_form=None):
    """found(*tensors) errs against float64 as plain does in the same dtype, or by a spacing of the largest number.

    One error of a scalar is luck and may be nothing: plain's is the worst over the classes turned round a few times.
    same_form: {number of an output: function} that computes it in the kernels' form; its errors count as plain's.
    """
    exact = plain(*(t.double() for t in tensors))
    units = [0.0] * len(exact)
    for turned in ([t.roll(places, -1) for t in tensors] for places in range(TURNS)):
        wanted = plain(*(t.double() for t in turned))
        errors = [_error(own, want) for own, want in zip(plain(*turned), wanted, strict=True)]
        units = [max(unit, error) if math.isfinite(error) else unit for unit, error in zip(units, errors, strict=True)]
        for number, function in (same_form or {}).items():
            units[number] = max(units[number], _error(function(*turned), wanted[number]))
    for number, (result, want, unit) in enumerate(zip(found(*tensors), exact, units, strict=True)):
        assert result.shape == want.shape
        spacing = torch.finfo(result.dtype).eps * want.abs().max().item() if want.numel() else 0.0
        error, budget = _error(result, want), MULTIPLE * unit + spacing
        assert error <= budget, f"output {number}: error {error:.3e}, PyTorch's own {unit:.3e}, budget {budget:.3e}"


def _error(result, want):
    return (result.double() - want).abs().max().item() if want.numel() else 0.0


def check_a_masked_vocabulary(kept, detach, backend):
    """As many classes of -inf in front of `kept` [2B, V], in both passes, change nothing and get no gradient."""
    classes = kept.shape[1]
    wide = torch.full((len(kept), 2 * classes), -INF, device=kept.device)
    wide[:, classes:] = kept
    labels = torch.randint(classes, (len(kept) // 2,), device=kept.device)
    run = lambda x, y: adamix_loss(x, y, detach_target=detach, backend=backend)  # noqa: E731
    want, got = kept.requires_grad_(), wide.requires_grad_()
    a, b = run(want, labels), run(got, labels + classes)
    torch.testing.assert_close(b, a)
    ga, gb = torch.autograd.grad(a.loss, want)[0], torch.autograd.grad(b.loss, got)[0]
    torch.testing.assert_close(gb[:, classes:], ga)
    assert gb[:, :classes].eq(0).all()


def check_nan_and_infinities(logits, backend):
    """In logits [8, V]: NaN gives NaN, a masked row may hold it, one class of -inf in one pass gives infinity."""
    labels = torch.randint(logits.shape[1], (4,), device=logits.device)
    logits[5, 2] = float("nan")
    assert adamix_loss(logits, labels, backend=backend).loss.isnan()
    mask = torch.tensor([True, False, True, True], device=logits.device)
    x = logits.clone().requires_grad_()
    out = adamix_loss(x, labels, mask=mask, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, x)
    assert out.loss.isfinite()
    assert grad[[1, 5]].eq(0).all()
    assert grad.isfinite().all()
    logits[5] = -INF
    assert adamix_loss(logits, labels, backend=backend).loss.isnan()
    logits[5], logits[1, 0] = 0.0, -INF
    assert adamix_loss(logits, labels * 0 + 1, backend=backend).consistency == INF
    logits[1, 0] = INF
    assert adamix_loss(logits, labels * 0 + 1, backend=backend).loss.isnan()
