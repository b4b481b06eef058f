"""The consistency losses on the C++/CUDA backend: the way rows take, compilation, graphs, wrong arguments."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
import torch._dynamo.testing
from cuda_host import DEVICE, ON_HOST, needs_cuda

needs_cuda()

from cuda_losses import OPS, draw_labels, most_pieces, path_of, randn
from cuda_probes import captured_graph

from adamix_kernels import BackendUnavailableError
from adamix_kernels.functional import adamix_loss, consistency_loss
from adamix_kernels.ops.consistency import cuda_impl, reference

# The ways on an H200 (90), an A100 (80), a V100 (70) and a consumer Blackwell (120), bfloat16 and 4,096 row pairs.
H200, A100, V100, BLACKWELL = (90, 232448, 132), (80, 166912, 108), (70, 98304, 80), (120, 101376, 170)


@pytest.mark.parametrize(
    ("classes", "device", "way"),
    [
        (2, V100, "lanes"), (64, H200, "lanes"), (65, H200, "warps"), (1024, A100, "warps"),
        (1025, V100, "cluster of 1"), (50257, H200, "cluster of 2"), (50257, A100, "tail"),
        (30522, A100, "cluster of 1"), (50257, BLACKWELL, "cluster of 8"), (128256, H200, "cluster of 8"),
        (128256, V100, "tail"), (262144, H200, "cluster of 8"), (1 << 20, H200, "tail"),
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
        lanes, threads, cluster, slots, groups = plan
        teams = threads // lanes if lanes else 1
        # What no block holds is a block's tail, which has no cluster.
        held = slots * cluster >= most_pieces(classes, element_bytes)
        assert held or (lanes, cluster) == (0, 1)
        assert threads % 32 == 0
        # Of 16 bits, a kernel for each of three numbers; that of rows with a tail counts on the largest.
        assert lanes or threads in ((128, 256, 512) if held else (512,))
        assert cluster == 1 or device[0] >= 90
        assert 1 <= groups <= -(-rows // teams)
        assert teams * 2 * slots * 16 < device[1]


@pytest.mark.parametrize(("rows", "launches"), [(1, 1), (1024, 1), (1025, 2)])
@pytest.mark.parametrize("classes", [2, 3, 64])
def test_up_to_64_classes_take_one_launch_for_a_classifiers_batch(classes, rows, launches):
    for device in (H200, A100, V100, BLACKWELL):
        groups = OPS.consistency_plan(rows, classes, 2, *device)[-1]
        assert min(groups, 2) == launches


def test_two_blocks_share_a_multiprocessor_where_clusters_make_them_small_enough():
    for classes in (4097, 30522, 50257, 128256):
        _, threads, _, slots, groups = OPS.consistency_plan(8192, classes, 2, *H200)
        assert 2 * (2 * slots * 16 + 4096) <= H200[1]
        assert 2 * threads <= 512
        assert groups > 1


@pytest.mark.parametrize(("classes", "cluster"), [(30522, 2), (128256, 8)])
def test_a_third_block_rather_than_as_many_warps(classes, cluster):
    """Every warp has the same to do beside its columns; 50,257 classes leave room for two blocks alone."""
    _, threads, found, slots, groups = OPS.consistency_plan(8192, classes, 2, *H200)
    assert (threads, found) == (128, cluster)
    assert 3 * (2 * slots * 16 + 4096) <= H200[1]
    assert groups >= 3 * H200[2] // cluster
    assert OPS.consistency_plan(8192, 50257, 2, *H200)[1] == 256
    few = 2 * H200[2] // cluster  # as many rows as two blocks a multiprocessor take at once
    assert OPS.consistency_plan(few, classes, 2, *H200)[1] == 256


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
    assert {"forward", "forward_grad", "adamix_backward", "rescale", "writes_gradient"} <= shared
    for name in ("forward", "forward_grad", "backward", "adamix_forward", "adamix_forward_grad", "adamix_backward",
                 "linear_forward", "rescale", "unsupported", "writes_gradient"):  # fmt: skip
        assert callable(getattr(cuda_impl, name))


A, B, MASK = (torch.zeros(shape, device=DEVICE) for shape in ((2, 5), (2, 5), (2,)))
MASK, LABELS, SCALAR = MASK.bool(), MASK.long(), torch.zeros((), device=DEVICE)
LOGITS, STATS, SCALES = (torch.zeros(shape, device=DEVICE) for shape in ((4, 5), (2, 4), (2,)))
OPTIONS = 1.0, -100, 0.0, True
OTHER = "cpu" if DEVICE == "cuda" else "meta"


@pytest.mark.parametrize(
    ("message", "op", "arguments"),
    [
        ("logits_a: got Double", "consistency_forward", (A.double(), B, None, True, "sum", 1.0, None, None)),
        ("logits_a: got shape", "consistency_forward", (SCALAR, B, None, True, "sum", 1.0, None, None)),
        ("logits_a: got shape", "consistency_forward", (A[:, :0], B[:, :0], None, True, "sum", 1.0, None, None)),
        ("logits_b: got Half", "consistency_forward", (A, B.half(), None, True, "sum", 1.0, None, None)),
        ("logits_b: got shape", "consistency_forward", (A, B[:1], None, True, "sum", 1.0, None, None)),
        ("logits_b: got another device", "consistency_forward", (A, B.to(OTHER), None, True, "sum", 1.0, None, None)),
        ("mask: got Long", "consistency_forward", (A, B, MASK.long(), True, "sum", 1.0, None, None)),
        (r"mask: got shape \(1,\)", "consistency_forward", (A, B, MASK[:1], True, "sum", 1.0, None, None)),
        ("reduction: got 'mean'", "consistency_forward", (A, B, None, True, "mean", 1.0, None, None)),
        ("reduction: got 'none'", "consistency_forward", (A, B, None, True, "none", 1.0, A, None)),
        ("da: got Half", "consistency_forward", (A, B, None, True, "sum", 1.0, A.half(), None)),
        ("db: got shape", "consistency_forward", (A, B, None, True, "sum", 1.0, None, B[:1])),
        ("grad: got Half", "consistency_backward", (SCALAR.half(), A, B, None, SCALES, SCALAR, True, A, B, None)),
        ("grad: got shape", "consistency_backward", (STATS, A, B, None, SCALES, SCALAR, True, A, B, None)),
        ("grad: got shape", "consistency_backward", (SCALES, A, B, None, SCALES, SCALAR, True, A, B, 1.0)),
        ("stats: got shape", "consistency_backward", (SCALAR, A, B, None, SCALES, SCALAR, True, A, B, None)),
        ("scale: got shape", "consistency_backward", (SCALAR, A, B, None, LOGITS[:, :2], SCALES, True, A, B, None)),
        ("logits: got shape", "adamix_forward", (A[:1], LABELS, None, None, *OPTIONS, 1.0, None)),
        ("labels: got Short", "adamix_forward", (LOGITS, LABELS.short(), None, None, *OPTIONS, 1.0, None)),
        ("labels: got shape", "adamix_forward", (LOGITS, LABELS[:1], None, None, *OPTIONS, 1.0, None)),
        ("labels: got another device", "adamix_forward", (LOGITS, LABELS.to(OTHER), None, None, *OPTIONS, 1.0, None)),
        ("num_items: got shape", "adamix_forward", (LOGITS, LABELS, None, LABELS, *OPTIONS, 1.0, None)),
        ("num_items: got Bool", "adamix_forward", (LOGITS, LABELS, None, MASK[0], *OPTIONS, 1.0, None)),
        ("d_logits: got shape", "adamix_forward", (LOGITS, LABELS, None, None, *OPTIONS, 1.0, A)),
        ("stats: got shape", "adamix_backward", (SCALAR, LOGITS, LABELS, None, A, SCALES, *OPTIONS, LOGITS, None)),
        ("scales: got shape", "adamix_backward", (SCALAR, LOGITS, LABELS, None, STATS, A, *OPTIONS, LOGITS, None)),
        ("d_logits: got Half", "adamix_backward",
         (SCALAR, LOGITS, LABELS, None, STATS, SCALES, *OPTIONS, LOGITS.half(), None)),
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
