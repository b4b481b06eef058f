"""No op's forward or backward on the C++/CUDA backend waits for the GPU, allocates past torch, or reads a value.

On the CPU the CUDA runtime's stand-in and PyTorch's dispatcher note what is called; on a GPU a graph is captured.
"""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, EACH_LAUNCH, ON_HOST, names, needs_cuda, runtime_calls

needs_cuda()

from capture_cases import Calls, as_on_a_gpu, check_graph
from cuda_losses import pretend
from sync_spy import SyncSpy

from adamix_kernels import functional as F

CALLS = Calls("cuda", DEVICE)
CASES = CALLS.cases() | {
    "adapter, samples": lambda: CALLS.adapter(("sample", "sample")),
    "adapter, rows shared out": lambda: CALLS.adapter(("token", "sample"), 120),
    "adamix_loss, full": lambda: CALLS.adamix(classes=1031, detach_target=False),
}


@pytest.mark.skipif(not ON_HOST, reason="the CUDA runtime's calls are noted on the CPU; a GPU captures graphs instead")
@pytest.mark.parametrize("name", CASES)
def test_after_its_first_call_it_launches_and_nothing_else(name, monkeypatch):
    as_on_a_gpu(monkeypatch)
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
def test_every_way_of_a_loss(device, monkeypatch):
    """Clusters, rows read twice, rows in parts."""
    as_on_a_gpu(monkeypatch)
    pretend(monkeypatch, device)
    run = CALLS.adamix(classes=2053)
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
    check_graph(CASES[name]())
