"""The gated adapter's dispatcher ops: fakes and backend selection."""

from __future__ import annotations

from types import ModuleType

import torch

from ..._backends import select
from .._adapter_arguments import like_bank
from .._checks import check_index_values
from .._gates import slots_of
from .._library import define
from .signatures import Backward, Forward


def _served(a: Forward | Backward, backend: str) -> ModuleType:
    """The class of shapes goes by the narrow columns of all experts of the larger bank."""
    size = max(a.down_weight.shape[0], a.up_weight.shape[0]) * a.down_weight.shape[1]
    return select("gated_adapter", backend, a.x.device, a.x.dtype, size)


def _forward(a: Forward, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    check_index_values("down_index", a.down_index, a.down_weight.shape[0])
    check_index_values("up_index", a.up_index, a.up_weight.shape[0])
    out: tuple[torch.Tensor, torch.Tensor] = _served(a, backend).forward(*a)
    return out


def _forward_fake(a: Forward, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    select("gated_adapter", backend, a.x.device, a.x.dtype)
    widths = a.up_weight.shape[1], slots_of(a.down_weight, a.gates) * a.down_weight.shape[1]
    out, pre = (a.x.new_empty(*a.x.shape[:2], width) for width in widths)
    return out, pre


def _backward(a: Backward, backend: str) -> tuple[torch.Tensor, ...]:
    grads: tuple[torch.Tensor, ...] = _served(a, backend).backward(*a)
    return grads


def _backward_fake(a: Backward, backend: str) -> tuple[torch.Tensor, ...]:
    dgates = a.gates.new_empty(a.gates.shape if a.need_gates else 0)
    banks = (a.down_weight, a.need_down), (a.up_weight, a.need_up)
    grads = (grad for weight, needed in banks for grad in like_bank(weight, needed))
    return a.x.new_empty(a.x.shape if a.need_input else 0), *grads, dgates


# Returns (out [B, S, Hout], pre [B, S, slots * r], pre_k = x Wd_k^T + bd_k, before gates).
gated_adapter_op = define("gated_adapter", Forward, "(Tensor, Tensor)", _forward, _forward_fake)
# Returns (dx, d down_weight, d down_bias, d up_weight, d up_bias, d gates); what is not needed is an empty tensor.
gated_adapter_backward_op = define(
    "gated_adapter_backward", Backward, "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _backward, _backward_fake
)
