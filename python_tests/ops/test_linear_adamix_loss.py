"""linear_adamix_loss on the reference backend, against adamix_loss on all the logits at once."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from plain_losses import adamix, checkable, frozen
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from adamix_kernels.functional import adamix_loss, linear_adamix_loss
from adamix_kernels.testing import assert_in_budget
from benchmarks import bench_linear_memory
from benchmarks.measure import record
from benchmarks.sizes import HEAD_MEMORY

OP = torch.ops.adamix_kernels.linear_adamix_loss.default


def batch(*rows, width=6, classes=11, dtype=torch.double):
    """Hidden states [2B, ..., D], head [V, D], bias [V] that require grad; labels, mask [B, ...]."""
    make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)  # noqa: E731
    labels = torch.where(torch.rand(rows) < 0.3, -100, torch.randint(classes, rows))
    return make(2 * rows[0], *rows[1:], width), make(classes, width), make(classes), labels, torch.rand(rows) < 0.7


@pytest.mark.parametrize("rows", [(7,), (3, 5)], ids=["sample", "token"])
@pytest.mark.parametrize("chunk_rows", [1, 2, 4, 7, 100, None])
@pytest.mark.parametrize("detach_target", [True, False])
def test_value_and_gradients_match_the_unchunked_loss(rows, chunk_rows, detach_target):
    hidden, head, bias, labels, mask = batch(*rows)
    for smoothing, chosen, items in itertools.product((0.0, 0.1), (None, mask), (None, 7, torch.tensor(5))):
        options = dict(label_smoothing=smoothing, mask=chosen, num_items=items, detach_target=detach_target, weight=2.5)
        for b in (None, bias):
            leaves = [t for t in (hidden, head, b) if t is not None]
            got = linear_adamix_loss(hidden, head, labels, bias=b, chunk_rows=chunk_rows, **options)
            want = adamix_loss(F.linear(hidden, head, b), labels, **options)
            torch.testing.assert_close(tuple(got), tuple(want))
            mine = torch.autograd.grad(3 * got.loss, leaves)
            torch.testing.assert_close(mine, torch.autograd.grad(3 * want.loss, leaves))


def test_gradcheck():
    hidden, head, bias, labels, mask = batch(2, 3, width=3, classes=4)

    def run(hidden, head, bias):
        return linear_adamix_loss(
            hidden, head, labels, bias=bias, mask=mask, label_smoothing=0.1, detach_target=False, chunk_rows=2
        ).loss

    assert torch.autograd.gradcheck(run, (hidden, head, bias))


def test_gradcheck_with_constant_targets():
    hidden, head, bias, labels, mask = batch(2, 3, width=3, classes=4)
    labels.view(-1)[0], mask.view(-1)[0] = 1, True
    at = F.linear(hidden, head, bias).detach()
    options = dict(mask=mask, label_smoothing=0.1)
    loss = lambda h, w, b: linear_adamix_loss(h, w, labels, bias=b, chunk_rows=2, **options).loss  # noqa: E731
    value = lambda h, w, b: frozen(F.linear(h, w, b), at, labels, **options)  # noqa: E731
    assert torch.autograd.gradcheck(checkable(loss, value), (hidden, head, bias))


class Largest(TorchDispatchMode):
    """Watches every operator's results, inside our ops too, and keeps the largest element count."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "adamix_kernels":
            with self:
                out = function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        else:
            out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        self.calls += 1
        return out


def test_all_the_logits_are_never_held():
    hidden, head, bias, labels, _ = batch(4, 8, width=4, classes=97)
    every = 2 * 4 * 8 * 97
    with Largest() as unchunked:
        adamix_loss(F.linear(hidden, head, bias), labels).loss.backward()
    assert unchunked.elements >= every
    for trained in (True, False):
        head.requires_grad_(trained)
        with Largest() as chunked:
            linear_adamix_loss(hidden, head, labels, bias=bias, chunk_rows=3).loss.backward()
        assert chunked.elements == 2 * 3 * 97
        assert chunked.calls > 100


