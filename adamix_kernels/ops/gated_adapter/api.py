"""Calls of routed_adapter with gates: argument checks, then the op."""

from __future__ import annotations

import torch

from ..._backends import check_request
from .._adapter_arguments import check_adapter
from .._checks import autocast, autocast_dtype, check_tensor
from .._gates import Side, arranged, cast_gates
from .op import gated_adapter_op


def gated_adapter(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    gates: torch.Tensor | None,
    mix: str,
    residual: torch.Tensor | None,
    activation: str | None,
    backend: str,
) -> torch.Tensor:
    """routed_adapter, whose docstring says what every argument is."""
    add_input = residual is x
    check_tensor("x", x)
    x, down_weight, down_bias, up_weight, up_bias, added = autocast(
        x, down_weight, down_bias, up_weight, up_bias, None if add_input else residual
    )
    gates = cast_gates(gates, autocast_dtype(x.device.type))
    check_adapter(
        x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, added, add_input, activation, gates
    )
    check_request(backend)
    down = Side("down_index", down_index, "down_weight", down_weight.shape[0])
    up = Side("up_index", up_index, "up_weight", up_weight.shape[0])
    down_index, up_index, gates = arranged(x, gates, down, up)
    out: torch.Tensor = gated_adapter_op(
        x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, gates, added, add_input,
        activation or "", mix, backend,
    )[0]  # fmt: skip
    return out
