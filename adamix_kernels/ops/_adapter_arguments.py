"""What the ops behind routed_adapter share: checks of arguments."""

from __future__ import annotations

from typing import Any

import torch

from ._checks import check_bank, check_choice, check_dims, check_index, check_shape, check_tensor
from ._gates import Side, check_gates

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", None)


def check_adapter(
    tensors: tuple[Any, ...], add_input: bool, activation: str | None, gates: torch.Tensor | None = None
) -> None:
    """tensors: x to residual, in the dtype of the call; add_input: the residual is x."""
    x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual = tensors
    check_dims("x", x, "[B, S, H]")
    hidden = x.shape[2]
    check_tensor("down_weight", down_weight, x)
    check_bank("down_weight", down_weight, "[Md, r, H]")
    md, r, _ = down_weight.shape
    check_shape("down_weight", down_weight, "[Md, r, H]", md, r, hidden)
    check_tensor("up_weight", up_weight, x)
    check_bank("up_weight", up_weight, "[Mu, Hout, r]")
    mu, out_features, _ = up_weight.shape
    check_shape("up_weight", up_weight, "[Mu, Hout, r]", mu, out_features, r)
    if down_bias is not None:
        check_tensor("down_bias", down_bias, x)
        check_shape("down_bias", down_bias, "[Md, r]", md, r)
    if up_bias is not None:
        check_tensor("up_bias", up_bias, x)
        check_shape("up_bias", up_bias, "[Mu, Hout]", mu, out_features)
    if gates is None:
        check_index("down_index", down_index, md, x)
        check_index("up_index", up_index, mu, x)
    else:
        check_gates(
            gates, x, Side("down_index", down_index, "down_weight", md), Side("up_index", up_index, "up_weight", mu)
        )
    if residual is not None:
        check_tensor("residual", residual, x)
        check_shape("residual", residual, "[B, S, Hout]", x.shape[0], x.shape[1], out_features)
    if add_input:
        check_shape("residual", x, "[B, S, Hout]", x.shape[0], x.shape[1], out_features)
    check_choice("activation", activation, ACTIVATIONS)