@pytest.mark.parametrize("train_head", [False, True])
def test_peak_memory_is_a_small_part_of_the_unfused_paths(train_head):
    """A chunk has the share of the rows that it has by default at 4096 rows of 50,257 classes."""
    rows = 256
    chunk_rows = rows * 64 * 2**20 // (8 * 50257) // 4096
    peaks = bench_linear_memory.measure(rows, 16, 1001, torch.bfloat16, train_head, chunk_rows)
    assert peaks[bench_linear_memory.UNFUSED] > 2 * rows * 1001 * 8
    assert 0 < peaks[bench_linear_memory.FUSED] < bench_linear_memory.LIMIT * peaks[bench_linear_memory.UNFUSED]


def test_the_committed_memory_table_holds_the_goal():
    peaks = {(row.shape, row.backend): row.value for row in record.read(bench_linear_memory.RESULT)}
    shapes = {shape for shape, _ in peaks}
    assert shapes == {HEAD_MEMORY.words, HEAD_MEMORY.words + " trained head"}
    for shape in shapes:
        fused, unfused = (peaks[shape, name] for name in (bench_linear_memory.FUSED, bench_linear_memory.UNFUSED))
        assert 0 < fused < bench_linear_memory.LIMIT * unfused


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients_are_computed(wanted):
    hidden, head, bias, labels, _ = batch(3)
    leaves = [t.detach().requires_grad_(w) for t, w in zip((hidden, head, bias), wanted)]
    loss = linear_adamix_loss(leaves[0], leaves[1], labels, bias=leaves[2]).loss
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    assert [t.grad is not None for t in leaves] == list(wanted)
    with torch.no_grad():
        assert not linear_adamix_loss(hidden, head, labels, bias=bias).loss.requires_grad


@pytest.mark.parametrize("rows", [(0,), (2, 0), (3,)], ids=str)
def test_without_rows_everything_is_zero(rows):
    hidden, head, bias, labels, _ = batch(*rows)
    out = linear_adamix_loss(hidden, head, labels.fill_(-100), bias=bias, chunk_rows=2)
    assert all(part.item() == 0 for part in out)
    for grad in torch.autograd.grad(out.loss, (hidden, head, bias)):
        assert grad.eq(0).all()


def test_rows_without_labels_but_in_the_mask_serve_the_consistency_alone():
    hidden, head, bias, labels, _ = batch(4)
    leaves, everything = (hidden, head, bias), torch.ones(4, dtype=torch.bool)
    labels.fill_(-100)
    got = linear_adamix_loss(hidden, head, labels, bias=bias, mask=everything, chunk_rows=3)
    want = adamix_loss(F.linear(hidden, head, bias), labels, mask=everything)
    assert got.cross_entropy.item() == 0
    assert got.consistency.item() > 0
    torch.testing.assert_close(tuple(got), tuple(want))
    torch.testing.assert_close(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want.loss, leaves))


def test_masked_rows_may_hold_anything_and_nan_is_not_hidden():
    hidden, head, bias, labels, mask = batch(6)
    labels.clamp_(min=0)
    mask[:2] = torch.tensor([True, False])
    leaves = (hidden, head, bias)
    run = lambda: linear_adamix_loss(hidden, head, labels, bias=bias, mask=mask, chunk_rows=4).loss  # noqa: E731
    want = run()
    wanted = torch.autograd.grad(want, leaves)
    with torch.no_grad():
        hidden[1], hidden[7, 0] = float("nan"), float("inf")
    got = run()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), wanted)
    with torch.no_grad():
        hidden[0, 0] = float("nan")
    assert run().isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_stay_within_a_multiple_of_plain_pytorch(dtype):
    hidden, head, bias, labels, _ = batch(4, 8, width=16, classes=301, dtype=dtype)
    labels.clamp_(min=0)

    def run(function):
        def both(*tensors):
            leaves = [t.clone().requires_grad_() for t in tensors]
            out = function(*leaves)
            return out[0].detach(), *torch.autograd.grad(out[0], leaves)

        return both

    chunked = run(lambda h, w, b: linear_adamix_loss(h, w, labels, bias=b, chunk_rows=5))
    plain = run(lambda h, w, b: adamix(F.linear(h, w, b), labels))
    assert_in_budget(chunked, plain, hidden.detach(), head.detach(), bias.detach())


