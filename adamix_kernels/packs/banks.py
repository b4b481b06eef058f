"""The layers of a pack that is trained: banks of all names' experts, one launch for all rows, and each name's head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..functional import routed_adapter, routed_lora
from ..models.inject import bank_options
from ..models.targets import is_gathered, tokens_first
from ..modules import AdaptedLayer, RoutedLoRALinear
from ..modules._banks import as_batch, cast_like
from ..modules._linear import OnBase
from ..modules.lora import linear_sizes
from ..ops._checks import autocast_dtype
from ..ops._dropout import dropout, keep_mask
from .mix import Mix
from .slots import RoutedLayer, Shape

# How a bank [experts, ...] is cut at a rank: its axis, where lora_a is [experts, groups, r, K].
_RANK_AXIS = {"down_weight": 1, "down_bias": 1, "up_weight": 2, "up_bias": None, "lora_a": 2, "lora_b": 2}


class TrainedBank(OnBase):
    """out = the base's, with each row's own expert on it.

    Parameters: banks [slots, ...] of zeros, as RoutedAdapter and RoutedLoRALinear name them; lora_b holds the scaling.
    """

    def __init__(self, path: str, base: nn.Module, shape: Shape, slots: int, mix: Mix, backend: str):
        super().__init__()
        self.path, self.base, self.shape, self.mix, self.backend = path, base, shape, mix, backend

        def bank(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(slots, *size, **bank_options(base)))

        inputs, outputs, _ = linear_sizes(base)
        if shape.adapter:
            self.down_weight, self.down_bias = bank(shape.rank, outputs), bank(shape.rank)
            self.up_weight, self.up_bias = bank(outputs, shape.rank), bank(outputs)
        else:
            groups = len(shape.offsets)
            self.lora_a, self.lora_b = bank(groups * shape.rank, inputs), bank(groups * shape.width, shape.rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, K] or [B, K] -> [B, S, N] or [B, N]."""
        base: torch.Tensor = self.base(x)
        added = as_batch(base)
        down, up = self.mix.rows_of(self.path, added.shape[0]).to(x.device)
        if self.shape.adapter:
            down_weight, down_bias, up_weight, up_bias = cast_like(
                added, self.down_weight, self.down_bias, self.up_weight, self.up_bias
            )
            out = routed_adapter(
                added, down_weight, down_bias, up_weight, up_bias, down, up,
                residual=added, activation=self.shape.activation, backend=self.backend,
            )  # fmt: skip
            return out.view(base.shape)
        rows = as_batch(x) if autocast_dtype(x.device.type) is not None else as_batch(x).to(added.dtype)
        if any(self.path in block.seeds for block in self.mix.blocks):
            rows = torch.cat([self._dropped(part, n) for n, part in enumerate(self.mix.split(rows))])
        lora_a, lora_b = cast_like(rows, self.lora_a, self.lora_b)
        out = routed_lora(
            rows,
            lora_a,
            lora_b,
            down,
            up,
            base=added,
            groups=len(self.shape.offsets),
            output_offsets=self.shape.offsets,
            backend=self.backend,
        )
        return out.view(base.shape)

    def _dropped(self, rows: torch.Tensor, number: int) -> torch.Tensor:
        probability, seed = self.mix.current[number].seeds.get(self.path, (0.0, None))
        if seed is None:
            return rows
        keep = keep_mask(seed.to(rows.device), rows.shape[0] * rows.shape[1], rows.shape[2], probability)
        return dropout(rows, keep, probability)


class OwnHeads(nn.Module):
    """Each name's own module on its rows; narrower results are filled up with zeros, which its loss does not see."""

    def __init__(self, path: str, mix: Mix):
        super().__init__()
        self.path, self.mix = path, mix

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = []
        for block, rows in zip(list(self.mix.blocks), self.mix.split(x), strict=True):
            self.mix.current = [block]
            found.append(block.head[self.path](rows, *args, **kwargs))
        self.mix.current = self.mix.blocks
        widths = [value.shape[-1] for value in found]
        if len(set(widths)) > 1:
            for block, width in zip(self.mix.blocks, widths, strict=True):
                block.columns = width
            found = [F.pad(value, (0, max(widths) - value.shape[-1])) for value in found]
        return torch.cat(found)


@dataclass(frozen=True)
class Cut:
    """A name's own parameter, and where it lies in a bank: from slot `first` on, up to its rank, times `scale`."""

    parameter: nn.Parameter
    bank: nn.Parameter
    first: int
    axis: int | None
    groups: int
    scale: float

    def of(self, bank: torch.Tensor) -> torch.Tensor:
        """The name's part of the bank, or of its gradient, in the shape of grouped()."""
        rows = bank[self.first : self.first + self.parameter.shape[0]]
        rows = rows.unflatten(1, (self.groups, -1)) if self.groups else rows
        return rows if self.axis is None else rows.narrow(self.axis, 0, self.grouped().shape[self.axis])

    def grouped(self) -> torch.Tensor:
        value = self.parameter.detach()
        return value.unflatten(1, (self.groups, -1)) if self.groups else value

    @torch.no_grad()
    def write(self) -> None:
        self.of(self.bank.detach()).copy_(self.grouped() * self.scale if self.scale != 1 else self.grouped())

    @torch.no_grad()
    def clear(self) -> None:
        self.of(self.bank.detach()).zero_()

    @torch.no_grad()
    def take_gradient(self, count: torch.Tensor) -> None:
        """parameter.grad = scale * the bank's / count."""
        assert self.bank.grad is not None  # a forward used every bank
        own = self.of(self.bank.grad).mul(self.scale) if self.scale != 1 else self.of(self.bank.grad)
        self.parameter.grad = own.div(count).reshape(self.parameter.shape)


def cuts(layer: RoutedLayer, bank: TrainedBank, first: int) -> list[Cut]:
    """Where each trained parameter of a name's own layer lies in the banks."""
    holder: nn.Module = layer.adapter if isinstance(layer, AdaptedLayer) else layer
    found = []
    for name, parameter in holder.named_parameters(recurse=False):
        if name in _RANK_AXIS:
            groups = len(bank.shape.offsets) if name == "lora_a" else 0
            scale = layer.scaling if name == "lora_b" and isinstance(layer, RoutedLoRALinear) else 1.0
            found.append(Cut(parameter, getattr(bank, name), first, _RANK_AXIS[name], groups, scale))
    return found


def bank_shapes(model: nn.Module, layers: Mapping[str, Mapping[str, RoutedLayer]], rank: int) -> dict[str, Shape]:
    """What the banks hold, in model order. layers: of each name, by path.

    Raises ValueError, naming two names that cannot share a bank.
    """
    found: dict[str, Shape] = {}
    first: dict[str, str] = {}
    for path, _ in model.named_modules():
        for name, own in layers.items():
            if path not in own:
                continue
            if tokens_first(model, path) or is_gathered(path):
                raise ValueError(
                    f"{name}: {path}: got a layer that is given tokens of all samples before the samples, or mixed, "
                    "expected samples first: train each name by itself, with AdaMixTrainer"
                )
            shape = Shape.of(own[path])
            known = found.setdefault(path, dataclasses.replace(shape, rank=max(rank, shape.rank)))
            first.setdefault(path, name)
            if dataclasses.replace(shape, rank=known.rank) != known:
                raise ValueError(
                    f"{name}: {path}: got {shape}, expected {known} but for the rank, as {first[path]!r} has"
                )
            found[path] = dataclasses.replace(known, rank=max(known.rank, shape.rank))
    return found
