"""The routed adapter's dispatcher ops: schema, fake, backend selection."""

from __future__ import annotations

import torch

from ..._backends import select
from .._checks import check_index_values
from .._library import define


def _forward(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    residual: torch.Tensor | None,
    add_input: bool,
    activation: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_index_values("down_index", down_index, down_weight.shape[0])
    check_index_values("up_index", up_index, up_weight.shape[0])
    narrow = down_weight.shape[0] * down_weight.shape[1]
    return select("routed_adapter", backend, x.device, x.dtype, narrow).forward(
        x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual, add_input, activation
    )


def _forward_fake(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    residual: torch.Tensor | None,
    add_input: bool,
    activation: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    select("routed_adapter", backend, x.device, x.dtype)
    batch, tokens, _ = x.shape
    return x.new_empty(batch, tokens, up_weight.shape[1]), x.new_empty(batch, tokens, down_weight.shape[1])


def _backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    need_input: bool,
    need_down: bool,
    need_up: bool,
    add_input: bool,
    activation: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    narrow = down_weight.shape[0] * down_weight.shape[1]
    return select("routed_adapter", backend, x.device, x.dtype, narrow).backward(
        grad_out,
        x,
        pre,
        down_weight,
        up_weight,
        down_index,
        up_index,
        need_input,
        need_down,
        need_up,
        add_input,
        activation,
    )


def _backward_fake(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    need_input: bool,
    need_down: bool,
    need_up: bool,
    add_input: bool,
    activation: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def bank(weight: torch.Tensor, needed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if not needed:
            return x.new_empty(0), x.new_empty(0)
        return x.new_empty(weight.shape), x.new_empty(weight.shape[:2])

    dx = x.new_empty(x.shape) if need_input else x.new_empty(0)
    return dx, *bank(down_weight, need_down), *bank(up_weight, need_up)


# Returns (out [B, S, Hout], pre-activation [B, S, r]). add_input: the residual is x itself.
routed_adapter_op = define(
    "routed_adapter(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
    "Tensor? down_index, Tensor? up_index, Tensor? residual, bool add_input, str activation, str backend) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
# Returns (dx, d down_weight, d down_bias, d up_weight, d up_bias); what is not needed is an empty tensor.
routed_adapter_backward_op = define(
    "routed_adapter_backward(Tensor grad_out, Tensor x, Tensor pre, Tensor down_weight, Tensor up_weight, "
    "Tensor? down_index, Tensor? up_index, bool need_input, bool need_down, bool need_up, bool add_input, "
    "str activation, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
