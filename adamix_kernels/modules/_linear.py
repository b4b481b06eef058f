"""A linear layer: its sizes, which of its columns a LoRA adapts, whether its output may be overwritten."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.modules import module

from ..ops._checks import autocast_dtype, check_positive
from ..ops._direct import autocasts
from ..ops._node import LINEARS, keep_linear

QKV = ("q", "k", "v")


class OnBase(nn.Module):
    """What stands in the place of a layer, `base`, whose weight and bias model code may look at."""

    base: nn.Module

    @property
    def weight(self) -> torch.Tensor:
        return cast("torch.Tensor", self.base.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        return cast("torch.Tensor | None", self.base.bias)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A weight or bias that model code sets (tie_weights() of transformers) is the base's."""
        base = self._modules.get("base")
        if base is not None and name in ("weight", "bias"):
            base.register_parameter(name, param)
        else:
            super().register_parameter(name, param)


def linear_sizes(layer: nn.Module) -> tuple[int, int, bool]:
    """(in_features, out_features, fan_in_fan_out) of a linear layer or a Conv1D of transformers."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return cast("int", layer.in_features), cast("int", layer.out_features), False
    # A base class too: FSDP2 puts a class of its own in front.
    conv = any(base.__name__ == "Conv1D" for base in type(layer).__mro__)
    weight = getattr(layer, "weight", None)
    if conv and weight is not None and weight.dim() == 2:
        return weight.shape[0], weight.shape[1], True
    raise ValueError(f"layer: got {type(layer).__name__}, expected nn.Linear, Conv1D or in_features and out_features")


def group_width(groups: int, offsets: Sequence[int], width: int | None, out_features: int) -> int:
    """The columns of a group's slice, by default up to the end from the last offset; the slices must not overlap."""
    if not isinstance(offsets, Sequence) or not all(isinstance(offset, int) for offset in offsets):
        raise TypeError(f"output_offsets: got {offsets!r}, expected a sequence of ints")
    if width is None:
        width = out_features - max(offsets, default=0)
    else:
        check_positive(group_features=width)
    if len(offsets) != groups:
        raise ValueError(f"output_offsets: got {tuple(offsets)}, expected one offset for each of groups={groups}")
    ordered = sorted((*offsets, out_features))
    if ordered[0] < 0 or width < 1 or any(b - a < width for a, b in itertools.pairwise(ordered)):
        raise ValueError(
            f"output_offsets: got {tuple(offsets)}, expected slices of {width} columns that fit out_features="
            f"{out_features} without overlap"
        )
    return width


def qkv_offsets(targets: Sequence[str], out_features: int) -> tuple[int, ...]:
    if not targets or set(targets) - set(QKV) or len(set(targets)) != len(targets):
        raise ValueError(f"targets: got {tuple(targets)}, expected distinct names out of {QKV}")
    if out_features % len(QKV):
        raise ValueError(f"targets: got a layer of {out_features} columns, expected three equal parts q, k, v")
    return tuple(QKV.index(t) * (out_features // len(QKV)) for t in QKV if t in targets)


def may_overwrite(layer: nn.Module, x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether nobody will look again at what `layer` gave, so that the update of x may be added to it in place.

    Sure of the plain linear layers alone: their output is new memory and no backward needs it. A hook or a
    wrapper may keep it; a compiler shares memory by itself.
    """
    if torch.compiler.is_compiling():
        return False
    kind = type(layer)
    if kind not in LINEARS and (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        keep_linear(kind, "torch", torch, "addmm", True)
    if kind not in LINEARS or "forward" in layer.__dict__ or type(out) is not torch.Tensor or not out.is_contiguous():
        return False
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if module._global_forward_hooks or module._global_backward_hooks or module._global_backward_pre_hooks:
        return False
    if not autocasts():
        return out.dtype == x.dtype
    autocast = None if x.dtype == torch.float64 else autocast_dtype(x.device.type)
    return out.dtype == (autocast or x.dtype)
