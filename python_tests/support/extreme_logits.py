"""Gradients of the consistency itself (detach_target=False) where its parts cancel, on any backend's kernels."""

import torch

from reliability.numerics import measure
from reliability.numerics.cases import cases

CASES = {case.variant: case for case in cases() if case.op_name == "consistency_loss" and "full" in case.variant}


def check(backend, device, variant, scale, limit=2):
    """At most `limit` times PyTorch's error in float32; scale: of the logits."""
    case = CASES[variant]

    def op(*tensors):
        return tuple(out.cpu() for out in case.op(backend, *(t.to(device) for t in tensors)))

    errors = measure.errors(case, op, torch.float32, scale, 2)
    units = measure.units(case, torch.float32, scale, 32)
    worst = {name: error / unit for name, error, unit in zip(case.names, errors, units, strict=True)}
    assert max(worst.values()) <= limit, worst
