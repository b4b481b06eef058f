"""What an adapted model consists of, in numbers: print_trainable_parameters and summary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..modules import AdaptedLayer, RoutedAdapter, RoutedLoRALinear
from ..modules.lora import linear_sizes
from ..routing import LEARNED
from .config import AdaMixConfig
from .gate_config import experts_of
from .merging import mergeable
from .quantised import dynamic_linear
from .state import adamix_state
from .tying import shared_parameters

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_COLUMNS = ("layers", "number", "in -> out", "adaptation", "experts A/B", "parameters", "merged")
_LEFT = (0, 3)  # the columns of words


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters: a shared tensor once, packed 4-bit and 8-bit weights unpacked.

    What DeepSpeed has partitioned away counts whole.
    """
    packed: list[Any] = [layer for layer in model.modules() if dynamic_linear(layer)]
    total = sum(_numel(p) for p in model.parameters())
    total += sum(t.numel() for layer in packed for t in (layer.weight(), layer.bias()) if t is not None)
    return sum(_numel(p) for p in model.parameters() if p.requires_grad), total


def print_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Prints, and returns, (trainable, all) numbers of parameters, in PEFT's words; see count_parameters.

    Example:
        >>> print_trainable_parameters(adapt(model))  # doctest: +ELLIPSIS
        trainable params: ... || all params: ... || trainable%: ...
    """
    trainable, total = count_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")
    return trainable, total


def summary(model: nn.Module) -> str:
    """A table of the adapted layers, the experts and the parameters of each, and what merging leaves of them.

    Layers that differ only in their number share a row: "encoder.layer.{0-11}.output.dense". "merged" is what
    is kept beside the base after merge(): one adapter; nothing where LoRA goes into the weights. Shared banks
    count once per layer, as they are held; merge scores (M numbers a side) do not count.

    Args:
        model: returned by adapt() or load_adamix(), merged or not.

    Raises ValueError: `model` is not adapted.

    Example:
        >>> print(summary(adapt(model)))  # doctest: +ELLIPSIS
        BertForSequenceClassification: AdaMix adapter, 4 experts, share up, routing per batch, not merged
        layers ...
    """
    state = adamix_state(model)
    config = state.config
    rows: dict[tuple[Any, ...], list[Any]] = {}
    shared = shared_parameters(model)
    for path in state.paths:
        kept = state.stash.get(path)
        facts, parameters, merged = _layer_facts(model.get_submodule(path), kept, shared)
        entry = rows.setdefault((_NUMBER.sub("#", path), facts), [[], 0, 0])
        entry[0].append(path)
        entry[1] += parameters
        entry[2] += merged
    table: list[tuple[str, ...]] = [
        (_together(paths), str(len(paths)), facts[0], facts[1], facts[2], f"{parameters:,}", f"{merged:,}")
        for (_, facts), (paths, parameters, merged) in rows.items()
    ]
    parameters, merged = (sum(entry[n] for entry in rows.values()) for n in (1, 2))
    table.append(("all", str(len(state.paths)), "", "", "", f"{parameters:,}", f"{merged:,}"))
    heads = sum(_numel(p) for path in state.saved for p in model.get_submodule(path).parameters())
    trainable, total = count_parameters(model)
    lines = [
        f"{type(model).__name__}: AdaMix {config.method}, {_several(experts_of(config))} experts, "
        f"share {config.share or 'none'}, {_routing(config)}, {'merged' if state.merged else 'not merged'}",
        *_table(table),
        f"trained and saved whole: {', '.join(state.saved) or 'none'} ({heads:,} parameters)",
        f"trainable: {trainable:,} of {total:,} parameters",
    ]
    return "\n".join(lines)


def _several(numbers: list[int]) -> str:
    return "-".join(map(str, dict.fromkeys((min(numbers), max(numbers)))))


def _routing(config: AdaMixConfig) -> str:
    if config.routing != LEARNED:
        return f"routing per {config.routing}"
    chosen = "all" if config.top_k is None else f"top {config.top_k}"
    return f"learned gates ({config.router}, {chosen}, mix {config.mix})"


def _layer_facts(layer: nn.Module, kept: Any, shared: Mapping[int, object]) -> tuple[tuple[str, str, str], int, int]:
    """((sizes, adaptation, experts), parameters held now, parameters after merging)."""
    if isinstance(layer, AdaptedLayer):
        inputs, outputs, _ = linear_sizes(layer.base)
        adapter = layer.adapter
        banks = adapter.banks()
        experts = f"{banks[0].shape[0]}/{banks[2].shape[0]}"
        words = f"adapter {adapter.bottleneck}, {adapter.activation}"
        merged = _sizes(bank[:1] for bank in banks) if adapter.gate is None else _sizes(adapter.merged_banks())
        return (f"{inputs} -> {outputs}", words, experts), _sizes(banks) + _gate_size(adapter), merged
    lora: RoutedLoRALinear | None = layer if isinstance(layer, RoutedLoRALinear) else kept[0] if kept else None
    inputs, outputs, _ = linear_sizes(layer.base if isinstance(layer, RoutedLoRALinear) else layer)
    if lora is None:
        return (f"{inputs} -> {outputs}", "lora, in the weight", "0/0"), 0, 0
    alpha = f"alpha {lora.alpha:g}" + (" (rslora)" if lora.use_rslora else "")
    words = f"lora {lora.r}, {alpha}" + (f", {lora.groups} slices" if lora.groups > 1 else "")
    sides = (lora.lora_a, lora.lora_b)
    of_one = lora.merged_factors() if lora.gate is not None else (bank[:1] for bank in sides)
    merged = 0 if mergeable(lora, shared) else _sizes(of_one)
    if lora is not layer:
        return (f"{inputs} -> {outputs}", f"{words}, in the weight", "0/0"), 0, 0
    experts = f"{sides[0].shape[0]}/{sides[1].shape[0]}"
    return (f"{inputs} -> {outputs}", words, experts), _sizes(sides) + _gate_size(lora), merged


def _gate_size(layer: RoutedAdapter | RoutedLoRALinear) -> int:
    return 0 if layer.gate is None else _sizes(layer.gate.parameters())


def _sizes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _numel(parameter: nn.Parameter) -> int:
    if parameter.numel() == 0 and hasattr(parameter, "ds_numel"):
        whole: int = parameter.ds_numel
        return whole
    if type(parameter).__name__ == "Params4bit" and not parameter.is_floating_point():
        return parameter.numel() * 2 * parameter.element_size()
    return parameter.numel()


def _together(paths: list[str]) -> str:
    """One name for paths that differ in their numbers: each number that varies becomes {first-last} or {a,b}."""
    varying = list(zip(*(_NUMBER.findall(path) for path in paths)))
    texts = []
    for numbers in varying:
        seen = sorted({int(n) for n in numbers})
        whole = len(seen) > 2 and seen == list(range(seen[0], seen[-1] + 1))
        if len(seen) == 1:
            texts.append(str(seen[0]))
        else:
            texts.append(f"{{{seen[0]}-{seen[-1]}}}" if whole else "{" + ",".join(map(str, seen)) + "}")
    remaining = iter(texts)
    return _NUMBER.sub(lambda _found: next(remaining), paths[0])


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    rows = [_COLUMNS, *rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(_COLUMNS))]

    def line(row: tuple[str, ...]) -> str:
        cells = (f"{c:<{w}}" if n in _LEFT else f"{c:>{w}}" for n, (c, w) in enumerate(zip(row, widths)))
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return [line(rows[0]), rule, *map(line, rows[1:-1]), rule, line(rows[-1])]
