"""Losses on a CPU past the checks and the dispatcher: what was called before gives the same bits, and no other call."""

import contextlib
import itertools
import math
from unittest import mock

import pytest
import torch

from adamix_kernels import adamix_loss, consistency_loss
from adamix_kernels.ops import _direct
from adamix_kernels.ops.consistency import api, direct, reference

# Calls that follow each other differ in one of them.
LOGITS = {
    "shape": ((6, 3), (6, 5), (2, 4, 3)), "dtype": (torch.float32, torch.bfloat16, torch.float64),
    "turned": (False, True), "needs": (True, False),
}  # fmt: skip
CONSISTENCY = {
    **LOGITS, "second": (True, False), "masked": (False, True), "detach_target": (True, False),
    "reduction": ("batchmean", "sum", "none"), "expected_grad": (None, 0.5),
}  # fmt: skip
ADAMIX = {
    **LOGITS, "masked": (False, True), "detach_target": (True, False), "weight": (1.0, 0.5),
    "label_smoothing": (0.0, 0.1), "ignore_index": (-100, 0), "items": (None, 7),
    "index": (torch.int64, torch.int32), "expected_grad": (None, 0.5),
}  # fmt: skip


def logits_of(p, seed, needs):
    shape = p["shape"]
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(p["dtype"])
    made = made.transpose(0, 1).contiguous().transpose(0, 1) if p["turned"] else made
    return made.requires_grad_(needs)


def mask_of(p, rows):
    return (torch.arange(torch.Size(rows).numel()).view(rows) % 3 > 0) if p["masked"] else None


def consistency_call(p):
    a, b = logits_of(p, 1, p["needs"]), logits_of(p, 2, p["second"])
    options = {name: p[name] for name in ("detach_target", "reduction", "expected_grad")}
    return consistency_loss(a, b, mask=mask_of(p, a.shape[:-1]), **options), [t for t in (a, b) if t.requires_grad]


def adamix_call(p):
    z = logits_of(p, 1, p["needs"])
    rows = (z.shape[0] // 2, *z.shape[1:-1])
    labels = (torch.arange(torch.Size(rows).numel()) % z.shape[-1]).view(rows).to(p["index"])
    options = {n: p[n] for n in ("detach_target", "weight", "label_smoothing", "ignore_index", "expected_grad")}
    return adamix_loss(z, labels, mask=mask_of(p, rows), num_items=p["items"], **options).loss, [z] * p["needs"]


def bits(call, p):
    loss, leaves = call(p)
    grads = torch.autograd.grad(loss.sum(), leaves) if leaves else ()
    return [t.detach().clone() for t in (loss, *grads)]


@pytest.mark.parametrize(("call", "properties"), [(consistency_call, CONSISTENCY), (adamix_call, ADAMIX)])
def test_a_call_that_differs_in_one_thing_is_another(call, properties):
    first = {name: values[0] for name, values in properties.items()}
    every = [first, *({**first, name: v} for name, values in properties.items() for v in values[1:])]
    with _direct.switched_off():
        wanted = [bits(call, p) for p in every]
    for p, want in itertools.chain(*(zip(every, wanted, strict=True) for _ in range(3))):
        got = bits(call, p)
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other), p


@pytest.mark.parametrize("call", [consistency_call, adamix_call])
def test_a_second_call_is_not_checked_again(call):
    p = {name: values[0] for name, values in (CONSISTENCY if call is consistency_call else ADAMIX).items()}
    want = bits(call, p)
    with mock.patch.object(api, "check_tensor", mock.Mock(side_effect=LookupError)):
        assert all(map(torch.equal, bits(call, p), want))
        with pytest.raises(LookupError):
            bits(call, {**p, "dtype": torch.bfloat16, "shape": (10, 7)})
    # Another incoming gradient than the expected one: all is written again.
    loss, leaves = call(p)
    for grad, one in zip(torch.autograd.grad(loss, leaves, loss.new_full((), 3.0)), want[1:], strict=True):
        torch.testing.assert_close(grad, 3 * one)


