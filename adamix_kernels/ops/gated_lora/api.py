"""Calls of routed_lora with gates, or with a scaling for each expert: argument checks, then the op."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..._backends import check_request
from .._checks import autocast_dtype, check_flag, check_tensor
from .._direct import autocasts, may_be_direct
from .._gates import Side, arranged, cast_gates
from .._groups import check_number
from .._lora_arguments import autocast_lora, check_inplace, check_lora, seed_tensor
from .direct import call
from .op import OPS, gated_lora_op


def gated_lora(
    tensors: tuple[Any, ...],
    gates: torch.Tensor | None,
    mix: str,
    scaling: float | torch.Tensor,
    groups: int,
    output_offsets: Sequence[int],
    dropout_p: float,
    seed: int | torch.Tensor | None,
    inplace: bool,
    backend: str,
) -> torch.Tensor:
    """routed_lora, whose docstring says what every argument is. tensors: x to base."""
    x, lora_a, lora_b, a_index, b_index, base = tensors
    given = base
    direct = may_be_direct()
    if not direct or autocasts():
        check_tensor("x", x)
        x, lora_a, lora_b, base = autocast_lora(x, lora_a, lora_b, base)
        gates = cast_gates(gates, autocast_dtype(x.device.type))
    scales, factor = (scaling.detach(), 1.0) if isinstance(scaling, torch.Tensor) else (None, scaling)
    drawn: list[torch.Tensor] = []

    def key() -> torch.Tensor:
        if not drawn:
            drawn.append(seed_tensor(seed, x))
        return drawn[0]

    over = functools.partial(check_inplace, given, x, lora_a, lora_b, gates)
    if direct and gates is not None and not (scales is not None and scaling.requires_grad):  # type: ignore[union-attr]
        tensors = x, lora_a, lora_b, a_index, b_index, gates, scales, base
        numbers = factor, groups, output_offsets, dropout_p
        out = call(tensors, *numbers, mix, backend, inplace, False, key, over)
        if out is not None:
            return out if base is None or out.shape == base.shape else out.view(base.shape)
    check_tensor("x", x)
    tensors = x, lora_a, lora_b, a_index, b_index, base
    offsets = check_lora(tensors, scaling, groups, output_offsets, gates)
    check_request(backend)
    check_number("dropout_p", dropout_p, 0, 1, "a Python number, 0 <= dropout_p < 1")
    check_flag("inplace", inplace)
    target = over() if inplace else base
    sides = Side("a_index", a_index, "lora_a", lora_a.shape[0]), Side("b_index", b_index, "lora_b", lora_b.shape[0])
    tensors = x, lora_a, lora_b, *arranged(x, gates, *sides), scales
    if direct:
        out = call((*tensors, base), factor, groups, offsets, dropout_p, mix, backend, inplace, True, key, over)
        if out is not None:
            return out if base is None or out.shape == base.shape else out.view(base.shape)
    options = key() if dropout_p > 0 else None, factor, groups, offsets, dropout_p, mix, backend
    if not inplace:
        return gated_lora_op(*tensors, base, *options)[0]
    assert base is not None  # check_inplace
    assert target is not None
    if torch.compiler.is_compiling():
        # The compiler decides itself what may share memory.
        return target.copy_(gated_lora_op(*tensors, target, *options)[0])
    return OPS.differentiable_inplace(*tensors, target, *options).view(base.shape)
