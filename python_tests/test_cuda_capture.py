"""No op's forward or backward on the C++/CUDA backend waits for the GPU, allocates past torch, or reads a value.

On the CPU the CUDA runtime's stand-in and PyTorch's dispatcher note what is called; on a GPU a graph is captured.
"""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import functools

import pytest
import torch
from cuda_host import DEVICE, EACH_LAUNCH, ON_HOST, names, needs_cuda, runtime_calls

needs_cuda()

from adapter_cases import draw_adapter
from cuda_losses import pretend
from cuda_probes import captured_graph
from plain_lora import draw_lora
from sync_spy import SyncSpy

import adamix_kernels.ops.consistency.grad_op as loss_grad_op
import adamix_kernels.ops.consistency.op as loss_op
import adamix_kernels.ops.routed_adapter.op as adapter_op
import adamix_kernels.ops.routed_lora.op as lora_op
from adamix_kernels import functional as F
from adamix_kernels.ops.merge.api import merge_banks


def randn(*shape):
    return torch.randn(*shape, device=DEVICE).requires_grad_()


def with_gradients(run, *leaves):
    def both():
        out = run()
        out = out if isinstance(out, torch.Tensor) else out[0]
        return (out.detach(), *torch.autograd.grad(out.sum(), leaves))

    return both


def adapter(kinds, tokens=9):
    (x, *banks, _), indices = draw_adapter(DEVICE, torch.float32, 3, tokens, 20, 4, 3, 2, *kinds)
    leaves = [t.requires_grad_() for t in (x, *banks)]
    return with_gradients(lambda: F.routed_adapter(*leaves, *indices, residual=leaves[0], backend="cuda"), *leaves)


def lora(**more):
    (x, a, b, base, _), options = draw_lora(DEVICE, "sample", "token", groups=2, dtype=torch.float32, tokens=7)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    run = functools.partial(F.routed_lora, *leaves, **options, **more, backend="cuda")
    return with_gradients(lambda: run(base=base * 1), *leaves)


def logits(classes):
    x = randn(6, 5, classes)
    labels = torch.randint(classes, (3, 5), device=DEVICE)
    mask = torch.rand(3, 5, device=DEVICE) < 0.7
    return x, labels, mask


def adamix(classes=11, items=None, **options):
    x, labels, mask = logits(classes)
    items = torch.tensor(4, device=DEVICE) if items == "tensor" else items
    run = functools.partial(F.adamix_loss, x, labels, mask=mask, num_items=items, **options, backend="cuda")
    return with_gradients(run, x)


def consistency(reduction):
    x, y, mask = randn(3, 5, 11), randn(3, 5, 11), logits(11)[2]
    return with_gradients(lambda: F.consistency_loss(x, y, mask=mask, reduction=reduction, backend="cuda"), x, y)


def linear():
    hidden, weight, bias = randn(6, 5, 8), randn(13, 8), randn(13)
    _, labels, mask = logits(13)
    run = functools.partial(F.linear_adamix_loss, hidden, weight, labels, bias=bias, mask=mask, backend="cuda")
    return with_gradients(run, hidden, weight, bias)


def experts(scores):
    bank, given = randn(3, 4, 5), randn(3) if scores else None
    leaves = [bank] if given is None else [bank, given]
    return with_gradients(lambda: F.merge_experts(bank, given, backend="cuda"), *leaves)


def factors():
    weight, a, b = randn(12, 10), randn(3, 4, 10), randn(3, 8, 2)
    options = dict(scaling=0.5, groups=2, output_offsets=(0, 8), backend="cuda")
    return with_gradients(lambda: F.merge_lora(weight, a, b, **options), weight, a, b)


def banks():
    many, scores = [torch.randn(3, 4, 5, device=DEVICE) for _ in range(5)], [None] * 4
    scores.append(torch.randn(3, device=DEVICE))
    return lambda: tuple(merge_banks(many, scores, backend="cuda"))


