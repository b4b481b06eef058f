"""The consistency losses on the C++/CUDA backend: on a GPU, or its kernels on the CPU (see cuda_host.py)."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import math

import pytest
import torch
import torch._dynamo.testing
from cuda_host import DEVICE, DTYPES, ON_HOST, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st

needs_cuda()

from routed_cuda import captured_graph, poisoned_memory

from adamix_kernels import BackendUnavailableError
from adamix_kernels.functional import adamix_loss, consistency_loss, linear_adamix_loss
from adamix_kernels.ops.consistency import cuda_impl, reference
from adamix_kernels.testing import assert_in_budget

INF = float("inf")
OPS = torch.ops.adamix_cuda
# (compute capability, bytes of shared memory) of the device that the CPU stands for; on a GPU it is what it is.
HOPPER, SMALL_HOPPER, TINY_HOPPER, SMALL_AMPERE = (90, 232448), (90, 12000), (90, 7000), (80, 7000)


def randn(*shape, dtype=torch.float32, scale=2.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def draw_labels(rows, classes):
    labels = torch.randint(classes, rows)
    labels[torch.rand(rows) < 0.2] = -100
    return labels.to(DEVICE)


def draw_mask(rows):
    return (torch.rand(rows) < 0.7).to(DEVICE)


def pretend(monkeypatch, device):
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", str(device[0]))
    monkeypatch.setenv("ADAMIX_HOST_SHARED", str(device[1]))


def path_of(rows, classes, dtype, device, multiprocessors=4):
    """Which of its ways the launcher takes."""
    lanes, _, cluster, _, splits, _ = OPS.consistency_plan(
        math.prod(rows), classes, dtype.itemsize, *device, multiprocessors
    )
    if splits:
        return "online" if splits == 1 else "parts"
    return {4: "lanes", 32: "warps", 0: f"cluster of {cluster}"}[lanes]


def gradients(loss, *tensors, grad=1.0):
    """Compares loss and gradients of loss(backend, *tensors) on both backends; grad: the incoming one, of a scalar."""

    def on(backend):
        def run(*given):
            leaves = [t.detach().requires_grad_() for t in given]
            with poisoned_memory(backend == "cuda"):
                out = loss(backend, *leaves)
                first = out if isinstance(out, torch.Tensor) else out[0]
                weights = torch.linspace(-1, 2, first.numel(), device=first.device).view(first.shape)
                extra = () if isinstance(out, torch.Tensor) else tuple(t.detach() for t in out[1:])
                total = (first * (weights if first.dim() else grad)).sum()
                return first.detach(), *extra, *torch.autograd.grad(total, leaves)

        return run

    # A scalar's error is luck: one rounding more or less among a few rows.
    assert_in_budget(on("cuda"), on("reference"), *tensors, multiple=8.0)


# (rows, classes, device, the way that float32 takes there)
SHAPES = {
    "2 classes": ((5,), 2, HOPPER, "lanes"),
    "3 classes": ((7,), 3, HOPPER, "lanes"),
    "1 class": ((4, 3), 1, HOPPER, "lanes"),
    "64 classes": ((3, 7), 64, HOPPER, "lanes"),
    "many rows of 2": ((50, 7), 2, HOPPER, "lanes"),
    "many rows of 100": ((4, 11), 100, HOPPER, "warps"),
    "1,024 classes": ((3, 3), 1024, HOPPER, "warps"),
    "a block": ((3, 3), 1031, HOPPER, "cluster of 1"),
    "few rows": ((2,), 9001, HOPPER, "cluster of 2"),
    "2 blocks": ((1, 5), 2053, SMALL_HOPPER, "cluster of 2"),
    "4 blocks": ((1, 5), 2053, TINY_HOPPER, "cluster of 4"),
    "8 blocks": ((1, 3), 3079, TINY_HOPPER, "cluster of 8"),
    "twice": ((2, 3), 1031, SMALL_AMPERE, "online"),
    "parts": ((2,), 5003, SMALL_AMPERE, "parts"),
    "nothing resident": ((5,), 20, (80, 2100), "online"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("case", SHAPES)
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


@pytest.mark.sanitize
def test_many_rows_are_counted_in_a_launch_of_their_own():
    """Above 2**22 label reads the blocks no longer count the rows themselves."""
    labels, mask = draw_labels((12_000,), 2), draw_mask((12_000,))
    gradients(lambda backend, x: adamix_loss(x, labels, mask=mask, backend=backend), randn(24_000, 2))


@pytest.mark.parametrize("options", [{}, {"num_items": 11}, {"weight": 0.0}, {"ignore_index": 1}])
def test_options(options):
    labels = torch.randint(5, (6, 4), device=DEVICE)
    gradients(lambda backend, x: adamix_loss(x, labels, backend=backend, **options), randn(12, 4, 5), grad=3.0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_the_number_of_items_of_any_dtype(dtype):
    labels, items = torch.randint(5, (6,), device=DEVICE), torch.tensor(11, device=DEVICE)
    got = adamix_loss(x := randn(12, 5), labels, num_items=items.to(dtype), backend="cuda")
    torch.testing.assert_close(got, adamix_loss(x, labels.int(), num_items=items, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("case", ["3 classes", "many rows of 100", "2 blocks", "twice"])
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


@settings(max_examples=12, deadline=None, derandomize=True)
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
    gradients(loss, logits)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("classes", "device"), [(7, HOPPER), (90, HOPPER), (2050, TINY_HOPPER), (3001, SMALL_AMPERE)])
def test_a_masked_vocabulary_adds_nothing(classes, device, detach, monkeypatch):
    """-inf in both passes, here in whole blocks and at the front."""
    pretend(monkeypatch, device)
    kept = randn(4, classes)
    wide = torch.full((4, 2 * classes), -INF, device=DEVICE)
    wide[:, classes:] = kept
    labels = torch.randint(classes, (2,), device=DEVICE)
    run = lambda x, y: adamix_loss(x, y, detach_target=detach, backend="cuda")  # noqa: E731
    want, got = kept.requires_grad_(), wide.requires_grad_()
    a, b = run(want, labels), run(got, labels + classes)
    torch.testing.assert_close(b, a)
    ga, gb = torch.autograd.grad(a.loss, want)[0], torch.autograd.grad(b.loss, got)[0]
    torch.testing.assert_close(gb[:, classes:], ga)
    assert gb[:, :classes].eq(0).all()


@pytest.mark.parametrize(("classes", "device"), [(5, HOPPER), (200, HOPPER), (1500, TINY_HOPPER), (1500, SMALL_AMPERE)])
def test_nan_gives_nan_and_what_is_masked_may_hold_it(classes, device, monkeypatch):
    pretend(monkeypatch, device)
    logits, labels = randn(8, classes), torch.randint(classes, (4,), device=DEVICE)
    logits[5, 2] = float("nan")
    assert adamix_loss(logits, labels, backend="cuda").loss.isnan()
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    x = logits.clone().requires_grad_()
    out = adamix_loss(x, labels, mask=mask, backend="cuda")
    (grad,) = torch.autograd.grad(out.loss, x)
    assert out.loss.isfinite()
    assert grad[[1, 5]].eq(0).all()
    assert grad.isfinite().all()
    logits[5] = -INF
    assert adamix_loss(logits, labels, backend="cuda").loss.isnan()
    logits[5], logits[1, 0] = 0.0, -INF
    assert adamix_loss(logits, labels * 0 + 1, backend="cuda").consistency == INF
    logits[1, 0] = INF
    assert adamix_loss(logits, labels * 0 + 1, backend="cuda").loss.isnan()


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


@pytest.mark.parametrize("device", [HOPPER, TINY_HOPPER, SMALL_AMPERE])
@pytest.mark.parametrize("offset", range(4))
def test_passes_at_any_distance_from_16_bytes(offset, device, monkeypatch):
    pretend(monkeypatch, device)
    b = randn(3 * 1030 + offset)[offset:].view(3, 1030)

    def loss(backend, a):
        return consistency_loss(a, b.to(a.dtype) if a.dtype != b.dtype else b, detach_target=False, backend=backend)

    gradients(loss, randn(3, 1030))


@pytest.mark.parametrize("case", ["3 classes", "many rows of 2", "many rows of 100", "4 blocks", "twice", "parts"])
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
@pytest.mark.parametrize("case", ["3 classes", "many rows of 100", "4 blocks", "parts"])
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


def test_a_correction_leaves_the_gradient_alone_where_the_incoming_one_is_1():
    logits, labels = randn(6, 40), draw_labels((3,), 40)
    options = 1.0, -100, 0.0, True
    out = torch.full_like(logits, 7.0)
    *_, stats, scales = cuda_impl.adamix_forward(logits, labels, None, None, *options)
    one = torch.ones((), device=DEVICE)
    assert cuda_impl.adamix_backward(one, logits, labels, None, stats, scales, *options, out).eq(7).all()
    twice = cuda_impl.adamix_backward(2 * one, logits, labels, None, stats, scales, *options, out)
    torch.testing.assert_close(twice, 2 * cuda_impl.adamix_backward(one, logits, labels, None, stats, scales, *options))
    cuda_impl.rescale(out, one)
    assert torch.equal(out, twice)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 7, 1031])
def test_rescaling_in_place(classes, dtype):
    x, by = randn(3, 5, classes + 3, dtype=dtype), torch.tensor(0.3, device=DEVICE)
    for part in (x[:, 1:, 1:-2], x.transpose(0, 1)):
        want = (part.float() * by).to(dtype)
        cuda_impl.rescale(part, by)
        assert torch.equal(part, want)


# The ways on an H200 (90), an A100 (80), a V100 (70) and a consumer Blackwell (120), bfloat16 and 4,096 row pairs.
H200, A100, V100, BLACKWELL = (90, 232448, 132), (80, 166912, 108), (70, 98304, 80), (120, 101376, 170)


@pytest.mark.parametrize(
    ("classes", "device", "way"),
    [
        (2, V100, "lanes"), (64, H200, "lanes"), (65, H200, "warps"), (1024, A100, "warps"),
        (1025, V100, "cluster of 1"), (50257, H200, "cluster of 1"), (50257, A100, "online"),
        (30522, A100, "cluster of 1"), (50257, BLACKWELL, "cluster of 4"), (128256, H200, "cluster of 4"),
        (128256, V100, "online"), (262144, H200, "cluster of 8"), (1 << 20, H200, "online"),
    ],
)  # fmt: skip
def test_the_way_rows_take(classes, device, way):
    assert path_of((4096,), classes, torch.bfloat16, device[:2], device[2]) == way


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("device", [H200, A100, V100, BLACKWELL])
@pytest.mark.parametrize("rows", [1, 3, 200, 8192])
def test_a_plan_covers_every_column(rows, device, element_bytes):
    for classes in (1, 2, 3, 64, 65, 1024, 1025, 4097, 50257, 128256, 262144, 2**30):
        plan = OPS.consistency_plan(rows, classes, element_bytes, *device)
        lanes, threads, cluster, slots, splits, groups = plan
        # Wherever the row starts.
        pieces = max(-(-(head + classes) // (16 // element_bytes)) for head in range(16 // element_bytes))
        assert slots * cluster * max(splits, 1) >= pieces
        assert splits == 0 or (splits - 1) * slots < pieces
        assert threads % 32 == 0
        assert threads <= 512
        assert cluster == 1 or device[0] >= 90
        assert 1 <= groups <= max(1024, rows)
        if splits == 0:
            assert (threads // lanes if lanes else 1) * 2 * slots * 16 < device[1]


def test_torch_compile_opcheck_and_autocast():
    labels = draw_labels((3, 4), 5)
    run = lambda x: adamix_loss(x, labels, backend="cuda").loss  # noqa: E731
    torch._dynamo.reset()
    x = randn(6, 4, 5).requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(run(x), x)[0])
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(run(x), run(x).float())
    ops = torch.ops.adamix_kernels
    torch.library.opcheck(ops.adamix_loss.default, (x, labels, None, None, 1.0, -100, 0.0, True, "cuda"))


@pytest.mark.skipif(ON_HOST, reason="CUDA graphs are the GPU's")
@pytest.mark.parametrize("classes", [3, 300, 50257])
def test_a_graph_replays_it(classes):
    x, labels = randn(8, classes).requires_grad_(), draw_labels((4,), classes)

    def run():
        out = adamix_loss(x, labels, backend="cuda")
        return out.loss.detach(), *torch.autograd.grad(out.loss, x)

    captured, graph = captured_graph(run)
    with torch.no_grad():
        x.copy_(randn(8, classes))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_float64_is_refused():
    with pytest.raises(BackendUnavailableError, match="float16, bfloat16 and float32"):
        consistency_loss(randn(2, 3, dtype=torch.float64), randn(2, 3, dtype=torch.float64), backend="cuda")


def test_every_backend_has_the_same_functions():
    shared = {name for name in vars(reference) if not name.startswith("_") and callable(getattr(reference, name))}
    assert {"forward", "forward_grad", "adamix_backward", "rescale"} <= shared
    for name in ("forward", "forward_grad", "backward", "adamix_forward", "adamix_forward_grad", "adamix_backward",
                 "linear_forward", "rescale", "unsupported"):  # fmt: skip
        assert callable(getattr(cuda_impl, name))


A, B, MASK = (torch.zeros(shape, device=DEVICE) for shape in ((2, 5), (2, 5), (2,)))
MASK, LABELS, SCALAR = MASK.bool(), MASK.long(), torch.zeros((), device=DEVICE)
LOGITS, STATS, SCALES = (torch.zeros(shape, device=DEVICE) for shape in ((4, 5), (2, 4), (2,)))
OPTIONS = 1.0, -100, 0.0, True
OTHER = "cpu" if DEVICE == "cuda" else "meta"


@pytest.mark.parametrize(
    ("message", "op", "arguments"),
    [
        ("logits_a: got Double", "consistency_forward", (A.double(), B, None, True, "sum", None, None)),
        ("logits_a: got shape", "consistency_forward", (SCALAR, B, None, True, "sum", None, None)),
        ("logits_a: got shape", "consistency_forward", (A[:, :0], B[:, :0], None, True, "sum", None, None)),
        ("logits_b: got Half", "consistency_forward", (A, B.half(), None, True, "sum", None, None)),
        ("logits_b: got shape", "consistency_forward", (A, B[:1], None, True, "sum", None, None)),
        ("logits_b: got another device", "consistency_forward", (A, B.to(OTHER), None, True, "sum", None, None)),
        ("mask: got Long", "consistency_forward", (A, B, MASK.long(), True, "sum", None, None)),
        (r"mask: got shape \(1,\)", "consistency_forward", (A, B, MASK[:1], True, "sum", None, None)),
        ("reduction: got 'mean'", "consistency_forward", (A, B, None, True, "mean", None, None)),
        ("reduction: got 'none'", "consistency_forward", (A, B, None, True, "none", A, None)),
        ("da: got Half", "consistency_forward", (A, B, None, True, "sum", A.half(), None)),
        ("db: got shape", "consistency_forward", (A, B, None, True, "sum", None, B[:1])),
        ("grad: got Half", "consistency_backward", (SCALAR.half(), A, B, None, SCALES, SCALAR, True, A, B, False)),
        ("grad: got shape", "consistency_backward", (STATS, A, B, None, SCALES, SCALAR, True, A, B, False)),
        ("grad: got shape", "consistency_backward", (SCALES, A, B, None, SCALES, SCALAR, True, A, B, True)),
        ("stats: got shape", "consistency_backward", (SCALAR, A, B, None, SCALES, SCALAR, True, A, B, False)),
        ("scale: got shape", "consistency_backward", (SCALAR, A, B, None, LOGITS[:, :2], SCALES, True, A, B, False)),
        ("logits: got shape", "adamix_forward", (A[:1], LABELS, None, None, *OPTIONS, None)),
        ("labels: got Short", "adamix_forward", (LOGITS, LABELS.short(), None, None, *OPTIONS, None)),
        ("labels: got shape", "adamix_forward", (LOGITS, LABELS[:1], None, None, *OPTIONS, None)),
        ("labels: got another device", "adamix_forward", (LOGITS, LABELS.to(OTHER), None, None, *OPTIONS, None)),
        ("num_items: got shape", "adamix_forward", (LOGITS, LABELS, None, LABELS, *OPTIONS, None)),
        ("num_items: got Bool", "adamix_forward", (LOGITS, LABELS, None, MASK[0], *OPTIONS, None)),
        ("d_logits: got shape", "adamix_forward", (LOGITS, LABELS, None, None, *OPTIONS, A)),
        ("stats: got shape", "adamix_backward", (SCALAR, LOGITS, LABELS, None, A, SCALES, *OPTIONS, LOGITS, False)),
        ("scales: got shape", "adamix_backward", (SCALAR, LOGITS, LABELS, None, STATS, A, *OPTIONS, LOGITS, False)),
        ("d_logits: got Half", "adamix_backward",
         (SCALAR, LOGITS, LABELS, None, STATS, SCALES, *OPTIONS, LOGITS.half(), False)),
        ("factors: got shape", "adamix_chunk", (LOGITS, LABELS, None, SCALAR, -100, 0.0, True, True)),
        ("gradient: got Double", "consistency_rescale", (A.double(), SCALAR)),
        ("factor: got shape", "consistency_rescale", (A, SCALES)),
        ("element_bytes: got 8", "consistency_plan", (1, 2, 8, 90, 1000, 4)),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_by_the_library(message, op, arguments):
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, op)(*arguments)
    assert LOGITS.eq(0).all()
    assert A.eq(0).all()
