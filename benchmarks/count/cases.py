"""What is counted: the benchmarks' own cases at the GPU's sizes, and some more; which source decides each count."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import adamix_kernels

from .. import ROOT
from ..ops import consistency as bench_consistency
from ..ops import gated_adapter as bench_gated_adapter
from ..ops import gated_lora as bench_gated_lora
from ..ops import merge as bench_merge
from ..ops import mixture_lora as bench_mixture_lora
from ..ops import routed_adapter as bench_routed_adapter
from ..ops import routed_lora as bench_routed_lora
from ..ops import router as bench_router
from ..ops.cases import Bound, Case, Contender, Inputs, ours

OPS = {
    "consistency": bench_consistency,
    "gated_adapter": bench_gated_adapter,
    "gated_lora": bench_gated_lora,
    "merge": bench_merge,
    "mixture_lora": bench_mixture_lora,
    "routed_adapter": bench_routed_adapter,
    "routed_lora": bench_routed_lora,
    "router": bench_router,
}
# Their time is that of cuBLAS, or of another op here.
_LEFT_OUT = ("linear_adamix_loss", "frozen_linear")
_LOSSES = ("adamix_loss", "consistency_loss", "adamix_loss_full", "adamix_loss_expected")
# Of the files count_*.py, those that decide a row.
_COUNTERS = ("cases", "cuda", "launch", "loops", "memory", "model", "row", "sass", "triton")
# Of ops that share csrc/ with others, the folders there.
_CSRC = {
    "gated_adapter": ("gated", "routed_adapter", "routed_lora"), "gated_lora": ("gated", "routed_lora"),
    "mixture_lora": ("mixture", "gated", "routed_lora", "router"),
}  # fmt: skip
# Of ops whose kernels are built of those of others, these: gates of what has none, the mixture of its parts.
_BUILT_OF = {
    "gated_adapter": ("routed_adapter",), "gated_lora": ("routed_lora",),
    "mixture_lora": ("gated_lora", "routed_lora", "router"),
}  # fmt: skip
# A loss scale, for which the forward may write its gradient.
_SCALE = 1024.0


@dataclass(frozen=True)
class Work:
    """A case in one direction ("both": the loss and its gradient, as one); folder: of the op in ops/ and csrc/."""

    folder: str
    case: Case
    direction: str

    @property
    def op(self) -> str:
        return f"{self.case.op}/{self.direction}"

    @property
    def dtype(self) -> str:
        return str(self.case.dtype).removeprefix("torch.")

    def compiles_for(self, target: int) -> bool:
        """A V100's matrix units have no bfloat16: float16 is what it trains in, and stands for it alone with gates."""
        gated = self.folder.startswith("gated_") and self.dtype == "float16"
        return target < 80 if gated else target >= 80 or self.dtype != "bfloat16"

    @property
    def floor(self) -> float:
        return self.case.traffic[self.direction]

    def __str__(self) -> str:
        return f"{self.op} {self.case.shape} {self.dtype}"


def works(folder: str) -> Iterator[Work]:
    """All that is counted of one op's folder."""
    # The device is a GPU's name alone: nothing is put on it.
    device = torch.device("cuda")
    for which in ("gpu", "count"):
        for case in (*OPS[folder].cases(which, device), *_variants(folder, which, device)):
            if case.op in _LEFT_OUT:
                continue
            directions = [d for d in case.traffic if d != "both"]
            for direction in ["both"] if case.op in _LOSSES else directions:
                yield Work(folder, case, direction)


def _variants(folder: str, which: str, device: torch.device) -> Iterator[Case]:
    """The loss with the gradient of its targets too; and, in float16, told the loss scale that its gradient has. LoRA
    with factors of float32 into weights of 16 bits."""
    if folder == "merge":
        for case in bench_merge.cases(which, device):
            if case.op == "merge_lora" and case.dtype.itemsize == 2:
                yield replace(case, op="merge_lora_mixed", make=_factors_of_float32(case.make))
    if folder != "consistency":
        return
    for case in bench_consistency.cases(which, device):
        if case.op != "adamix_loss" or case.traffic["both"] < 1e9:
            continue
        if which == "gpu":
            yield replace(case, op="adamix_loss_full", contenders=_ours(device, detach_target=False))
        elif (
            case.dtype == torch.float16 and "expected_grad" in inspect.signature(adamix_kernels.adamix_loss).parameters
        ):
            contenders = _ours(device, expected_grad=_SCALE)
            yield replace(case, op="adamix_loss_expected", contenders=contenders, make=_scaled(case.make))


def _ours(device: torch.device, **options) -> list[Contender]:
    def make(backend: str):
        return lambda z, y: adamix_kernels.adamix_loss(z, y, backend=backend, **options).loss

    return ours("consistency", device, make)


def _scaled(make):
    return lambda draw: replace(make(draw), grad=torch.tensor(_SCALE))


def _factors_of_float32(make):
    """Of every three tensors of `make`'s, a weight and its factors, the two factors."""

    def made(draw):
        inputs = make(draw)
        return replace(inputs, leaves=tuple(t.float() if n % 3 else t for n, t in enumerate(inputs.leaves)))

    return made


def bound(case: Case, backend: str, inputs: Inputs, gradient: bool) -> Bound:
    """The case's call on these inputs by one of our backends; raises AbsentError where it has none."""
    contender = next(one for one in case.contenders if one.name == backend)
    leaves = tuple(t.detach().requires_grad_(gradient) for t in inputs.leaves)
    return contender.open()(replace(inputs, leaves=leaves))


@functools.cache
def fingerprint(folder: str, backend: str) -> str:
    """Of all sources that can change a count of this op and backend, the counters' own included."""
    package, here = Path(adamix_kernels.__file__).parent, Path(__file__).parent
    paths = [*(package / "ops" / folder).glob("*.py"), *(package / "ops").glob("*.py")]
    paths += [here / f"{name}.py" for name in _COUNTERS]
    folders = folder, *_BUILT_OF.get(folder, ())
    if backend == "triton":
        paths += [p for name in folders for p in (package / "ops" / name / "triton_impl").glob("*.py")]
        paths.append(package / "_triton_utils.py")
    else:
        csrc = ROOT / "csrc"
        paths += [
            p
            for name in (*_CSRC.get(folder, (folder,)), "common")
            for p in (csrc / name).iterdir()
            if p.suffix in (".h", ".cu", ".cpp")
        ]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