def test_float16_gradients_survive_many_rows_under_a_loss_scale():
    hidden, head, _, labels, _ = batch(2, 2, dtype=torch.float16)
    labels.clamp_(min=0)
    scale, items = 65536.0, 2**22
    loss = linear_adamix_loss(hidden, head, labels, num_items=items).loss
    got = torch.autograd.grad(loss * scale, (hidden, head))
    wide = [t.detach().double().requires_grad_() for t in (hidden, head)]
    want = torch.autograd.grad(adamix(F.linear(*wide), labels, num_items=items)[0] * scale, wide)
    for mine, exact in zip(got, want):
        assert exact.abs().max() > 1e-3
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=float(exact.abs().max()) * 0.01)


def test_float16_gradients_of_many_equal_rows_and_a_large_weight_do_not_overflow():
    hidden = (torch.ones(2, 4096, 4) * 64 + torch.tensor([0.0, 8.0]).view(2, 1, 1)).half().requires_grad_()
    head = torch.tensor([[0.0] * 4, [1 / 64] * 4, [1 / 32, 0, 0, 0]], dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, 4096, dtype=torch.long)
    labels[:, 1:] = -100
    everything = torch.ones(1, 4096, dtype=torch.bool)
    wide = [t.detach().double().requires_grad_() for t in (hidden, head)]
    for weight, mask in ((1.0, None), (100.0, everything), (0.0, everything), (1000.0, everything)):
        kept = labels if mask is not None else labels.clamp_min(0)
        got = linear_adamix_loss(hidden, head, kept, weight=weight, mask=mask, chunk_rows=4096)
        want = adamix(F.linear(*wide), kept, weight=weight, mask=mask)
        for mine, exact in zip(torch.autograd.grad(got.loss, (hidden, head)), torch.autograd.grad(want[0], wide)):
            torch.testing.assert_close(mine.double(), exact, rtol=0, atol=float(exact.abs().max()) * 0.02)