@contextlib.contextmanager
def asked_nothing_else():
    """Neither api.py's checks nor plans are asked: the call is one of few classes (_few.py)."""
    with contextlib.ExitStack() as stack:
        for name in ("consistency", "adamix"):
            stack.enter_context(mock.patch.object(direct, name, mock.Mock(side_effect=LookupError)))
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(128, 2), (8, 3), (2, 5, 64), (2, 1)])
@pytest.mark.parametrize("guess", [None, 1 / 3])
def test_few_classes_have_the_bits_of_every_other_way(shape, dtype, guess):
    p = {name: values[0] for name, values in (CONSISTENCY | ADAMIX).items()}
    p |= {"shape": shape, "dtype": dtype, "expected_grad": guess, "weight": 0.7}

    def results(call):
        loss, leaves = call(p)
        incoming = [loss.new_full((), value) for value in (guess or 1.0, 3.0, guess or 1.0)]
        # The first finds its gradients, the others write them anew, each in memory of its own.
        grads = [torch.autograd.grad(loss, leaves, grad, retain_graph=True) for grad in incoming]
        assert len({g.data_ptr() for of_one in grads for g in of_one}) == len(grads) * len(leaves)
        return [loss, *itertools.chain(*grads)]

    def parts(p):
        z = logits_of(p, 1, True)
        rows = (shape[0] // 2, *shape[1:-1])
        labels = (torch.arange(torch.Size(rows).numel()) % shape[-1]).view(rows)
        out = adamix_loss(z, labels, weight=0.7, expected_grad=guess)
        return (out.loss + 0 * out.cross_entropy - 0 * out.consistency), [z], out[1:]

    for call in (consistency_call, adamix_call, lambda p: parts(p)[:2]):
        with asked_nothing_else():
            got = results(call)
        with _direct.switched_off():
            assert all(map(torch.equal, got, results(call)))
    with asked_nothing_else():
        got = parts(p)[2]
    with _direct.switched_off():
        assert all(map(torch.equal, got, parts(p)[2]))


def test_few_classes_leave_to_others_what_is_unusual():
    a, b = (logits_of({"shape": (4, 3), "dtype": torch.float32, "turned": False}, n, True) for n in (1, 2))
    labels = torch.tensor([0, 2])
    refused = mock.Mock(side_effect=LookupError)
    more = [
        (a[:, :2], b[:, :2]), (a, b.detach()), (a.half(), b.half()), (a.detach(), b.detach()), (a, b[:3]),
        (a, b.double()), (a, 3), (a[:0], b[:0]), (a.to_sparse(), b.to_sparse()), (a[0, 0], b[0, 0]),
    ]  # fmt: skip
    with mock.patch.object(direct, "consistency", refused), mock.patch.object(direct, "adamix", refused):
        for pair in more:
            with pytest.raises(LookupError):
                consistency_loss(*pair)
        for options in ({"reduction": "sum"}, {"detach_target": False}, {"mask": labels.new_ones(4).bool()},
                        {"backend": "elsewhere"}, {"expected_grad": -1.0}, {"expected_grad": True}):  # fmt: skip
            with pytest.raises(LookupError):
                consistency_loss(a, b, **options)
        for wrong in ([0, 3], [-1, 0], [0, -100], [0, 1, 2], [0.0, 1.0], [[0, 1]]):
            with pytest.raises(LookupError):
                adamix_loss(a, torch.tensor(wrong))
        for options in ({"weight": -1.0}, {"weight": "1"}, {"ignore_index": 1}, {"num_items": 7},
                        {"label_smoothing": 0.1}, {"label_smoothing": False}, {"label_smoothing": torch.zeros(2)},
                        {"ignore_index": 1.5}, {"weight": math.nan}):  # fmt: skip
            with pytest.raises(LookupError):
                adamix_loss(a, labels, **options)
        for infinite in (math.inf, -math.inf, math.nan):
            c = a.detach().clone()
            c[0, 1] = infinite
            with pytest.raises(LookupError):
                consistency_loss(c.requires_grad_(), b)
            with pytest.raises(LookupError):
                adamix_loss(c, labels)


def test_few_classes_have_one_backward_and_see_what_was_overwritten():
    a, b = (logits_of({"shape": (4, 3), "dtype": torch.float32, "turned": False}, n, True) for n in (1, 2))
    for make in (lambda: consistency_loss(a * 1, b), lambda: adamix_loss(a * 1, torch.tensor([0, 2])).loss):
        with asked_nothing_else():
            loss = make()
        (grad,) = torch.autograd.grad(loss.square(), a, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
        loss = make()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    logits = a * 1
    loss = consistency_loss(logits, b)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_labels_are_looked_at_in_every_call():
    logits, labels = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 2])
    for _ in range(2):
        adamix_loss(logits, labels)
    with pytest.raises(IndexError, match="labels: got class 3, expected 0 <= class < 3"):
        adamix_loss(logits, torch.tensor([0, 3, 2]))
    with pytest.raises(ValueError, match="labels: got"):
        adamix_loss(logits, labels[:2])
    found = adamix_loss(logits, torch.tensor([0, -100, 2]))
    torch.testing.assert_close(found.loss, adamix_loss(logits, labels, mask=labels != 1).loss)
    assert reference.direct.adamix.find(logits, labels, None, None, True, 1.0, -100, 0.0, True, 1.0) is not None
