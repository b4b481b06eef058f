"""consistency_loss on the reference backend, against F.kl_div on F.log_softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_losses import symmetric_kl
from torch._dynamo.testing import CompileCounterWithBackend

from adamix_kernels.functional import consistency_loss
from adamix_kernels.testing import assert_in_budget

OP = torch.ops.adamix_kernels.consistency.default
BACKWARD = torch.ops.adamix_kernels.consistency_backward.default
REDUCTIONS = ["batchmean", "sum", "none"]
INF, NAN = float("inf"), float("nan")


def pair(*shape, dtype=torch.double, scale=1.0):
    return [(torch.randn(*shape, dtype=dtype) * scale).requires_grad_() for _ in range(2)]


def grads(loss, leaves):
    return torch.autograd.grad((loss * torch.arange(1.0, loss.numel() + 1).view(loss.shape).to(loss)).sum(), leaves)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4), (6,), (3, 1), (4, 2), (2, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("detach_target", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_and_gradients_match_kl_div(shape, detach_target, reduction):
    a, b = pair(*shape, scale=3)
    got = consistency_loss(a, b, detach_target=detach_target, reduction=reduction)
    want = symmetric_kl(a, b, None, detach_target, reduction).reshape(got.shape)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads(got, (a, b)), grads(want, (a, b)))
    assert a.shape[-1] != 1 or got.eq(0).all()


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_and_mask(data):
    batch, tokens, classes = (data.draw(st.integers(lo, hi)) for lo, hi in ((0, 5), (0, 5), (1, 9)))
    detach = data.draw(st.booleans())
    a, b = pair(batch, tokens, classes)
    mask = torch.rand(batch, tokens) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    mask = mask.to(data.draw(st.sampled_from([torch.bool, torch.int32, torch.int64])))
    for reduction in REDUCTIONS:
        got = consistency_loss(a, b, mask=mask, detach_target=detach, reduction=reduction)
        mine = torch.autograd.grad(got.sum(), (a, b))
        rows = symmetric_kl(a, b, mask, detach, "none")
        if reduction == "none":
            assert got.shape == mask.shape
            assert got[mask == 0].eq(0).all()
            torch.testing.assert_close(got[mask != 0], rows)
        want = rows.sum() / (max(len(rows), 1) if reduction == "batchmean" else 1)
        torch.testing.assert_close(got.sum(), want)
        torch.testing.assert_close(mine, torch.autograd.grad(want, (a, b)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_the_full_gradient(reduction, masked):
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool) if masked else None
    run = lambda a, b: consistency_loss(a, b, mask=mask, detach_target=False, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(run, pair(2, 3, 4))


def test_the_detached_gradient_is_the_slope_with_frozen_targets():
    a, b = pair(2, 3, 4)
    got = torch.autograd.grad(consistency_loss(a, b), (a, b))
    log_p, log_q = a.detach().log_softmax(-1), b.detach().log_softmax(-1)

    def frozen(a, b):
        towards = lambda x, target: (target.exp() * (target - x.log_softmax(-1))).sum() / 6  # noqa: E731
        return 0.5 * (towards(a, log_q) + towards(b, log_p))

    step = 1e-6
    for leaf, grad in enumerate(got):
        for place in range(24):
            nudge = torch.zeros(24, dtype=torch.double)
            nudge[place] = step
            ends = []
            for sign in (1, -1):
                moved = [a.detach(), b.detach()]
                moved[leaf] = moved[leaf] + sign * nudge.view(2, 3, 4)
                ends.append(frozen(*moved))
            torch.testing.assert_close(grad.flatten()[place], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)
    assert torch.equal(got[0], -got[1])


@pytest.mark.parametrize("detach_target", [True, False])
def test_masked_rows_may_hold_anything(detach_target):
    a, b = pair(5, 4)
    mask = torch.tensor([True, False, True, False, False])
    want = consistency_loss(a[mask], b[mask], detach_target=detach_target)
    wanted = torch.autograd.grad(want, (a, b))
    with torch.no_grad():
        a[1], b[3], a[4, 2] = NAN, INF, -INF
    got = consistency_loss(a, b, mask=mask, detach_target=detach_target)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (a, b)), wanted)
    rows = consistency_loss(a, b, mask=mask, detach_target=detach_target, reduction="none")
    assert rows[~mask].eq(0).all()
    assert all(g[~mask].eq(0).all() for g in torch.autograd.grad(rows.sum(), (a, b)))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3), (3, 4)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_rows_loss_and_gradients_are_zero(shape, reduction):
    a, b = pair(*shape)
    got = consistency_loss(a, b, mask=torch.zeros(shape[:-1], dtype=torch.bool), reduction=reduction)
    assert got.eq(0).all()
    for g, leaf in zip(torch.autograd.grad(got.sum(), (a, b)), (a, b)):
        assert g.shape == leaf.shape
        assert g.eq(0).all()
    if 0 in shape:
        assert consistency_loss(a, b, reduction=reduction).eq(0).all()


@pytest.mark.parametrize("detach_target", [True, False])
def test_classes_that_neither_pass_can_choose_change_nothing(detach_target):
    a, b = pair(3, 5)
    open_classes = [0, 2, 3]
    want = consistency_loss(a[:, open_classes], b[:, open_classes], detach_target=detach_target)
    wanted = torch.autograd.grad(want, (a, b))
    with torch.no_grad():
        a[:, [1, 4]] = b[:, [1, 4]] = -INF
    got = consistency_loss(a, b, detach_target=detach_target)
    torch.testing.assert_close(got, want)
    mine = torch.autograd.grad(got, (a, b))
    torch.testing.assert_close(mine, wanted)
    assert all(g[:, [1, 4]].eq(0).all() for g in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("detach_target", [True, False])
def test_logits_of_ten_thousand_stay_finite_and_nan_is_not_hidden(dtype, detach_target):
    a = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], dtype=dtype, requires_grad=True)
    b = torch.tensor([[-1e4, 1e4, 1e4], [-1e4, -1e4, 1e4]], dtype=dtype, requires_grad=True)
    loss = consistency_loss(a, b, detach_target=detach_target, reduction="none")
    exact = symmetric_kl(a.double(), b.double(), None, detach_target, "none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (a, b)))
    with torch.no_grad():
        a[0, 1] = NAN
    loss = consistency_loss(a, b, detach_target=detach_target, reduction="none")
    assert loss.isnan().tolist() == [True, False]
    assert torch.autograd.grad(loss.sum(), a)[0][0].isnan().all()


@pytest.mark.parametrize("classes", [2, 3, 1000, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("detach_target", [True, False])
def test_errors_stay_within_a_multiple_of_plain_pytorch(dtype, classes, detach_target):
    a, b = (t.detach() for t in pair(4, classes, dtype=dtype, scale=3))

    def run(function):
        def both(a, b):
            leaves = [t.clone().requires_grad_() for t in (a, b)]
            out = function(*leaves, detach_target=detach_target)
            return out.detach(), *torch.autograd.grad(out, leaves)

        return both

    assert consistency_loss(a, b).dtype == torch.float32
    assert_in_budget(run(consistency_loss), run(symmetric_kl), a, b)


def test_equal_logits_give_exactly_zero():
    a = torch.randn(4, 9, requires_grad=True)
    for detach_target in (True, False):
        loss = consistency_loss(a, a.detach().clone(), detach_target=detach_target)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, a)[0].abs().max() < 1e-7


def test_only_wanted_gradients_are_given():
    a, b = pair(3, 4)
    consistency_loss(a, b.detach()).backward()
    consistency_loss(a.detach(), b).backward()
    torch.testing.assert_close(a.grad, -b.grad)
    assert not consistency_loss(a.detach(), b.detach()).requires_grad


def test_inputs_are_not_written_strides_do_not_matter_and_bits_repeat():
    a, b = pair(6, 4, 5, dtype=torch.float32)
    strided = [t.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for t in (a, b)]
    before = [t.detach().clone() for t in strided]
    for detach_target in (True, False):
        runs = []
        for leaves in (strided, strided, (a, b)):
            loss = consistency_loss(*leaves, detach_target=detach_target)
            runs.append((loss, *torch.autograd.grad(loss, leaves)))
        assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(*runs[:2]))
        torch.testing.assert_close(runs[0], runs[2])
    shifted = consistency_loss(a[:, 1:], b[:, 1:])
    torch.testing.assert_close(shifted, symmetric_kl(a[:, 1:], b[:, 1:]))
    assert all(torch.equal(x, y) for x, y in zip(before, strided))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    a, b = pair(2, 3, 4, dtype=dtype)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)
    for detach_target in (True, False):
        for reduction, rows in (("batchmean", mask), ("sum", None), ("none", mask)):
            args = (a, b, rows, detach_target, reduction, "auto")
            torch.library.opcheck(OP, args)
            loss, stats, scale = OP(*(t.detach() if isinstance(t, torch.Tensor) else t for t in args))
            back = (torch.ones_like(loss), a.detach(), b.detach(), rows, stats, scale, detach_target, "auto")
            torch.library.opcheck(BACKWARD, back)


def test_torch_compile_whole_graph_no_recompile_per_batch_size():
    counter = CompileCounterWithBackend("aot_eager")
    run = lambda a, b, mask: consistency_loss(a * 2, b, mask=mask, detach_target=False)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    traced = []
    for batch, tokens in ((4, 3), (6, 5), (9, 7)):
        a, b = pair(batch, tokens, 5, dtype=torch.float32)
        mask = torch.rand(batch, tokens) < 0.5
        got = torch.autograd.grad(compiled(a, b, mask), (a, b))
        torch.testing.assert_close(got, torch.autograd.grad(run(a, b, mask), (a, b)))
        traced.append(counter.frame_count)
    assert traced[-1] == traced[0]


def test_autocast_changes_nothing():
    a, b = pair(3, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = consistency_loss(a, b)
    assert torch.equal(got, consistency_loss(a, b))


BAD = [
    ("logits_a", dict(logits_a=[1.0]), TypeError, "logits_a: got list"),
    ("logits_a dtype", dict(logits_a=torch.ones(3, 4, dtype=torch.long)), TypeError, "logits_a: got torch.int64"),
    ("no classes", dict(logits_a=torch.ones(3, 0)), ValueError, r"logits_a: got shape \(3, 0\), expected \[..., V\]"),
    ("scalar", dict(logits_a=torch.ones(())), ValueError, r"logits_a: got shape \(\)"),
    ("logits_b dtype", dict(logits_b=torch.ones(3, 4).double()), TypeError, "logits_b: got torch.float64"),
    ("logits_b", dict(logits_b=torch.ones(3, 5)), ValueError, r"logits_b: got shape \(3, 5\)"),
    ("mask type", dict(mask=[1]), TypeError, "mask: got list"),
    ("mask dtype", dict(mask=torch.ones(3)), TypeError, "mask: got torch.float32, expected bool"),
    ("mask shape", dict(mask=torch.ones(4, dtype=torch.bool)), ValueError, r"mask: got shape \(4,\), expected shape"),
    ("mask dims", dict(mask=torch.ones(3, 1, dtype=torch.bool)), ValueError, r"mask: got shape \(3, 1\)"),
    (
        "mask device",
        dict(mask=torch.ones(3, dtype=torch.bool, device="meta")),
        ValueError,
        "mask: got a tensor on meta",
    ),
    ("reduction", dict(reduction="mean"), ValueError, "reduction: got 'mean', expected one of"),
    ("backend", dict(backend="cpu"), ValueError, "backend: got 'cpu'"),
]


@pytest.mark.parametrize(("change", "error", "message"), [pytest.param(*c[1:], id=c[0]) for c in BAD])
def test_bad_input_names_the_argument(change, error, message):
    arguments = dict(logits_a=torch.ones(3, 4), logits_b=torch.ones(3, 4), mask=torch.ones(3, dtype=torch.bool))
    arguments.update(change)
    with pytest.raises(error, match=message):
        consistency_loss(**arguments)
