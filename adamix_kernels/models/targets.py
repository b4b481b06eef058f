"""Which layers of a model to adapt: PEFT's rules for target_modules, and defaults by model_type."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..modules.lora import linear_sizes
from .config import HEAD_TASKS, AdaMixConfig
from .families import ADAPTER_TARGETS, GATHERED, LORA_TARGETS, TOKENS_FIRST
from .quantised import dynamic_linear

logger = logging.getLogger(__name__)
_HEADS = (
    "classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "logits_proj", "sequence_summary",
)  # fmt: skip
# Of the head where they stand beside the classifier, outside the encoder: DeBERTa's and EuroBERT's, which no pretrained
# file holds, so that each process would draw its own. Older checkpoints hold none of it.
BELOW_CLASSIFIER = ("pooler", "dense")
# PEFT's pattern asks for a name before the list of layers as well; a headless model (h.0.attn) has none.
_LAYER_NUMBER = re.compile(r"(?:.*?\.)??[^.]*\.(\d+)\.")


def model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def target_layers(model: nn.Module, config: AdaMixConfig) -> dict[str, nn.Module]:
    """path -> layer for every layer that `config` adapts, in model order.

    A name of a list that no layer has is left out, as long as another one matches: warn_of_unmatched() says so.

    Raises ValueError when the model_type has no default, nothing matches, or a match is not a linear layer; it says
    which linear layers the model has.
    """
    rule: str | Sequence[str] | None = config.target_modules
    if rule is None:
        defaults = ADAPTER_TARGETS if config.method == "adapter" else LORA_TARGETS
        kind = model_type(model)
        if kind not in defaults:
            raise ValueError(
                f"target_modules: got None for model_type {kind!r}, which has no default for method "
                f"{config.method!r}, expected names; {_what_is_there(model)}"
            )
        rule = defaults[kind]
    wanted = _numbers(config)
    heads = {path for path, _ in saved_modules(model, config.modules_to_save, config.task_type)}
    found = {}
    for path, layer in model.named_modules():
        if not path or any(path == head or path.startswith(head + ".") for head in heads):
            continue
        if config.exclude_modules and named(path, config.exclude_modules):
            continue
        if not matches(path, layer, rule, model):
            continue
        if wanted is None or layer_number(path, config.layers_pattern) in wanted:
            found[path] = layer
    if not found:
        raise ValueError(
            f"target_modules: got {rule!r}"
            + (f" with layers_to_transform={sorted(wanted)}" if wanted is not None else "")
            + f", expected the names of layers in {type(model).__name__}; nothing matches: "
            + _what_is_there(model, rule)
        )
    for path, layer in found.items():
        try:
            linear_sizes(layer)
        except ValueError as error:
            raise ValueError(f"target_modules: got {path!r}: {error}; {_what_is_there(model)}") from error
    return found


def _numbers(config: AdaMixConfig) -> set[int] | None:
    only = config.layers_to_transform
    return {only} if isinstance(only, int) else set(only) if only else None


def linear_names(model: nn.Module) -> list[str]:
    """How the model's linear layers end, in its order: q_proj, ...; output.dense where `dense` is several layers."""
    output = _output_embeddings(model)
    heads = tuple(path + "." for path, _ in saved_modules(model, None))
    paths = [
        re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
        for path, layer in model.named_modules()
        if _is_linear(layer) and layer is not output and not (path + ".").startswith(heads)
    ]
    places: dict[str, set[str]] = {}
    for path in paths:
        places.setdefault(path.rpartition(".")[2], set()).add(path)
    return list(dict.fromkeys(_ending(path, len(places[path.rpartition(".")[2]]) > 1) for path in paths))


def _ending(path: str, two: bool) -> str:
    parts = [part for part in path.split(".") if part != "*"]
    return ".".join(parts[-2:] if two else parts[-1:])


def _what_is_there(model: nn.Module, rule: str | Sequence[str] = ()) -> str:
    """The end of a message: the linear layers of the model, and those closest to what was asked for."""
    names = linear_names(model)
    if not names:
        return f"{type(model).__name__} has no linear layers"
    asked = re.findall(r"\w+", rule)[-1:] if isinstance(rule, str) else [name.rpartition(".")[2] for name in rule]
    close = dict.fromkeys(hit for name in asked for hit in _closest(name, names))
    hint = f" (closest: {', '.join(close)})" if close else ""
    return f'its linear layers end in: {", ".join(names)}{hint}; "all-linear" takes them all'


