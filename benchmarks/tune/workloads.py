"""What the tuner runs: every kernel in the call that launches it, its candidates and its check."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from adamix_kernels import _triton_utils
from adamix_kernels._triton_utils import capability
from adamix_kernels.ops._triton_tables import Config
from adamix_kernels.ops.mixture_lora.triton_impl.plan import PADDED
from adamix_kernels.testing import error_in_budget

from .table import ShapeClass

__all__ = ["KERNELS", "Workload", "candidates", "capability", "make", "problem", "shape_classes"]

# A table's name starts with the family of its kernels; a family lives in an op's backend.
_OPS = {"adapter": "routed_adapter", "lora": "routed_lora"}
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
# Tail tiles in every sample, and enough tiles that none is cut smaller for want of programs.
SIZES = dict(batch=131, tokens=500, hidden=1024, experts=4)
# Wider than any rank: there the narrow tile holds the columns of several experts, one per token.
_MAX_RANK = {"adapter": 256, "lora": 128}


def _family(kernel: str) -> str:
    return kernel.partition("_")[0]


def _part(kernel: str, name: str) -> ModuleType:
    return importlib.import_module(f"adamix_kernels.ops.{_OPS[_family(kernel)]}.{name}")


def _tables(kernel: str) -> ModuleType:
    return _part(kernel, "triton_impl.tables")


KERNELS = tuple(dict.fromkeys(kernel for family in _OPS for kernel in _tables(family).TABLES))


def problem() -> str | None:
    """Why Triton kernels cannot run on this machine's GPU, or None."""
    found = next((p for d in _DTYPES.values() if (p := _triton_utils.problem("cuda", d)) is not None), None)
    return found or _triton_utils.device_problem(torch.device("cuda"))


def shape_classes(kernels: Iterable[str]) -> Iterator[ShapeClass]:
    """Every class that a shipped table of these kernels has."""
    for kernel in kernels:
        classes = {key for classes in _tables(kernel).TABLES[kernel].values() for key in classes}
        yield from (ShapeClass(kernel, *key) for key in sorted(classes))


def candidates(shape: ShapeClass, shared: int) -> list[Config]:
    """Block sizes worth trying: accumulators that fit the registers, staged tiles that fit `shared` bytes."""
    made = []
    for rows in (16, 32, 64, 128):
        for cols in (32, 64, 128, 256):
            kept, step = _footprint(shape, rows, cols)
            # mixture_lora takes the same blocks, and the columns of a router in float32 beside them.
            beside = 4 * PADDED * cols if shape.kernel == "lora_forward_kernel" else 0
            for warps, stages in ((4, 2), (4, 3), (4, 4), (8, 2), (8, 3)):
                if kept <= 128 * 32 * warps and stages * (step * shape.itemsize + beside) <= shared:
                    made.append(Config(rows, cols, warps, stages))
    return made


def _footprint(shape: ShapeClass, rows: int, cols: int) -> tuple[int, int]:
    """(float32 numbers of the largest accumulator, elements loaded by one step of the inner loop)."""
    summed_over_rows = shape.kernel in ("adapter_weight_grad_kernel", "lora_grads_kernel")
    return max((cols if summed_over_rows else rows) * shape.width, rows * cols), (rows + shape.width) * cols


