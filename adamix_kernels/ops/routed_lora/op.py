"""Routed LoRA's dispatcher ops: fakes and backend selection."""

from __future__ import annotations

from types import ModuleType

import torch

from ..._backends import select
from .._checks import check_index_values
from .._library import define, wrote
from .signatures import Backward, Forward


def _served(a: Forward | Backward, backend: str) -> ModuleType:
    return select("routed_lora", backend, a.x.device, a.x.dtype, a.lora_a.shape[0] * a.lora_a.shape[1])


def _check_values(a: Forward) -> None:
    check_index_values("a_index", a.a_index, a.lora_a.shape[0])
    check_index_values("b_index", a.b_index, a.lora_b.shape[0])


def _forward(a: Forward, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check_values(a)
    out: tuple[torch.Tensor, torch.Tensor] = _served(a, backend).forward(*a)
    return out


def _forward_fake(a: Forward, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(a.offsets) + a.lora_b.shape[1] // a.groups if a.base is None else a.base.shape[2]
    return a.x.new_empty(*a.x.shape[:2], width), _inplace_fake(a, backend)


def _inplace(a: Forward, backend: str) -> torch.Tensor:
    _check_values(a)
    assert a.base is not None  # api.py
    rows = a.base.view(*a.x.shape[:2], a.base.shape[-1])
    t: torch.Tensor = _served(a, backend).forward(*a._replace(base=rows), inplace=True)[1]
    wrote(a.base)
    return t


def _inplace_fake(a: Forward, backend: str) -> torch.Tensor:
    select("routed_lora", backend, a.x.device, a.x.dtype)
    return a.x.new_empty(*a.x.shape[:2], a.lora_a.shape[1])


def _backward(a: Backward, backend: str) -> tuple[torch.Tensor, ...]:
    grads: tuple[torch.Tensor, ...] = _served(a, backend).backward(*a)
    return grads


def _backward_fake(a: Backward, backend: str) -> tuple[torch.Tensor, ...]:
    banks = (a.x, a.need_x), (a.lora_a, a.need_a), (a.lora_b, a.need_b)
    return tuple(a.x.new_empty(like.shape if needed else 0) for like, needed in banks)


# Returns (out [B, S, N], t = dropout(x) A^T [B, S, groups*r]).
routed_lora_op = define("routed_lora", Forward, "(Tensor, Tensor)", _forward, _forward_fake)
# Adds into base, contiguous rows [..., N], and returns t.
routed_lora_inplace_op = define("routed_lora_", Forward, "Tensor", _inplace, _inplace_fake, written="base")
# Returns (dx, d lora_a, d lora_b); what is not needed is an empty tensor. The base's gradient is grad_out itself.
routed_lora_backward_op = define(
    "routed_lora_backward", Backward, "(Tensor, Tensor, Tensor)", _backward, _backward_fake
)
