"""adamix_loss and AdaMixLoss on the reference backend, against F.cross_entropy and F.kl_div."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from plain_losses import adamix, checkable, frozen
from torch._dynamo.testing import CompileCounterWithBackend

from adamix_kernels._backends import BackendUnavailableError
from adamix_kernels.functional import AdaMixLossOutput, adamix_loss, consistency_loss
from adamix_kernels.modules.loss import AdaMixLoss
from adamix_kernels.testing import assert_in_budget

OP = torch.ops.adamix_kernels.adamix_loss.default
BACKWARD = torch.ops.adamix_kernels.adamix_loss_backward.default


def batch(*rows, classes=5, dtype=torch.double, scale=2.0, unlabelled=0.3):
    """Logits [2B, ..., V] that require grad, labels [B, ...] some of them -100, mask [B, ...]."""
    logits = (torch.randn(2 * rows[0], *rows[1:], classes, dtype=dtype) * scale).requires_grad_()
    labels = torch.where(torch.rand(rows) < unlabelled, -100, torch.randint(classes, rows))
    return logits, labels, torch.rand(rows) < 0.7


@pytest.mark.parametrize("rows", [(6,), (3, 4)], ids=["sample", "token"])
@pytest.mark.parametrize("classes", [1, 2, 3, 50])
@pytest.mark.parametrize("detach_target", [True, False])
def test_value_and_gradients_match_pytorch(rows, classes, detach_target):
    logits, labels, mask = batch(*rows, classes=classes)
    labels.view(-1)[:2], mask.view(-1)[:2] = 0, True
    for smoothing, chosen, items in itertools.product((0.0, 0.1, 1.0), (None, mask, mask.int()), (None, 7)):
        options = dict(label_smoothing=smoothing, mask=chosen, num_items=items, detach_target=detach_target)
        got = adamix_loss(logits, labels, weight=2.5, **options)
        want = adamix(logits, labels, weight=2.5, **options)
        torch.testing.assert_close(tuple(got), want)
        torch.testing.assert_close(torch.autograd.grad(got.loss, logits), torch.autograd.grad(want[0], logits))
        assert not got.cross_entropy.requires_grad
        assert not got.consistency.requires_grad


def test_the_parts_are_the_public_losses():
    logits, labels, _ = batch(4, 3, unlabelled=0)
    out = adamix_loss(logits, labels, weight=3.0, label_smoothing=0.2)
    assert isinstance(out, AdaMixLossOutput)
    want = F.cross_entropy(logits[:4].flatten(0, 1), labels.flatten(), label_smoothing=0.2)
    torch.testing.assert_close(out.cross_entropy, want.detach())
    torch.testing.assert_close(out.consistency, consistency_loss(logits[:4], logits[4:]).detach())
    torch.testing.assert_close(out.loss.detach(), out.cross_entropy + 3 * out.consistency)


@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1, num_items=3)])
def test_gradcheck(options):
    logits, labels, mask = batch(2, 3, classes=4)
    run = lambda x: adamix_loss(x, labels, weight=1.7, mask=mask, detach_target=False, **options).loss  # noqa: E731
    assert torch.autograd.gradcheck(run, logits)
    no_consistency = lambda x: adamix_loss(x, labels, weight=0, **options).loss  # noqa: E731
    assert torch.autograd.gradcheck(no_consistency, logits)


@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1)])
def test_gradcheck_with_constant_targets(options):
    logits, labels, mask = batch(2, 3, classes=4)
    labels.view(-1)[0], mask.view(-1)[0] = 1, True
    at = logits.detach().clone()
    for chosen in (None, mask):
        given = dict(weight=1.7, mask=chosen, **options)

        def check(detach_target):
            value = lambda x: frozen(x, at, labels, **given)  # noqa: B023, E731
            loss = lambda x: adamix_loss(x, labels, detach_target=detach_target, **given).loss  # noqa: B023, E731
            return torch.autograd.gradcheck(checkable(loss, value), logits, raise_exception=False)

        assert check(detach_target=True)
        assert not check(detach_target=False)


def test_unlabelled_rows_in_the_mask_serve_the_consistency_alone():
    logits, labels, _ = batch(4)
    labels[:] = torch.tensor([1, -100, 2, -100])
    mask = torch.tensor([True, True, False, False])
    out = adamix_loss(logits, labels, mask=mask)
    (grad,) = torch.autograd.grad(out.loss, logits)
    torch.testing.assert_close(out.cross_entropy, F.cross_entropy(logits[:1], labels[:1]).detach())
    torch.testing.assert_close(out.consistency, consistency_loss(logits[:2], logits[4:6]).detach())
    p, q = logits.softmax(-1)[:4], logits.softmax(-1)[4:]
    torch.testing.assert_close(grad[1], (p - q)[1] / 4)
    torch.testing.assert_close(grad[5], -(p - q)[1] / 4)
    assert grad[[2, 3, 6, 7]].eq(0).all()


@pytest.mark.parametrize("ignore_index", [-100, -1, 2])
def test_ignore_index_and_int32_labels(ignore_index):
    logits, labels, _ = batch(8, unlabelled=0)
    labels[::3] = ignore_index
    got = adamix_loss(logits, labels.int(), ignore_index=ignore_index)
    want = adamix(logits, labels, ignore_index=ignore_index)
    torch.testing.assert_close(tuple(got), want)
    torch.testing.assert_close(torch.autograd.grad(got.loss, logits), torch.autograd.grad(want[0], logits))


def test_num_items_as_a_tensor_makes_accumulation_exact():
    logits, labels, _ = batch(6, 2)
    items = (labels != -100).sum()
    assert 0 < items < labels.numel()
    whole = adamix_loss(logits, labels).loss
    parts = [
        adamix_loss(torch.cat([logits[i : i + 2], logits[6 + i : 8 + i]]), labels[i : i + 2], num_items=items).loss
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logits), torch.autograd.grad(whole, logits))
    zero = adamix_loss(logits, labels, num_items=0)
    assert all(part.item() == 0 for part in zero)


@pytest.mark.parametrize("rows", [(0,), (0, 3), (2, 0), (3,)], ids=str)
@pytest.mark.parametrize("detach_target", [True, False])
def test_without_rows_everything_is_zero(rows, detach_target):
    logits, labels, _ = batch(*rows, unlabelled=1.1)
    out = adamix_loss(logits, labels, label_smoothing=0.1, detach_target=detach_target)
    assert all(part.item() == 0 for part in out)
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert grad.shape == logits.shape
    assert grad.eq(0).all()


@pytest.mark.parametrize("detach_target", [True, False])
def test_rows_that_do_not_count_may_hold_anything(detach_target):
    logits, labels, _ = batch(4, unlabelled=0)
    labels[1], labels[2] = -100, 999
    mask = torch.tensor([True, True, False, True])
    for chosen in (mask, None):
        kept = labels.clone()
        if chosen is None:
            kept[2] = -100
        want = adamix_loss(logits, kept, mask=chosen, detach_target=detach_target)
        (wanted,) = torch.autograd.grad(want.loss, logits)
        dirty = logits.detach().clone()
        dirty[2], dirty[6, 0] = float("nan"), float("inf")
        dirty.requires_grad_()
        got = adamix_loss(dirty, kept, mask=chosen, detach_target=detach_target)
        torch.testing.assert_close(tuple(got), tuple(want))
        torch.testing.assert_close(torch.autograd.grad(got.loss, dirty)[0], wanted)


def test_closed_classes_and_extreme_logits():
    logits, labels, _ = batch(3, unlabelled=0)
    labels[:] = torch.tensor([0, 2, 2])
    want = adamix_loss(logits[:, [0, 2, 3]], torch.tensor([0, 1, 1]))
    (wanted,) = torch.autograd.grad(want.loss, logits)
    with torch.no_grad():
        logits[:, [1, 4]] = float("-inf")
    got = adamix_loss(logits, labels)
    torch.testing.assert_close(tuple(got), tuple(want))
    torch.testing.assert_close(torch.autograd.grad(got.loss, logits)[0], wanted)
    huge = (torch.randint(-1, 2, (6, 5)) * 1e4).requires_grad_()
    out = adamix_loss(huge, labels)
    assert all(part.isfinite() for part in out)
    assert torch.autograd.grad(out.loss, huge)[0].isfinite().all()
    with torch.no_grad():
        huge[0, 0] = float("nan")
    assert all(part.isnan() for part in adamix_loss(huge, labels))


@pytest.mark.parametrize("classes", [2, 3, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("detach_target", [True, False])
def test_errors_stay_within_a_multiple_of_plain_pytorch(dtype, classes, detach_target):
    logits, labels, _ = batch(4, classes=classes, dtype=dtype, unlabelled=0)

    def run(function):
        def both(logits):
            leaf = logits.clone().requires_grad_()
            out = function(leaf, labels, label_smoothing=0.1, weight=2.0, detach_target=detach_target)
            return out[0].detach(), out[1].detach(), out[2].detach(), *torch.autograd.grad(out[0], leaf)

        return both

    assert_in_budget(run(adamix_loss), run(adamix), logits.detach())


def test_strides_do_not_matter_inputs_are_not_written_and_bits_repeat():
    logits, labels, mask = batch(4, 6, dtype=torch.float32)
    strided = logits.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    before = strided.detach().clone()
    for detach_target in (True, False):
        options = dict(mask=mask, detach_target=detach_target, label_smoothing=0.1)
        runs = []
        for leaf, y in ((strided, labels.t().contiguous().t()),) * 2 + ((logits, labels),):
            out = adamix_loss(leaf, y, **options)
            runs.append((*out, *torch.autograd.grad(out.loss, leaf)))
        assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(*runs[:2]))
        torch.testing.assert_close(runs[0], runs[2])
    shifted = adamix_loss(logits[:, :-1], labels[:, 1:])
    torch.testing.assert_close(tuple(shifted), adamix(logits[:, :-1], labels[:, 1:]))
    assert torch.equal(before, strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype):
    logits, labels, mask = batch(2, 3, dtype=dtype)
    for detach_target, chosen, items in ((True, None, None), (False, mask, torch.tensor(4))):
        rest = (1.5, -100, 0.1, detach_target, "auto")
        torch.library.opcheck(OP, (logits, labels, chosen, items, *rest))
        *_, stats, scales = OP(logits.detach(), labels, chosen, items, *rest)
        args = (torch.tensor(2.0), logits.detach(), labels, chosen, stats, scales, *rest)
        torch.library.opcheck(BACKWARD, args)


def test_torch_compile_whole_graph_no_recompile_per_batch_size():
    counter = CompileCounterWithBackend("aot_eager")
    run = lambda x, y, mask, n: adamix_loss(x * 2, y, mask=mask, num_items=n).loss  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    traced = []
    for number, rows in enumerate(((4, 3), (6, 5), (9, 7), (2, 4))):
        logits, labels, mask = batch(*rows, dtype=torch.float32)
        args = (logits, labels, mask, torch.tensor(5 + number))
        got = torch.autograd.grad(compiled(*args), logits)
        torch.testing.assert_close(got, torch.autograd.grad(run(*args), logits))
        traced.append(counter.frame_count)
    assert traced[-1] == traced[0]


def test_torch_compile_inductor():
    logits, labels, mask = batch(4, 3, dtype=torch.float32)
    run = lambda x: adamix_loss(x, labels, mask=mask, num_items=5, label_smoothing=0.1).loss  # noqa: E731
    got = torch.autograd.grad(torch.compile(run, fullgraph=True)(logits), logits)
    torch.testing.assert_close(got, torch.autograd.grad(run(logits), logits))


@pytest.mark.parametrize("trailing", [(), (1,)], ids=["[2B]", "[2B, 1]"])
@pytest.mark.parametrize("rows", [(5,), (3, 4)], ids=str)
def test_regression(rows, trailing):
    logits = torch.randn(2 * rows[0], *rows[1:], *trailing, dtype=torch.double, requires_grad=True)
    labels, mask = torch.randn(rows, dtype=torch.double), torch.rand(rows) < 0.6
    mask.view(-1)[0] = True
    a, b = logits.reshape(2, *rows)
    for chosen, items in ((None, None), (mask, None), (mask, 4)):
        number = items or (labels.numel() if chosen is None else int(chosen.sum()))
        kept = torch.ones(rows, dtype=torch.bool) if chosen is None else chosen
        options = dict(weight=3.0, mask=chosen, num_items=items)
        got = adamix_loss(logits, labels, **options)
        error = ((a - labels) ** 2)[kept].sum() / number
        torch.testing.assert_close(got.cross_entropy, error.detach())
        gap = (a - b) * kept / number
        torch.testing.assert_close(got.consistency, ((a - b) * gap).sum().detach() / 2)
        torch.testing.assert_close(got.loss, got.cross_entropy + 3 * got.consistency)
        want = torch.stack([2 * (a - labels) * kept / number + 1.5 * gap, -1.5 * gap]).reshape(logits.shape)
        torch.testing.assert_close(torch.autograd.grad(got.loss, logits)[0], want)
        full = lambda x: adamix_loss(x, labels, detach_target=False, **options).loss  # noqa: B023, E731
        assert torch.autograd.gradcheck(full, logits)
    with torch.no_grad():
        logits.reshape(2, *rows)[:, ~mask] = float("nan")
    out = adamix_loss(logits, labels, mask=mask)
    assert out.loss.isfinite()
    assert torch.autograd.grad(out.loss, logits)[0].isfinite().all()
    none = adamix_loss(logits, labels, mask=torch.zeros(rows, dtype=torch.bool))
    assert all(part.item() == 0 for part in none)


def test_regression_in_half_precision_and_compiled():
    logits, labels = torch.randn(8, 1, dtype=torch.bfloat16, requires_grad=True), torch.randn(4)
    out = adamix_loss(logits, labels)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.cross_entropy, F.mse_loss(logits[:4, 0].float(), labels).detach())
    compiled = torch.compile(lambda x: adamix_loss(x, labels).loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(logits), logits)[0], torch.autograd.grad(out.loss, logits)[0])


def test_the_module_is_the_function():
    logits, labels, mask = batch(4)
    options = dict(weight=2.0, ignore_index=1, label_smoothing=0.1, detach_target=False, backend="reference")
    labels = labels.clamp_min(0)
    module = AdaMixLoss(**options)
    got, want = module(logits, labels, mask, 5), adamix_loss(logits, labels, mask=mask, num_items=5, **options)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    assert tuple(AdaMixLoss()(logits, labels)) == tuple(adamix_loss(logits, labels))
    assert "weight=2.0" in repr(module)
    assert not module.state_dict()


BAD = [
    ("odd", dict(logits=torch.ones(5, 3)), ValueError, "logits: got a first dimension of 5, expected an even one"),
    ("one axis", dict(logits=torch.ones(4)), ValueError, r"logits: got shape \(4,\), expected \[2B, ..., V\]"),
    ("no classes", dict(logits=torch.ones(4, 0)), ValueError, r"logits: got shape \(4, 0\)"),
    ("logits dtype", dict(logits=torch.ones(4, 3).int()), TypeError, "logits: got torch.int32"),
    ("labels type", dict(labels=[0, 1]), TypeError, "labels: got list"),
    ("labels dtype", dict(labels=torch.ones(2, dtype=torch.bool)), TypeError, "labels: got torch.bool, expected int32"),
    ("labels shape", dict(labels=torch.zeros(4, dtype=torch.long)), ValueError, r"labels: got shape \(4,\), .* \(2,\)"),
    ("labels high", dict(labels=torch.tensor([0, 3])), IndexError, "labels: got class 3, expected 0 <= class < 3"),
    ("labels low", dict(labels=torch.tensor([-1, 0])), IndexError, "labels: got class -1"),
    ("soft labels", dict(labels=torch.ones(2)), ValueError, r"logits: got shape \(4, 3\), .*regression"),
    ("regression smoothing", dict(logits=torch.ones(4, 1), labels=torch.ones(2), label_smoothing=0.1), ValueError,
     "label_smoothing: got 0.1, expected 0"),
    ("weight", dict(weight=-1.0), ValueError, "weight: got -1.0, expected a finite number >= 0"),
    ("weight nan", dict(weight=float("nan")), ValueError, "weight: got nan"),
    ("weight type", dict(weight="1"), TypeError, "weight: got str"),
    ("smoothing", dict(label_smoothing=1.5), ValueError, r"label_smoothing: got 1.5, expected a number in \[0, 1\]"),
    ("ignore_index", dict(ignore_index=None), TypeError, "ignore_index: got NoneType"),
    ("mask", dict(mask=torch.ones(4, dtype=torch.bool)), ValueError, r"mask: got shape \(4,\), expected shape \(2,\)"),
    ("num_items", dict(num_items=-1), ValueError, "num_items: got -1"),
    ("num_items shape", dict(num_items=torch.ones(2)), ValueError, r"num_items: got shape \(2,\), expected an int or"),
    ("num_items type", dict(num_items=1.5), TypeError, "num_items: got float"),
    ("backend", dict(backend="gpu"), ValueError, "backend: got 'gpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), [pytest.param(*c[1:], id=c[0]) for c in BAD])
def test_bad_input_names_the_argument(change, error, message):
    arguments = dict(logits=torch.ones(4, 3), labels=torch.tensor([0, 1]))
    arguments.update(change)
    with pytest.raises(error, match=message):
        adamix_loss(**arguments)


def test_an_explicit_backend_is_met_or_refused():
    logits, classes, _ = batch(2, classes=1)
    for labels in (classes, torch.ones(2)):
        assert adamix_loss(logits, labels, backend="reference").loss.isfinite()
        with pytest.raises(BackendUnavailableError):
            adamix_loss(logits, labels, backend="cuda")


def test_a_second_derivative_is_refused():
    logits, labels, _ = batch(3)
    (grad,) = torch.autograd.grad(adamix_loss(logits, labels).loss.square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
