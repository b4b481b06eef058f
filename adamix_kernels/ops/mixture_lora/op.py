"""The mixture's dispatcher ops: fakes and backend selection."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from ..._backends import select
from ..._limits import Extent
from .._library import define, wrote
from ._composed import composed
from ._grads import backward
from .signatures import Backward, Forward


def _served(op: str, a: Any, backend: str) -> ModuleType:
    """The class of shapes goes by the narrow columns of all experts of the larger bank."""
    return select(op, backend, a.x.device, a.x.dtype, columns_of(a.lora_a, a.lora_b), Extent(groups=a.groups))


def columns_of(lora_a: torch.Tensor, lora_b: torch.Tensor) -> int:
    return max(lora_a.shape[0], lora_b.shape[0]) * lora_a.shape[1]


def _forward(a: Forward, backend: str, inplace: bool = False) -> tuple[torch.Tensor, ...]:
    module = _served("mixture_lora", a, backend)
    if backend == "auto" and _is_reference(module):
        # Kernels may serve the two ops where none serves both: on a V100, or where a verdict failed.
        route = select("router", backend, a.x.device, a.x.dtype, 0)
        return composed(route.forward, _served("gated_lora", a, backend).forward, a, inplace)
    made: tuple[torch.Tensor, ...] = module.forward(*a, inplace=inplace)
    return made


def _forward_fake(a: Forward, backend: str) -> tuple[torch.Tensor, ...]:
    width = max(a.offsets) + a.lora_b.shape[1] // a.groups if a.base is None else a.base.shape[2]
    return a.x.new_empty(*a.x.shape[:2], width), *_kept_fake(a, backend)


def _inplace(a: Forward, backend: str) -> tuple[torch.Tensor, ...]:
    assert a.base is not None  # the op's schema
    rows = a.base.view(*a.x.shape[:2], a.base.shape[-1])
    made = _forward(a._replace(base=rows), backend, inplace=True)
    wrote(a.base)
    return tuple(made[1:])


def _kept_fake(a: Forward, backend: str) -> tuple[torch.Tensor, ...]:
    _served("mixture_lora", a, backend)
    lead, experts = a.x.shape[:2], a.router.shape[0]
    slots = a.top_k or experts
    t = a.x.new_empty(*lead, (slots if a.lora_a.shape[0] > 1 else 1) * a.lora_a.shape[1])
    logits = a.x.new_empty(*lead, experts, dtype=torch.float64 if a.x.dtype == torch.float64 else torch.float32)
    index = logits.new_empty((*lead, slots) if a.top_k else (0,), dtype=torch.int64)
    return t, logits.new_empty(*lead, slots), index, logits


def _backward(a: Backward, backend: str) -> tuple[torch.Tensor, ...]:
    return backward(a, _served("gated_lora", a, backend))


def _backward_fake(a: Backward, backend: str) -> tuple[torch.Tensor, ...]:
    through = a.grad_out is not None
    needed = (
        (a.x, a.need_x),
        (a.lora_a, a.need_a and through),
        (a.lora_b, a.need_b and through),
        (a.router, a.need_router),
    )
    return tuple(like.new_empty(like.shape if wanted else (0,)) for like, wanted in needed)


def _is_reference(module: ModuleType) -> bool:
    return module.__name__.rpartition(".")[2] == "reference"


def by_kernel(backend: str, device: torch.device, dtype: torch.dtype, columns: int) -> bool:
    """Whether another backend than the reference serves calls on x of this device and dtype. columns: as columns_of."""
    return not _is_reference(select("mixture_lora", backend, device, dtype, columns))


# As torch.compiler.assume_constant_result marks it, which would import the whole compiler with this package.
by_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Returns (out, t, gates, ids of the chosen, or [0] where dense, logits); t as gated LoRA's op.
mixture_lora_op = define(
    "mixture_lora", Forward, "(Tensor, Tensor, Tensor, Tensor, Tensor)", _forward, _forward_fake
)  # fmt: skip
# Adds into base, contiguous rows [..., N], and returns the rest.
mixture_lora_inplace_op = define(
    "mixture_lora_", Forward, "(Tensor, Tensor, Tensor, Tensor)", _inplace, _kept_fake, "base"
)  # fmt: skip
# Returns (dx, d lora_a, d lora_b, d router); what is not needed is an empty tensor.
mixture_lora_backward_op = define(
    "mixture_lora_backward", Backward, "(Tensor, Tensor, Tensor, Tensor)", _backward, _backward_fake
)  # fmt: skip