@dataclass
class Workload:
    """One kernel's call on rotating inputs.

    module: the backend timed. function: "forward" or "backward". inputs: arguments, one tuple for each call in turn.
    """

    module: ModuleType
    reference: ModuleType
    function: str
    inputs: list[tuple]
    shipped: Config
    candidates: list[Config]
    _expected: tuple | None = None

    def call(self, k: int):
        return getattr(self.module, self.function)(*self.inputs[k % len(self.inputs)])

    def problem(self) -> str | None:
        """What is wrong with the results on the first inputs, or why the kernel cannot run; None when right."""
        try:
            results, again = self.call(0), self.call(0)
        except (OutOfResources, PTXASError, CompilationError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if self._expected is None:
            self._expected = self._reference(torch.float64), self._reference(results[0].dtype)
        for number, (result, exact, own) in enumerate(zip(results, *self._expected, strict=True)):
            if not torch.equal(result, again[number]):
                return f"output {number} differs between two calls"
            # Three TF32 products err somewhat more than float32 does.
            right, figures = error_in_budget(result, exact, own, 4.0)
            if not right:
                return f"output {number}: {figures}"
        return None

    def _reference(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        arguments = [
            a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in self.inputs[0]
        ]
        return getattr(self.reference, self.function)(*arguments)


def make(shape: ShapeClass, device: torch.device, sizes: dict[str, int] | None = None) -> Workload:
    """The call of a class: per-sample routing at rank = width, per-token where only several experts are that wide."""
    family, sizes, rank = _family(shape.kernel), dict(sizes or SIZES), shape.width
    per_token = shape.width > _MAX_RANK[family]
    if per_token:
        rank, sizes["experts"] = 16, shape.width // 16
    bytes_of_x = sizes["batch"] * sizes["tokens"] * sizes["hidden"] * shape.itemsize
    cache, shared = 0, 232_448
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cache, shared = properties.L2_cache_size, properties.shared_memory_per_block_optin
    draw = _Draw(device, _DTYPES[shape.itemsize], torch.Generator(device).manual_seed(0))
    arguments = {"adapter": _adapter, "lora": _lora}[family]
    reference, timed = _part(shape.kernel, "reference"), _part(shape.kernel, "triton_impl")
    sets = [
        arguments(shape.kernel, draw, reference, rank=rank, per_token=per_token, **sizes)
        for _ in range(max(2, -(-2 * cache // bytes_of_x)))
    ]
    shipped = _tables(shape.kernel).config(shape.kernel, capability(device), shape.itemsize, shape.width)
    return Workload(timed, reference, sets[0][0], [inputs for _, inputs in sets], shipped, candidates(shape, shared))


@dataclass(frozen=True)
class _Draw:
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).mul_(scale).to(self.dtype)

    def index(self, experts: int, *shape: int) -> torch.Tensor:
        return torch.randint(experts, shape, device=self.device, generator=self.generator)


def _adapter(kernel, draw, reference, *, batch, tokens, hidden, experts, rank, per_token):
    routed = (batch, tokens) if per_token else (batch,)
    x, index = draw.normal(batch, tokens, hidden), (draw.index(experts, *routed), draw.index(experts, *routed))
    down, down_bias = draw.normal(experts, rank, hidden, scale=hidden**-0.5), draw.normal(experts, rank)
    up, up_bias = draw.normal(experts, hidden, rank, scale=rank**-0.5), draw.normal(experts, hidden)
    forward = (x, down, down_bias, up, up_bias, *index, None, True, "gelu")
    if kernel == "adapter_forward_kernel":
        return "forward", forward
    grad, pre = draw.normal(batch, tokens, hidden), reference.forward(*forward)[1]
    weights = kernel == "adapter_weight_grad_kernel"
    return "backward", (grad, x, pre, down, up, *index, True, weights, weights, True, "gelu")


def _lora(kernel, draw, reference, *, batch, tokens, hidden, experts, rank, per_token):
    routed = (batch, tokens) if per_token else (batch,)
    x, index = draw.normal(batch, tokens, hidden), (draw.index(experts, *routed), draw.index(experts, *routed))
    a, b = draw.normal(experts, rank, hidden, scale=hidden**-0.5), draw.normal(experts, hidden, rank, scale=rank**-0.5)
    base = draw.normal(batch, tokens, hidden)
    scaling, groups, offsets, dropout_p = 2.0, 1, [0], 0.0
    forward = (x, a, b, *index, base, None, scaling, groups, offsets, dropout_p)
    if kernel == "lora_forward_kernel":
        return "forward", forward
    grad, t = base, reference.forward(*forward)[1]
    weights = kernel == "lora_grads_kernel"
    return "backward", (grad, x, t, a, b, *index, None, True, weights, weights, scaling, groups, offsets, dropout_p)
