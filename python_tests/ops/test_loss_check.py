"""ADAMIX_CHECK=1: a loss that is not finite names argument, pass, row and column; without it, NaN stays silent."""

import importlib.util

import pytest
import torch
from triton_spy import DEVICE, GPU, INTERPRET

from adamix_kernels.functional import adamix_loss, consistency_loss, linear_adamix_loss

TRITON = importlib.util.find_spec("triton") is not None and (INTERPRET or GPU)
BACKENDS = ["reference"] + ["triton"] * TRITON
pytestmark = [pytest.mark.parametrize("backend", BACKENDS), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
INF, NAN = float("inf"), float("nan")
LABELS = torch.tensor([[0, 3, -100], [1, 1, 4]], device=DEVICE)


@pytest.fixture(autouse=True)
def _checked(monkeypatch):
    monkeypatch.setenv("ADAMIX_CHECK", "1")


def logits(*changes):
    x = torch.linspace(-2, 2, 60, device=DEVICE).view(4, 3, 5).clone()
    for at, value in changes:
        x[at] = value
    return x


ADAMIX = [
    ([((0, 1, 2), NAN)], r"^logits: got nan in pass 1, row \(0, 1\), column 2, expected numbers"),
    ([((3, 2, 4), INF), ((3, 2, 1), NAN)], r"^logits: got nan in pass 2, row \(1, 2\), column 1"),
    ([((2, 0), -INF)], r"^logits: got -inf in pass 2, row \(0, 0\), column 0, expected numbers, or -inf for some"),
    ([((1, 0, 3), -INF)], r"^logits: got -inf in pass 1, row \(1, 0\), column 3, expected -inf in both passes"),
    ([((3, 0, 3), -INF)], r"^logits: got -inf in pass 2, row \(1, 0\), column 3, expected -inf in both passes"),
    (
        [((1, 0, 1), -INF), ((3, 0, 1), -INF)],
        r"^logits: got -inf in pass 1, row \(1, 0\), column 1.*logit of the label",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ADAMIX)
@pytest.mark.parametrize("inplace", [False, True])
def test_adamix_loss(changes, message, inplace, backend, monkeypatch):
    x = logits(*changes).requires_grad_()
    given = x * 1
    with pytest.raises(FloatingPointError, match=message):
        adamix_loss(given, LABELS, inplace=inplace, backend=backend)
    torch.testing.assert_close(given, x, equal_nan=True)
    monkeypatch.delenv("ADAMIX_CHECK")
    assert not adamix_loss(given, LABELS, inplace=inplace, backend=backend).loss.isfinite()


def test_what_is_legal_says_nothing(backend):
    closed = [((slice(None), slice(None), 2), -INF), ((0, 2), NAN), ((3, 0), INF)]
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]], device=DEVICE)
    x = logits(*closed).requires_grad_()
    out = adamix_loss(x, LABELS, mask=mask, backend=backend)
    assert out.loss.isfinite()
    assert torch.autograd.grad(out.loss, x)[0].isfinite().all()
    for reduction in ("batchmean", "none"):
        assert consistency_loss(x[:2], x[2:], mask=mask, reduction=reduction, backend=backend).isfinite().all()


def test_smoothing_over_a_closed_class_is_named(backend):
    x = logits(((slice(None), slice(None), 2), -INF))
    with pytest.raises(FloatingPointError, match=r"pass 1, row \(0, 0\), column 2, .*label_smoothing"):
        adamix_loss(x, LABELS, label_smoothing=0.1, backend=backend)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_consistency_loss(reduction, backend):
    for name, number in (("logits_a", 1), ("logits_b", 2)):
        pair = dict(logits_a=logits()[:2], logits_b=logits()[2:])
        pair[name][1, 2, 3] = NAN
        with pytest.raises(FloatingPointError, match=rf"^{name}: got nan in pass {number}, row \(1, 2\), column 3"):
            consistency_loss(**pair, reduction=reduction, backend=backend)


def test_linear_adamix_loss(backend):
    def run(change=None, dtype=torch.float32):
        tensors = dict(hidden=logits()[:, :, :4] / 2, lm_head_weight=logits().view(12, 5)[:5, :4], bias=logits()[0, 0])
        tensors = {name: t.to(dtype).clone() for name, t in tensors.items()}
        if change:
            name, at, value = change
            tensors[name][at] = value
        return linear_adamix_loss(labels=LABELS, chunk_rows=2, backend=backend, **tensors).loss

    assert run().isfinite()
    assert run(("hidden", (0, 2, 1), NAN)).isfinite()
    assert run(("bias", 2, -INF)).isfinite()
    with pytest.raises(
        FloatingPointError, match=r"^hidden: got nan in pass 2, row \(1, 1\), column 3, expected finite"
    ):
        run(("hidden", (3, 1, 3), NAN))
    with pytest.raises(FloatingPointError, match=r"^lm_head_weight: got inf at \(2, 1\), expected finite"):
        run(("lm_head_weight", (2, 1), INF))
    with pytest.raises(FloatingPointError, match=r"^bias: got nan at \(4,\)"):
        run(("bias", 4, NAN))
    with pytest.raises(FloatingPointError, match=r"expected logits that torch.float16 can hold"):
        run(("hidden", (0, 0), 6e4), torch.float16)


def test_regression(backend):
    if backend != "reference":
        pytest.skip("regression has one implementation")
    x, y = torch.ones(4, 1), torch.ones(2)
    assert adamix_loss(x, y).loss == 0
    with pytest.raises(FloatingPointError, match=r"^logits: got nan in pass 2, row \(1,\), column 0"):
        adamix_loss(torch.tensor([1.0, 1.0, 1.0, NAN]), y)
    with pytest.raises(FloatingPointError, match=r"^labels: got inf in pass 1, row \(0,\)"):
        adamix_loss(x, torch.tensor([INF, 1.0]))
