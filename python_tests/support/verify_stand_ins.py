"""Devices that stand in for GPUs where kernels are verified: what a verifying process calls first, and faults.

The setups here run in the child, which finds this module through PYTHONPATH: nothing of the package names it.
"""

import ctypes
import functools
import json
import os
import signal
import time
from types import ModuleType

import torch

import adamix_kernels
from adamix_kernels import _backends, verifying
from adamix_kernels.verifying import Machine
from adamix_kernels.verifying.machine import Job

# "op backend dtype shape" -> the name of a fault below.
FAULTS = "VERIFY_TEST_FAULTS"
PLAIN = Machine("cpu", "a CPU that plays an A100", 80, 108, "none", "verify_stand_ins:plain")


def plain():
    """backend="triton" and "cuda" are the reference under other names, with the faults that the environment says."""
    faults = json.loads(os.environ.get(FAULTS, "{}"))
    load, problem = _backends._load, _backends._problem
    _backends._problem = lambda op, backend, device, dtype: None
    _backends._load = functools.cache(
        lambda op, backend: load(op, backend) if backend == "reference" else disguised(op, backend, faults)
    )
    _backends._asked.cache_clear()
    _backends._selected.cache_clear()
    return load, problem


def nothing():
    """The environment says it all: TRITON_INTERPRET=1 or ADAMIX_CUDA_HOST."""


def ptx():
    """backend="triton" is what Triton compiles for an A100, run on the CPU."""
    import ptx.host

    host = ptx.host.install(80)
    host.orders = host.orders[:1]
    return host


def check_the_whole_path(machine, backend, store):
    """Verifies merging in float32 and looks that it is right and kept; gives the function that must now launch it."""
    job = Job("merge", backend, "float32", "any")
    report = verifying.settle([(machine, [job])], seconds=300, one_case=150, store=store)
    (verdict,) = report.verdicts
    assert (verdict.state, verdict.why, verdict.cases) == ("right", "", 7)
    assert report.chosen == {(machine.name, "merge", "float32", "any"): backend}
    assert store.read(job, machine) == verdict

    def run(bank):
        got = adamix_kernels.merge_experts(bank)
        want = adamix_kernels.merge_experts(bank, backend="reference")
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    return run


def disguised(op, backend, faults, calls=None):
    """The reference's module of an op, whose calls are noted, with faults."""
    import importlib

    reference = importlib.import_module(f"adamix_kernels.ops.{op}.reference")
    module = ModuleType(f"{op}.{backend}")
    module.__dict__.update({k: v for k, v in vars(reference).items() if not k.startswith("__")})
    first = {"routed_adapter": "forward", "routed_lora": "forward", "merge": "experts_forward"}.get(op)
    if first is None:
        return module

    @functools.wraps(getattr(reference, first))
    def forward(x, *rest, **options):
        if calls is not None:
            calls.append((op, backend))
        narrow = rest[0].shape[0] * rest[0].shape[1] if op != "merge" else 0
        shape = "any" if op == "merge" else "narrow" if narrow <= 256 else "wide"
        fault = faults.get(f"{op} {backend} {str(x.dtype).removeprefix('torch.')} {shape}")
        if fault in BEFORE:
            BEFORE[fault](x)
        made = getattr(reference, first)(x, *rest, **options)
        out = made if isinstance(made, torch.Tensor) else made[0]
        if fault in AFTER:
            AFTER[fault](out, x)
        return made

    setattr(module, first, forward)
    return module


def _factor(out, x):
    out.mul_(1.01)


def _tail(out, x):
    if out.shape[-1] % 16:
        out[..., -1].mul_(1.5)


def _row(out, x):
    if x.shape[0] * x.shape[1] == 1:
        out.add_(1)


def _random(out, x):
    out.copy_(torch.where(torch.rand(out.shape) < 0.2, torch.nextafter(out, out + 1), out))


def _unwritten(out, x):
    out.view(-1)[-1] = float("nan")


def _beyond(out, x):
    ctypes.memset(out.data_ptr() + out.numel() * out.itemsize, 0, out.itemsize)


def _overwrites(out, x):
    x.view(-1)[0] = 0 if x.is_contiguous() else x.view(-1)[0]


def _raises(x):
    raise RuntimeError("no kernel image is available")


def _segfaults(x):
    os.kill(os.getpid(), signal.SIGSEGV)


def _hangs(x):
    time.sleep(600)


BEFORE = {"raises": _raises, "segfaults": _segfaults, "hangs": _hangs}
AFTER = {
    "factor": _factor, "tail": _tail, "row": _row, "random": _random, "unwritten": _unwritten, "beyond": _beyond,
    "overwrites": _overwrites,
}  # fmt: skip
