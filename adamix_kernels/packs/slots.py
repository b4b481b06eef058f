"""Banks of fixed size, one slot a name: which sizes the names need, and how a name's parts get into a slot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..models.gating import place
from ..models.inject import bank_options
from ..modules import AdaptedLayer, RoutedAdapter, RoutedLoRALinear
from ..modules.lora import linear_sizes
from ..routing import Router
from .sources import AdapterPart, LoraPart, Part, Source

RoutedLayer = AdaptedLayer | RoutedLoRALinear


@dataclass(frozen=True)
class Shape:
    """What a slot of one layer holds: an adapter (activation told) of at most `rank`, or a LoRA on slices of `width`
    columns at `offsets`."""

    adapter: bool
    rank: int
    activation: str | None = None
    offsets: tuple[int, ...] = (0,)
    width: int = 0

    @classmethod
    def of(cls, layer: RoutedLayer) -> Shape:
        if isinstance(layer, AdaptedLayer):
            return cls(True, layer.adapter.bottleneck, layer.adapter.activation)
        return cls(False, layer.r, None, layer.output_offsets, layer.lora_b.shape[1] // layer.groups)

    @classmethod
    def for_all(cls, path: str, parts: Mapping[str, Part], rank: int) -> Shape:
        """The slot that takes each name's part, padded. Raises ValueError, naming two names that share no slot."""
        adapters = {name: part for name, part in parts.items() if isinstance(part, AdapterPart)}
        loras = {name: part for name, part in parts.items() if isinstance(part, LoraPart)}
        if adapters and loras:
            raise ValueError(
                f"{path}: got an adapter of {_first(adapters)} and a LoRA of {_first(loras)}, expected one"
            )
        if adapters:
            kinds = {part.activation: name for name, part in adapters.items()}
            if len(kinds) > 1:
                told = " and ".join(f"{kind!r} of {name!r}" for kind, name in kinds.items())
                raise ValueError(f"{path}: got the activations {told}, expected the same in all names of a pack")
            return cls(True, max(rank, *(part.rank for part in adapters.values())), next(iter(kinds)))
        if len({(part.offsets, part.width) for part in loras.values()}) > 1:
            loras = {name: part.whole() for name, part in loras.items()}
        one = next(iter(loras.values()))
        return cls(False, max(rank, *(part.rank for part in loras.values())), None, one.offsets, one.width)

    def fit(self, path: str, part: Part) -> Part:
        """`part` as this slot holds it. Raises ValueError where it cannot."""
        if isinstance(part, AdapterPart) != self.adapter:
            mine, theirs = ("an adapter", "a LoRA") if self.adapter else ("a LoRA", "an adapter")
            raise ValueError(f"{path}: got {theirs}, expected {mine}, as in the pack")
        if isinstance(part, AdapterPart):
            if part.activation != self.activation:
                raise ValueError(f"{path}: got the activation {part.activation!r}, expected {self.activation!r}")
        elif (part.offsets, part.width) != (self.offsets, self.width):
            part = part.whole()
            if (part.offsets, part.width) != (self.offsets, self.width):
                raise ValueError(
                    f"{path}: got a LoRA of all {part.out_features} columns, expected one of slices of {self.width} at "
                    f"{self.offsets}, as in the pack: pack the folders together from the start"
                )
        if part.rank > self.rank:
            raise ValueError(
                f"{path}: got rank {part.rank}, expected at most {self.rank}, what the pack has room for: "
                f"pack(..., max_rank={part.rank})"
            )
        return part


def _first(parts: Mapping[str, Part]) -> str:
    return repr(next(iter(parts)))


def check_layers(model: nn.Module, source: Source) -> None:
    """Raises ValueError, naming the layer, where `model` lacks one or has it in another size."""
    for path, part in source.layers.items():
        try:
            layer: nn.Module = model.get_submodule(path)
            layer = layer.base if isinstance(layer, (AdaptedLayer, RoutedLoRALinear)) else layer
            sizes = linear_sizes(layer)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{path}: got a {type(model).__name__} without such a linear layer ({error})") from error
        stored = source.sizes.get(path, sizes)
        if tuple(stored) != sizes:
            raise ValueError(
                f"{path}: got a layer of (in, out, transposed) = {sizes} in the model, expected {tuple(stored)}"
            )
        _check_shapes(path, part, *sizes[:2])
        bad = [tensor for tensor in part.tensors() if not tensor.isfinite().all()]
        if bad:
            raise ValueError(f"{path}: got values that are not finite, expected finite numbers")


