"""What the tests of the consistency losses on the C++/CUDA backend share: devices, ways, the comparison."""

import functools
import math

import loss_cases
import torch
from cuda_host import DEVICE
from poison import poisoned_memory

OPS = torch.ops.adamix_cuda
# (compute capability, bytes of shared memory) of the device that the CPU stands for; on a GPU it is what it is.
HOPPER, SMALL_HOPPER, TINY_HOPPER, SMALL_AMPERE = (90, 232448), (90, 23600), (90, 15400), (80, 7000)
randn = functools.partial(loss_cases.randn, DEVICE)
draw_labels = functools.partial(loss_cases.draw_labels, DEVICE)
draw_mask = functools.partial(loss_cases.draw_mask, DEVICE)


def pretend(monkeypatch, device):
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", str(device[0]))
    monkeypatch.setenv("ADAMIX_HOST_SHARED", str(device[1]))


def path_of(rows, classes, dtype, device, multiprocessors=4):
    """Which of its ways the launcher takes."""
    lanes, _, cluster, slots, _ = OPS.consistency_plan(
        math.prod(rows), classes, dtype.itemsize, *device, multiprocessors
    )
    if slots * cluster < most_pieces(classes, dtype.itemsize):
        return "tail" if slots else "all tail"
    return {4: "lanes", 32: "warps", 0: f"cluster of {cluster}"}[lanes]


def most_pieces(classes, element_bytes):
    """Pieces of 16 bytes that a row may touch, wherever it starts."""
    size = 16 // element_bytes
    return -(-(size - 1 + classes) // size)


def gradients(loss, *tensors, grad=1.0, same_form=None):
    """Compares loss and gradients of loss(backend, *tensors) on both backends; grad: the incoming one, of a scalar.

    same_form: as check_errors has it.
    """

    def on(backend):
        def run(*given):
            leaves = [t.detach().requires_grad_() for t in given]
            with poisoned_memory(backend != "reference"):
                out = loss(backend, *leaves)
                first = out if isinstance(out, torch.Tensor) else out[0]
                weights = torch.linspace(-1, 2, first.numel(), device=first.device).view(first.shape)
                extra = () if isinstance(out, torch.Tensor) else tuple(t.detach() for t in out[1:])
                total = (first * (weights if first.dim() else grad)).sum()
                return first.detach(), *extra, *torch.autograd.grad(total, leaves)

        return run

    loss_cases.check_errors(on("cuda"), on("reference"), *tensors, same_form=same_form)


# (rows, classes, device, the way that float32 takes there). With 8 rows both passes' begin alike, wherever a row does.
SHAPES = {
    "2 classes": ((5,), 2, HOPPER, "lanes"),
    "3 classes": ((7,), 3, HOPPER, "lanes"),
    "1 class": ((4, 3), 1, HOPPER, "lanes"),
    "64 classes": ((3, 7), 64, HOPPER, "lanes"),
    "many rows of 2": ((50, 7), 2, HOPPER, "lanes"),
    "many rows of 100": ((4, 11), 100, HOPPER, "warps"),
    "1,024 classes": ((3, 3), 1024, HOPPER, "warps"),
    "a block": ((3, 3), 1031, HOPPER, "cluster of 1"),
    "a block, passes alike": ((8,), 1031, HOPPER, "cluster of 1"),
    "few rows": ((2,), 9001, HOPPER, "cluster of 2"),
    "all threads, passes alike": ((8,), 9001, (80, 77000), "cluster of 1"),
    "2 blocks": ((1, 5), 2053, SMALL_HOPPER, "cluster of 2"),
    "4 blocks": ((1, 5), 2053, TINY_HOPPER, "cluster of 4"),
    "8 blocks": ((1, 3), 3079, TINY_HOPPER, "cluster of 8"),
    "tail": ((2, 3), 1031, SMALL_AMPERE, "tail"),
    "tail, passes alike": ((8,), 1031, SMALL_AMPERE, "tail"),
    "mostly tail": ((2,), 5003, SMALL_AMPERE, "tail"),
    "nothing resident": ((5,), 20, (80, 3000), "all tail"),
}
