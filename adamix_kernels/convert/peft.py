"""export_peft: an AdaMix LoRA as an ordinary LoRA folder of Hugging Face PEFT."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from ..models._files import make_folder, write_json, write_safetensors
from ..models.state import adamix_state
from ..modules import RoutedLoRALinear

_TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def export_peft(model: nn.Module, directory: str | os.PathLike, *, expert: int | None = None) -> Path:
    """Writes B A of the merged experts as a LoRA that PEFT loads onto the unmerged base; returns the folder.

    A layer whose G slices are adapted (q and v of a fused c_attn: G = 2) becomes one LoRA of rank G*r and
    alpha G*alpha, its B block diagonal, which is the same update.

    Files: `adapter_model.safetensors` (`base_model.model.<path>.lora_A.weight` [G*r, K], `.lora_B.weight`
    [N, G*r], float32 as the banks, and the trained head) and `adapter_config.json`. Load with
    `PeftModel.from_pretrained(base, directory)`, base being the model that adapt() was given.

    Args:
        model: a LoRA model, merged or not. directory: made when missing.
        expert: export this expert instead of the merged ones; a shared side has only one.

    Raises:
        ValueError: `model` is not adapted, or with adapters instead of LoRA (see export_adapterhub); it was
            loaded merged and so has no factors; `expert` is not one of its experts; `directory` is a file.

    Source: PEFT's LoRA format, peft 0.18 and newer.
    """
    state = adamix_state(model)
    config = state.config
    if config.method != "lora":
        raise ValueError(f"model: got method {config.method!r}, expected 'lora'; for adapters see export_adapterhub")
    if expert is not None and not 0 <= expert < config.num_experts:
        raise ValueError(f"expert: got {expert}, expected None or 0 <= expert < {config.num_experts}")
    layers = {path: _lora_layer(model, path) for path in state.paths}
    tensors = {}
    for path, layer in layers.items():
        lora_a, lora_b = _one_lora(layer, expert)
        tensors[f"base_model.model.{path}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{path}.lora_B.weight"] = lora_b
    for path in state.saved:
        for name, value in model.get_submodule(path).state_dict().items():
            tensors[f"base_model.model.{path}.{name}"] = value
    folder = make_folder(directory)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", _peft_config(model, layers, state.saved))
    return folder


def _lora_layer(model: nn.Module, path: str) -> RoutedLoRALinear:
    layer = model.get_submodule(path)
    if isinstance(layer, RoutedLoRALinear):
        return layer
    kept = adamix_state(model).stash.get(path)
    if kept is None:
        raise ValueError(f"model: got a merged checkpoint without factors for {path!r}, expected an unmerged model")
    return kept[0]


@torch.no_grad()
def _one_lora(layer: RoutedLoRALinear, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A [G*r, K] and the block-diagonal B [N, G*r] of one LoRA with the same update."""
    if expert is None:
        lora_a, stacked = layer.merged_factors()
    else:
        lora_a, stacked = (bank[min(expert, bank.shape[0] - 1)] for bank in (layer.lora_a, layer.lora_b))
    lora_b = stacked.new_zeros(layer.out_features, lora_a.shape[0])
    for group, (block, offset) in enumerate(zip(stacked.chunk(layer.groups), layer.output_offsets, strict=True)):
        lora_b[offset : offset + block.shape[0], group * layer.r : (group + 1) * layer.r] = block
    return lora_a, lora_b


def _peft_config(model: nn.Module, layers: dict[str, RoutedLoRALinear], saved: list[str]) -> dict:
    ranks = {path: layer.groups * layer.r for path, layer in layers.items()}
    alphas = {path: layer.groups * layer.alpha for path, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    name = type(model).__name__
    return {
        "peft_type": "LORA",
        "task_type": next((task for part, task in _TASKS.items() if part in name), None),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "lora_dropout": next(iter(layers.values())).dropout,
        "bias": "none",
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "target_modules": _target_names(model, list(layers)),
        "modules_to_save": saved or None,
    }


def _target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The layers' last names where those single out exactly these layers, as PEFT's users write them."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    matched = {p for p, _ in model.named_modules() if p and p.rpartition(".")[2] in names}
    return names if matched == set(paths) else paths