CASES = {
    "adapter, samples": lambda: adapter(("sample", "sample")),
    "adapter, tokens": lambda: adapter(("token", "token")),
    "adapter, rows shared out": lambda: adapter(("token", "sample"), 120),
    "lora": lora,
    "lora, dropout": lambda: lora(dropout_p=0.3, seed=torch.tensor(5, device=DEVICE)),
    "lora, a number as seed": lambda: lora(dropout_p=0.3, seed=5),
    "lora, in place": lambda: lora(inplace=True),
    "adamix_loss": adamix,
    "adamix_loss, items": lambda: adamix(items=7),
    "adamix_loss, a tensor of items": lambda: adamix(items="tensor", label_smoothing=0.1),
    "adamix_loss, full": lambda: adamix(classes=1031, detach_target=False),
    "consistency_loss": lambda: consistency("batchmean"),
    "consistency_loss, none": lambda: consistency("none"),
    "linear_adamix_loss": linear,
    "merge_experts": lambda: experts(False),
    "merge_experts, scores": lambda: experts(True),
    "merge_lora": factors,
    "merge_banks": banks,
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Without the checks of values that the CPU alone makes unasked."""
    monkeypatch.setattr(adapter_op, "check_index_values", lambda *_: None)
    monkeypatch.setattr(lora_op, "check_index_values", lambda *_: None)
    monkeypatch.setattr(loss_op, "_check_labels", lambda *_: None)
    monkeypatch.setattr(loss_grad_op, "_check_labels", lambda *_: None)


@pytest.mark.skipif(not ON_HOST, reason="the CUDA runtime's calls are noted on the CPU; a GPU captures graphs instead")
@pytest.mark.parametrize("name", CASES)
def test_after_its_first_call_it_launches_and_nothing_else(name, as_on_a_gpu):
    run = CASES[name]()
    run()
    runtime_calls()
    with SyncSpy() as spy:
        run()
    calls = runtime_calls()
    assert names(calls) <= EACH_LAUNCH
    assert "cudaLaunchKernelEx" in calls
    assert spy.found == []
    assert any(name.startswith("adamix_cuda::") for name in spy.seen)


@pytest.mark.skipif(not ON_HOST, reason="the emulated device is the CPU's")
@pytest.mark.parametrize("device", [(90, 12_000), (90, 7_000), (80, 7_000)])
def test_every_way_of_a_loss(device, as_on_a_gpu, monkeypatch):
    """Clusters, rows read twice, rows in parts."""
    pretend(monkeypatch, device)
    run = adamix(classes=2053)
    run()
    runtime_calls()
    with SyncSpy() as spy:
        run()
    assert names(runtime_calls()) <= EACH_LAUNCH
    assert spy.found == []


@pytest.mark.skipif(not ON_HOST, reason="a GPU would wait")
def test_the_spy_sees_what_waits():
    """What a GPU waits for, or a graph cannot hold, one by one; and inside an op."""
    x = torch.randn(6, 5, device=DEVICE)
    waits = {
        "aten::_local_scalar_dense": lambda: x[0, 0].item(),
        "aten::is_nonzero": lambda: bool((x > 9).any()),
        "aten::nonzero": lambda: x.nonzero(),
        "aten::index": lambda: x[x > 0],
        "aten::lift_fresh": lambda: torch.tensor([1.0]),
        "aten::equal": lambda: torch.equal(x, x),
        "aten::_to_copy from another device": lambda: x.to("meta"),
    }
    for name, run in waits.items():
        with SyncSpy() as spy:
            run()
        assert name in spy.found or spy.found == ["aten::_local_scalar_dense"], (name, spy.found)
    with SyncSpy() as spy:
        F.adamix_loss(x, torch.randint(5, (3,)), backend="cuda")
    assert spy.found  # labels are checked on the CPU


@pytest.mark.skipif(ON_HOST, reason="CUDA graphs are the GPU's")
@pytest.mark.parametrize("name", CASES)
def test_a_graph_captures_it(name):
    run = CASES[name]()
    want = [t.clone() for t in run()]
    captured, graph = captured_graph(run)
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))