def _closest(name: str, names: Iterable[str]) -> list[str]:
    by_last = {known.rpartition(".")[2]: known for known in reversed(list(names))}
    return [by_last[hit] for hit in difflib.get_close_matches(name, by_last, n=2)]


def warn_of_unmatched(model: nn.Module, config: AdaMixConfig) -> None:
    """Logs the names of target_modules, and the numbers of layers_to_transform, that no layer has."""
    numbers = {layer_number(path, config.layers_pattern) for path in target_layers(model, config)}
    beyond = sorted((_numbers(config) or set()) - numbers)
    if beyond:
        logger.warning("layers_to_transform: no layer to adapt is numbered %s", ", ".join(map(str, beyond)))
    rule = config.target_modules
    if not isinstance(rule, list):
        return
    paths = [path for path, _ in model.named_modules()]
    absent = [name for name in rule if not any(named(path, [name]) for path in paths)]
    if absent:
        logger.warning("target_modules: nothing is named %s: %s", ", ".join(absent), _what_is_there(model, absent))


def matches(path: str, layer: nn.Module, rule: str | Sequence[str], model: nn.Module) -> bool:
    """PEFT's rule for target_modules: as `named`, and "all-linear" is every linear layer but the output embeddings."""
    if isinstance(rule, str) and rule.lower() == "all-linear":
        return layer is not _output_embeddings(model) and _is_linear(layer)
    return named(path, rule)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    owner: Any = model
    found: nn.Module | None = owner.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return found


def named(path: str, rule: str | Sequence[str]) -> bool:
    """Whether a list holds `path` or a dotted suffix of it; a string is a regular expression for all of it."""
    if isinstance(rule, str):
        return re.fullmatch(rule, path) is not None
    return any(path == name or path.endswith("." + name) for name in rule)


def tokens_first(model: nn.Module, path: str) -> bool:
    """Whether the layer at `path` is given [S, B, H], tokens before samples."""
    rule = TOKENS_FIRST.get(model_type(model) or "")
    return rule is not None and named(path, rule)


def is_gathered(path: str) -> bool:
    """Whether the layer at `path` is given tokens of all samples that chose it: no sample's expert fits them."""
    return named(path, GATHERED)


def layer_number(path: str, pattern: str | Sequence[str] | None = None) -> int | None:
    """The transformer layer a path lies in: 3 for encoder.layer.3.output.dense, the first number in it.

    pattern: names (regular expressions) that may stand before the number, PEFT's layers_pattern; None: any name.
    """
    if not pattern:
        found = _LAYER_NUMBER.match(path)
    else:
        names = [pattern] if isinstance(pattern, str) else pattern
        tries = (re.match(rf"(?:^|.*?\.)(?:{name})\.(\d+)\.", path) for name in names)
        found = next((hit for hit in tries if hit), None)
    return int(found[found.lastindex or 0]) if found else None


def saved_modules(
    model: nn.Module, names: Sequence[str] | None, task_type: str | None = None
) -> list[tuple[str, nn.Module]]:
    """(path, module) of what is trained and saved whole: by name, or the task head of the model.

    task_type: with a task of classification the head is among them in any case, as in PEFT.

    Raises ValueError for a name that no module has.
    """
    children = dict(model.named_children())
    known = (*_HEADS, *BELOW_CLASSIFIER) if "classifier" in children else _HEADS
    heads = [(path, module) for path, module in children.items() if path in known]
    if names is None:
        return heads
    found = []
    for name in names:
        here = [(p, m) for p, m in model.named_modules() if p and (p == name or p.endswith("." + name))]
        if not here:
            close = difflib.get_close_matches(name, {p.rpartition(".")[2] for p, _ in model.named_modules()}, n=2)
            raise ValueError(
                f"modules_to_save: got {name!r}, expected the name of a module in {type(model).__name__}"
                + (f" (closest: {', '.join(close)})" if close else "")
            )
        found.extend(here)
    if task_type in HEAD_TASKS:
        inside = tuple(path + "." for path, _ in heads)
        found = [(path, module) for path, module in found if not (path + ".").startswith(inside)] + heads
    return found


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D" or dynamic_linear(layer)
