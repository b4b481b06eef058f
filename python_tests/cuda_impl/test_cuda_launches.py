"""What is asked of the CUDA runtime: attributes once, clusters that can be scheduled, nothing a graph cannot capture.

On the CPU the runtime is a stand-in (csrc/host/runtime.h) that keeps the driver's rules and notes every call.
"""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import re
import threading
from pathlib import Path

import pytest
import torch
from cuda_host import EACH_LAUNCH, ON_HOST, names, needs_cuda, runtime_calls

needs_cuda()
if not ON_HOST:
    pytest.skip("the CUDA runtime notes no calls; set ADAMIX_CUDA_HOST", allow_module_level=True)

from cuda_losses import gradients, pretend, randn

from adamix_kernels.functional import adamix_loss, consistency_loss
from reliability.fuzz_cuda import launch_names

_CSRC = Path(__file__).parents[2] / "csrc"
SHARED, CARVEOUT = 8, 9  # of cudaFuncAttribute
# Every other call of the CUDA runtime in csrc/: once for a device, a kernel or a failure.
ONCE = {
    "cudaDeviceGetAttribute", "cudaFuncGetAttributes", "cudaFuncSetAttribute", "cudaOccupancyMaxActiveClusters",
    "cudaDriverGetVersion", "cudaRuntimeGetVersion", "cudaGetLastError", "cudaGetErrorString",
}  # fmt: skip


def asked(calls, attribute):
    return [int(call.split()[2]) for call in calls if call.startswith(f"cudaFuncSetAttribute {attribute} ")]


def test_no_other_call_stands_in_the_sources():
    sources = [path for path in _CSRC.rglob("*") if path.is_file() and path.parent.name != "host"]
    found = {name for path in sources for name in re.findall(r"\b(cuda[A-Z]\w*)\s*\(", path.read_text())}
    # Of a struct, an enumerator and a header's own names none is called.
    assert found == EACH_LAUNCH | ONCE


def test_a_kernel_may_take_the_devices_whole_shared_memory_from_its_first_launch_on(monkeypatch):
    pretend(monkeypatch, (90, 198_000))
    runtime_calls()
    consistency_loss(randn(2, 8000), randn(2, 8000), backend="cuda")  # 64 KB
    first = runtime_calls()
    assert set(asked(first, SHARED)) == {198_000}
    assert set(asked(first, CARVEOUT)) == {100}
    consistency_loss(randn(2, 24000), randn(2, 24000), backend="cuda")  # 192 KB
    assert names(runtime_calls()) <= EACH_LAUNCH


def test_two_threads_launch_two_sizes_at_once(monkeypatch):
    pretend(monkeypatch, (90, 199_000))
    errors, calls = [], []
    pairs = {classes: (randn(2, classes), randn(2, classes)) for classes in (8000, 24000)}
    start = threading.Barrier(len(pairs))

    def run(classes):
        start.wait()
        try:
            for _ in range(3):
                consistency_loss(*pairs[classes], backend="cuda")
        except RuntimeError as error:
            errors.append(error)
        calls.extend(runtime_calls())

    threads = [threading.Thread(target=run, args=(classes,)) for classes in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert asked(calls, SHARED) == [199_000]


# 8,200 float32 classes are 65.6 KB a row pair: a block, two, or four and eight blocks of a cluster.
CLASSES = 8200


def launched(run):
    runtime_calls()
    with launch_names() as kernels:
        run()
    return kernels, runtime_calls()


@pytest.mark.parametrize(
    ("largest", "way"),
    [(8, "consistency_cluster"), (4, "consistency_cluster"), (2, "consistency_tail"), (1, "consistency_tail")],
)
def test_a_cluster_that_no_slice_of_the_gpu_holds_is_not_launched(largest, way, monkeypatch):
    """20,000 bytes a block are enough for clusters of 4; where there are none the rows are read twice."""
    pretend(monkeypatch, (90, 20_000))
    monkeypatch.setenv("ADAMIX_HOST_CLUSTER", str(largest))
    monkeypatch.setenv("ADAMIX_HOST_CLUSTER_RUN", str(largest))
    loss = lambda backend, a, b: consistency_loss(a, b, detach_target=False, backend=backend)  # noqa: E731
    a, b = randn(3, CLASSES), randn(3, CLASSES)
    kernels, _ = launched(lambda: loss("cuda", a, b))
    assert kernels[0] == way
    gradients(loss, a, b)
    # Asked once, the largest size first.
    _, calls = launched(lambda: loss("cuda", a, b))
    assert names(calls) <= EACH_LAUNCH


def test_a_cluster_that_fails_to_launch_is_tried_once(monkeypatch):
    pretend(monkeypatch, (90, 20_001))
    monkeypatch.setenv("ADAMIX_HOST_CLUSTER_RUN", "2")
    x, labels = randn(6, CLASSES).requires_grad_(), torch.tensor([3, 8199, -100])
    run = lambda backend: torch.autograd.grad(adamix_loss(x, labels, backend=backend).loss, x)[0]  # noqa: E731
    kernels, _ = launched(lambda: run("cuda"))
    assert kernels[0] == "consistency_cluster"  # refused
    assert "consistency_tail" in kernels
    again, calls = launched(lambda: run("cuda"))
    assert again[0] == "consistency_tail"
    assert names(calls) <= EACH_LAUNCH
    torch.testing.assert_close(run("cuda"), run("reference"), rtol=1e-4, atol=1e-7)


def test_another_device_is_asked_for_itself(monkeypatch):
    """What one GPU cannot hold, another one may."""
    a, b = randn(3, CLASSES), randn(3, CLASSES)
    found = []
    for largest in ("2", "8", "2"):
        pretend(monkeypatch, (90, 20_002))
        monkeypatch.setenv("ADAMIX_HOST_CLUSTER", largest)
        found += launched(lambda: consistency_loss(a, b, backend="cuda"))[0][:1]
    assert found == ["consistency_tail", "consistency_cluster", "consistency_tail"]
