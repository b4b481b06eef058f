"""Calls of routed_adapter with gates: argument checks, then the op."""

from __future__ import annotations

from typing import Any

import torch

from ..._backends import check_request
from .._adapter_arguments import check_adapter
from .._checks import autocast, autocast_dtype, check_tensor
from .._gates import Side, arranged, cast_gates
from .op import gated_adapter_op


def gated_adapter(
    tensors: tuple[Any, ...], gates: torch.Tensor | None, mix: str, activation: str | None, backend: str
) -> torch.Tensor:
    """routed_adapter, whose docstring says what every argument is. tensors: x to residual."""
    x, *banks, down_index, up_index, residual = tensors
    add_input = residual is x
    check_tensor("x", x)
    x, *banks, added = autocast(x, *banks, None if add_input else residual)
    gates = cast_gates(gates, autocast_dtype(x.device.type))
    check_adapter((x, *banks, down_index, up_index, added), add_input, activation, gates)
    check_request(backend)
    down = Side("down_index", down_index, "down_weight", banks[0].shape[0])
    up = Side("up_index", up_index, "up_weight", banks[2].shape[0])
    arguments = *banks, *arranged(x, gates, down, up), added, add_input, activation or "", mix, backend
    out: torch.Tensor = gated_adapter_op(x, *arguments)[0]
    return out