def test_inputs_are_not_written_strides_do_not_matter_and_bits_repeat():
    hidden, head, bias, labels, mask = batch(4, 6, dtype=torch.float32)
    strided = [
        hidden.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_(),
        head.detach().t().contiguous().t().requires_grad_(),
        bias,
    ]
    before = [t.detach().clone() for t in strided]
    runs = []
    for _ in range(2):
        out = linear_adamix_loss(strided[0], strided[1], labels, bias=bias, mask=mask, chunk_rows=5)
        first = torch.autograd.grad(out.loss, strided, retain_graph=True)
        again = torch.autograd.grad(out.loss, strided)
        assert all(torch.equal(x, y) for x, y in zip(first, again))
        runs.append((*out, *first))
    assert all(torch.equal(x, y) for x, y in zip(*runs))
    assert all(torch.equal(x, y) for x, y in zip(before, strided))
    want = adamix_loss(F.linear(hidden, head, bias), labels, mask=mask)
    torch.testing.assert_close(runs[0][:3], tuple(want))
    torch.testing.assert_close(runs[0][3:], torch.autograd.grad(want.loss, (hidden, head, bias)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_hidden_and_head_and_keeps_the_loss_wide(dtype):
    hidden, head, bias, labels, _ = batch(3, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        out = linear_adamix_loss(hidden, head, labels, bias=bias, chunk_rows=5)
    assert out.loss.dtype == torch.float32
    cast = [t.to(dtype) for t in (hidden, head, bias)]
    same = linear_adamix_loss(cast[0], cast[1], labels, bias=cast[2], chunk_rows=5)
    assert all(torch.equal(x, y) for x, y in zip(out, same))
    grads = torch.autograd.grad(out.loss, (hidden, head, bias))
    for mine, theirs in zip(grads, torch.autograd.grad(same.loss, (hidden, head, bias))):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    hidden, head, bias, labels, mask = batch(3, 2, dtype=dtype)
    for b, chosen, items, detach in ((bias, None, None, True), (None, mask, torch.tensor(4), False)):
        needs = (True, True, b is not None)
        args = (hidden, head, b, labels, chosen, items, 1.5, -100, 0.1, detach, 4, *needs, "auto")
        torch.library.opcheck(OP, args)
    frozen = (hidden, head.detach(), None, labels, mask, None, 1.5, -100, 0.0, True, 4, True, False, False, "auto")
    torch.library.opcheck(OP, frozen)


def test_torch_compile_whole_graph_no_recompile_per_batch_size():
    counter = CompileCounterWithBackend("aot_eager")
    run = lambda h, w, y, mask: linear_adamix_loss(h * 2, w, y, mask=mask).loss  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    _, head, *_ = batch(1, dtype=torch.float32)
    torch._dynamo.mark_static(head)
    traced = []
    for rows in ((4, 3), (6, 5), (9, 7)):
        hidden, _, _, labels, mask = batch(*rows, dtype=torch.float32)
        got = torch.autograd.grad(compiled(hidden, head, labels, mask), (hidden, head))
        torch.testing.assert_close(got, torch.autograd.grad(run(hidden, head, labels, mask), (hidden, head)))
        traced.append(counter.frame_count)
    assert traced[-1] == traced[0]


BAD = [
    ("hidden", dict(hidden=[1.0]), TypeError, "hidden: got list"),
    ("odd", dict(hidden=torch.ones(5, 3)), ValueError, "hidden: got a first dimension of 5"),
    ("one axis", dict(hidden=torch.ones(4)), ValueError, r"hidden: got shape \(4,\), expected \[2B, ..., D\]"),
    ("head", dict(lm_head_weight=torch.ones(7, 4)), ValueError, r"lm_head_weight: got shape \(7, 4\)"),
    ("head dims", dict(lm_head_weight=torch.ones(7)), ValueError, r"lm_head_weight: got shape \(7,\)"),
    ("head dtype", dict(lm_head_weight=torch.ones(7, 3).double()), TypeError, "lm_head_weight: got torch.float64"),
    ("no classes", dict(lm_head_weight=torch.ones(0, 3)), ValueError, r"lm_head_weight: got shape \(0, 3\)"),
    ("bias", dict(bias=torch.ones(6)), ValueError, r"bias: got shape \(6,\)"),
    ("bias type", dict(bias=1), TypeError, "bias: got int"),
    ("labels", dict(labels=torch.zeros(3, dtype=torch.long)), ValueError, r"labels: got shape \(3,\)"),
    ("labels float", dict(labels=torch.zeros(2)), TypeError, "labels: got torch.float32"),
    ("labels high", dict(labels=torch.tensor([7, 0])), IndexError, "labels: got class 7"),
    ("mask", dict(mask=torch.ones(2)), TypeError, "mask: got torch.float32"),
    ("chunk_rows", dict(chunk_rows=0), ValueError, "chunk_rows: got 0, expected an int >= 1"),
    ("weight", dict(weight=float("inf")), ValueError, "weight: got inf"),
    ("backend", dict(backend="gpu"), ValueError, "backend: got 'gpu'"),
]


@pytest.mark.parametrize(("change", "error", "message"), [pytest.param(*c[1:], id=c[0]) for c in BAD])
def test_bad_input_names_the_argument(change, error, message):
    arguments = dict(hidden=torch.ones(4, 3), lm_head_weight=torch.ones(7, 3), labels=torch.tensor([0, 1]))
    arguments.update(change)
    with pytest.raises(error, match=message):
        linear_adamix_loss(**arguments)
