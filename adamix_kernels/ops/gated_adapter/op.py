"""The gated adapter's dispatcher ops: schema, fake, backend selection."""

from __future__ import annotations

import torch

from ..._backends import select
from .._checks import check_index_values
from .._gates import slots_of
from .._library import define


def _forward(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    gates: torch.Tensor,
    residual: torch.Tensor | None,
    add_input: bool,
    activation: str,
    mix: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_index_values("down_index", down_index, down_weight.shape[0])
    check_index_values("up_index", up_index, up_weight.shape[0])
    return select("gated_adapter", backend, x.device, x.dtype, _size(down_weight, up_weight)).forward(
        x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, gates, residual, add_input, activation, mix
    )


def _forward_fake(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    gates: torch.Tensor,
    residual: torch.Tensor | None,
    add_input: bool,
    activation: str,
    mix: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    select("gated_adapter", backend, x.device, x.dtype)
    narrow = slots_of(down_weight, gates) * down_weight.shape[1]
    return x.new_empty(*x.shape[:2], up_weight.shape[1]), x.new_empty(*x.shape[:2], narrow)


def _backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    gates: torch.Tensor,
    need_input: bool,
    need_down: bool,
    need_up: bool,
    need_gates: bool,
    add_input: bool,
    activation: str,
    mix: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return select("gated_adapter", backend, x.device, x.dtype, _size(down_weight, up_weight)).backward(
        grad_out, x, pre, down_weight, up_weight, up_bias, down_index, up_index, gates,
        need_input, need_down, need_up, need_gates, add_input, activation, mix,
    )  # fmt: skip


def _backward_fake(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    gates: torch.Tensor,
    need_input: bool,
    need_down: bool,
    need_up: bool,
    need_gates: bool,
    add_input: bool,
    activation: str,
    mix: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def bank(weight: torch.Tensor, needed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if not needed:
            return x.new_empty(0), x.new_empty(0)
        return x.new_empty(weight.shape), x.new_empty(weight.shape[:2])

    dx, dgates = x.new_empty(x.shape if need_input else 0), gates.new_empty(gates.shape if need_gates else 0)
    return dx, *bank(down_weight, need_down), *bank(up_weight, need_up), dgates


def _size(down_weight: torch.Tensor, up_weight: torch.Tensor) -> int:
    """What the class of shapes goes by: the narrow columns of all experts of the larger bank."""
    return max(down_weight.shape[0], up_weight.shape[0]) * down_weight.shape[1]


# Returns (out [B, S, Hout], pre [B, S, slots * r], pre_k = x Wd_k^T + bd_k, before gates). Indices are None for dense
# gates (slot e is expert e), and for a bank of one. add_input: the residual is x itself.
gated_adapter_op = define(
    "gated_adapter(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
    "Tensor? down_index, Tensor? up_index, Tensor gates, Tensor? residual, bool add_input, str activation, "
    "str mix, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
# Returns (dx, d down_weight, d down_bias, d up_weight, d up_bias, d gates); what is not needed is an empty tensor.
gated_adapter_backward_op = define(
    "gated_adapter_backward(Tensor grad_out, Tensor x, Tensor pre, Tensor down_weight, Tensor up_weight, "
    "Tensor? up_bias, Tensor? down_index, Tensor? up_index, Tensor gates, bool need_input, bool need_down, "
    "bool need_up, bool need_gates, bool add_input, str activation, str mix, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
