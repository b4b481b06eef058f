"""Which layers of a model to adapt: PEFT's rules for target_modules, and defaults by model_type."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..modules.lora import linear_sizes
from .config import AdaMixConfig
from .quantised import dynamic_linear

# The output of the feed-forward block, before its residual connection and LayerNorm. BERT's pattern is a
# full path because attention.output.dense ends in the same words.
_BERT_FFN = r"(.*\.)?layer\.\d+\.output\.dense"
_LLAMA_FFN = r"(.*\.)?layers\.\d+\.mlp\.down_proj"
_ADAPTER_TARGETS: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "ernie"), _BERT_FFN
    ),
    "distilbert": ("ffn.lin2",),
    "gpt2": ("mlp.c_proj",),
    "t5": ("DenseReluDense.wo",),
    "mt5": ("DenseReluDense.wo",),
    "bart": ("fc2",),
    "opt": ("fc2",),
    "gpt_neox": ("mlp.dense_4h_to_h",),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "smollm3"), _LLAMA_FFN),
}
_LORA_TARGETS: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"), ("query", "value")),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "gpt2": ("c_attn",),
    "t5": ("q", "v"),
    "mt5": ("q", "v"),
    "gpt_neox": ("query_key_value",),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "smollm3", "bart", "opt"),
        ("q_proj", "v_proj"),
    ),
}
_HEADS = ("classifier", "score", "qa_outputs", "classification_head", "pre_classifier")
# PEFT's pattern asks for a name before the list of layers as well; a headless model (h.0.attn) has none.
_LAYER_NUMBER = re.compile(r"(?:.*?\.)??[^.]*\.(\d+)\.")


def model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def target_layers(model: nn.Module, config: AdaMixConfig) -> dict[str, nn.Module]:
    """path -> layer for every layer that `config` adapts, in model order.

    Raises ValueError when the model_type has no default, nothing matches, or a match is not a linear layer.
    """
    rule: str | Sequence[str] | None = config.target_modules
    if rule is None:
        defaults = _ADAPTER_TARGETS if config.method == "adapter" else _LORA_TARGETS
        kind = model_type(model)
        if kind not in defaults:
            raise ValueError(
                f"target_modules: got None for model_type {kind!r}, expected names, since defaults exist only for "
                + ", ".join(sorted(defaults))
            )
        rule = defaults[kind]
    only = config.layers_to_transform
    wanted = {only} if isinstance(only, int) else set(only) if only else None
    heads = {path for path, _ in saved_modules(model, config.modules_to_save)}
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
            + f", expected the names of layers in {type(model).__name__}; nothing matches"
        )
    for path, layer in found.items():
        try:
            linear_sizes(layer)
        except ValueError as error:
            raise ValueError(f"target_modules: got {path!r}: {error}") from error
    return found


def matches(path: str, layer: nn.Module, rule: str | Sequence[str], model: nn.Module) -> bool:
    """PEFT's rule for target_modules: as `named`, and "all-linear" is every linear layer but the output embeddings."""
    if isinstance(rule, str) and rule.lower() == "all-linear":
        owner: Any = model
        output = owner.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return layer is not output and _is_linear(layer)
    return named(path, rule)


def named(path: str, rule: str | Sequence[str]) -> bool:
    """Whether a list holds `path` or a dotted suffix of it; a string is a regular expression for all of it."""
    if isinstance(rule, str):
        return re.fullmatch(rule, path) is not None
    return any(path == name or path.endswith("." + name) for name in rule)


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


def saved_modules(model: nn.Module, names: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """(path, module) of what is trained and saved whole: by name, or the task head of the model.

    Raises ValueError for a name that no module has.
    """
    if names is None:
        return [(path, module) for path, module in model.named_children() if path in _HEADS]
    found = []
    for name in names:
        here = [(p, m) for p, m in model.named_modules() if p and (p == name or p.endswith("." + name))]
        if not here:
            raise ValueError(f"modules_to_save: got {name!r}, expected the name of a module in {type(model).__name__}")
        found.extend(here)
    return found


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D" or dynamic_linear(layer)