def _check_shapes(path: str, part: Part, inputs: int, outputs: int) -> None:
    r = part.rank
    if isinstance(part, AdapterPart):
        wanted = [(r, outputs), (r,), (outputs, r), (outputs,)]
    else:
        wanted = [(len(part.offsets) * r, inputs), (len(part.offsets) * part.width, r)]
        if max(part.offsets) + part.width > outputs or (part.offsets == (0,) and part.out_features != outputs):
            raise ValueError(f"{path}: got a LoRA of {part.out_features} columns, expected {outputs}")
        if part.offsets == (0,) and part.width != outputs:
            raise ValueError(f"{path}: got lora_B of {part.width} rows, expected {outputs}, the layer's columns")
    shapes = [tuple(tensor.shape) for tensor in part.tensors()]
    if shapes != wanted:
        raise ValueError(f"{path}: got tensors of shapes {shapes}, expected {wanted}")


def shapes_for(sources: Sequence[Source], order: Sequence[str], rank: int) -> dict[str, Shape]:
    """The shape of every layer that a source has, in `order`. Raises ValueError: two sources share no slot."""
    paths = [path for path in order if any(path in source.layers for source in sources)]
    return {
        path: Shape.for_all(path, {s.name: s.layers[path] for s in sources if path in s.layers}, rank) for path in paths
    }


def build(
    model: nn.Module, shapes: Mapping[str, Shape], capacity: int, router: Router, backend: str
) -> dict[str, RoutedLayer]:
    """path -> the layer of `capacity` empty slots that goes there, built beside `model`, which stays as it is."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        return _built(model, shapes, capacity, router, backend, gpus)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _built(
    model: nn.Module,
    shapes: Mapping[str, Shape],
    capacity: int,
    router: Router,
    backend: str,
    gpus: Collection[torch.device],
) -> dict[str, RoutedLayer]:
    built: dict[str, RoutedLayer] = {}
    with torch.random.fork_rng(list(gpus)):  # the modules draw values, which are not wanted here
        for path, shape in shapes.items():
            layer = model.get_submodule(path)
            options: dict[str, Any] = {"router": router, "backend": backend, **bank_options(layer)}
            if shape.adapter:
                hidden = linear_sizes(layer)[1]
                adapter = RoutedAdapter(hidden, shape.rank, capacity, None, shape.activation, **options)
                built[path] = AdaptedLayer(layer, adapter)
            else:
                built[path] = RoutedLoRALinear.from_linear(
                    layer,
                    shape.rank,
                    shape.rank,  # the scaling is in B: alpha / r = 1
                    capacity,
                    None,
                    groups=len(shape.offsets),
                    output_offsets=shape.offsets,
                    group_features=shape.width,
                    **options,
                )
            place(model, path, built[path])
            for bank in banks(built[path]):
                bank.requires_grad_(False).zero_()
    return built


def banks(layer: RoutedLayer) -> list[nn.Parameter]:
    """The banks of a layer, in the order of Part.tensors()."""
    return list(layer.adapter.banks()) if isinstance(layer, AdaptedLayer) else [layer.lora_a, layer.lora_b]


@torch.no_grad()
def plan(layer: RoutedLayer, slot: int, part: Part | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(what is written to, what is written) to put a fitting part into a slot, padded with zeros, made in full before
    anything is written. None leaves the layer's base as it is for that name."""
    targets = [bank[slot] for bank in banks(layer)]
    shape = Shape.of(layer)
    values = [torch.zeros_like(target) for target in targets] if part is None else padded(shape, part)
    return [(target, value.to(target)) for target, value in zip(targets, values, strict=True)]


def padded(shape: Shape, part: Part) -> list[torch.Tensor]:
    """part.tensors() with zeros up to the shape's rank."""
    more = shape.rank - part.rank
    if isinstance(part, AdapterPart):
        return [
            F.pad(part.down_weight, (0, 0, 0, more)),
            F.pad(part.down_bias, (0, more)),
            F.pad(part.up_weight, (0, more)),
            part.up_bias,
        ]
    groups, rank = len(part.offsets), part.rank
    rows = part.lora_a.view(groups, rank, -1)
    return [F.pad(rows, (0, 0, 0, more)).reshape(groups * shape.rank, -1), F.pad(part.lora_b, (0, more))]


@torch.no_grad()
def read(layer: RoutedLayer, slot: int, rank: int) -> Part:
    """What plan() put there: the first `rank` of the slot."""
    shape = Shape.of(layer)
    if isinstance(layer, AdaptedLayer):
        down_weight, down_bias, up_weight, up_bias = (bank[slot].detach() for bank in layer.adapter.banks())
        return AdapterPart(
            down_weight[:rank].clone(), down_bias[:rank].clone(), up_weight[:, :rank].clone(), up_bias.clone(),
            shape.activation,
        )  # fmt: skip
    rows = layer.lora_a[slot].detach().view(layer.groups, shape.rank, -1)[:, :rank]
    lora_a = rows.reshape(layer.groups * rank, -1).clone()
    return LoraPart(lora_a, layer.lora_b[slot, :, :rank].detach().clone(), layer.output_offsets, layer.out_features)
