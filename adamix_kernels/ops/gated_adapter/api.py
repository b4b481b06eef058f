"""Calls of routed_adapter with gates: argument checks, then the op."""

from __future__ import annotations

from typing import Any

import torch

from ..._backends import check_request
from .._adapter_arguments import check_adapter
from .._checks import autocast, autocast_dtype, check_tensor
from .._direct import autocasts, may_be_direct
from .._gates import Side, arranged, cast_gates
from .direct import call
from .op import gated_adapter_op


def gated_adapter(
    tensors: tuple[Any, ...], gates: torch.Tensor | None, mix: str, activation: str | None, backend: str
) -> torch.Tensor:
    """routed_adapter, whose docstring says what every argument is. tensors: x to residual."""
    x, *banks, down_index, up_index, residual = tensors
    add_input = residual is x
    added = None if add_input else residual
    direct = may_be_direct()
    if not direct or autocasts():
        check_tensor("x", x)
        x, *banks, added = autocast(x, *banks, added)
        gates = cast_gates(gates, autocast_dtype(x.device.type))
    if direct:
        out = call((x, *banks, down_index, up_index, gates, added), add_input, activation, mix, backend, False)
        if out is not None:
            return out
    check_tensor("x", x)
    check_adapter((x, *banks, down_index, up_index, added), add_input, activation, gates)
    check_request(backend)
    down = Side("down_index", down_index, "down_weight", banks[0].shape[0])
    up = Side("up_index", up_index, "up_weight", banks[2].shape[0])
    tensors = x, *banks, *arranged(x, gates, down, up), added
    if direct:
        out = call(tensors, add_input, activation, mix, backend, True)
        if out is not None:
            return out
    made: torch.Tensor = gated_adapter_op(*tensors, add_input, activation or "", mix, backend)[0]
    return made
