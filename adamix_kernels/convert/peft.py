"""export_peft: an AdaMix LoRA as an ordinary LoRA folder of Hugging Face PEFT."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models._files import make_folder, write_json, write_safetensors
from ..models.card import base_name, write_card
from ..models.factors import Factors
from ..models.gating import check_one, routed_layers
from ..models.merging import check_experts
from ..models.saving import check_export
from ..models.state import adamix_state, check_no_pack
from ..models.tying import tied_outside
from ..modules import RoutedLoRALinear
from ._card import peft_card

_TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}

# The heads that PEFT expects in the folder of a task without being told.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def export_peft(
    model: nn.Module, directory: str | os.PathLike[str], *, expert: int | str | None = None, head: bool = True
) -> Path:
    """Writes B A of the merged experts as a LoRA that PEFT loads onto the unmerged base; returns the folder.

    A layer whose G slices are adapted (q and v of a fused c_attn: G = 2) becomes one LoRA of rank G * r and
    alpha G * alpha (with use_rslora sqrt(G) * alpha), its B block diagonal, which is the same update. task_type is
    that of the config, or of the model's class; None for a model that reads no text (Whisper, ViT).

    Files: `adapter_model.safetensors` (`base_model.model.<path>.lora_A.weight` [G * r, K], `.lora_B.weight`
    [N, G * r], float32 as the banks, and the trained head), `adapter_config.json` and, where there is none yet,
    a model card `README.md`. Load with `PeftModel.from_pretrained(base, directory)`, base being the model that
    adapt() was given.

    Args:
        model: a LoRA model, merged or not. directory: made when missing.
        expert: export this expert instead of the merged ones; a shared side has only one. "each": every expert
            into a folder of its own, `directory/expert_0`, `expert_1`, ..., for load_adapter and set_adapter.
        head: False leaves out the modules trained whole, which vLLM does not take from a LoRA folder; the
            base that serves must then have them.

    Raises:
        ValueError: `model` is not adapted, or with adapters instead of LoRA (see export_adapterhub); it was
            loaded merged and so has no factors; its gates are learned, it is not merged, and no expert is named;
            `expert` is not one of its experts, or they are gone (loaded merged, or merged with keep=False); a weight is
            trained whole and, tied to it, the base of a LoRA; `directory` is a file or holds a whole model or a pack.

    Source: PEFT's LoRA format, peft 0.18 and newer.

    Example:
        >>> folder = export_peft(adapt(model, AdaMixConfig(method="lora", r=4)), "peft_lora")
        >>> (folder / "adapter_model.safetensors").is_file()
        True
    """
    state = adamix_state(model)
    config = state.config
    check_no_pack(model, "export")
    if config.method != "lora":
        raise ValueError(f"model: got method {config.method!r}, expected 'lora'; for adapters see export_adapterhub")
    if expert is not None:
        check_experts(model)
    counts = [state.stash.get(path, (layer,))[0].num_experts for path, layer in routed_layers(model).items()]
    wanted = _wanted(expert, min(counts, default=config.num_experts))
    if expert is None:
        check_one(model, "PEFT's LoRA", ', or expert=N, or "each"')
    layers = {path: _lora_layer(model, path, expert is None) for path in state.paths}
    saved = _with_tied(model) if head else []
    folder = make_folder(directory)
    check_export(folder, model)
    if expert != "each":
        _write(model, folder, layers, saved, wanted[0])
        return folder
    for one in wanted:
        _write(model, make_folder(folder / f"expert_{one}"), layers, saved, one)
    return folder


def _with_tied(model: nn.Module) -> list[str]:
    """The modules trained whole, and those that hold a parameter of theirs, too (an lm_head tied to an embedding): PEFT
    has a copy of each, and of the others the base's values."""
    state = adamix_state(model)
    found = list(state.saved)
    for path in state.saved:
        for name in tied_outside(model, path):
            owner = name.rpartition(".")[0]
            if owner.removesuffix(".base") in state.paths:
                raise ValueError(
                    f"{owner.removesuffix('.base')}: got a LoRA on a weight that is trained whole as well, tied to "
                    f"{path}, expected one of them, which is what PEFT has of a layer; save_adamix keeps both"
                )
            around = not owner or f"{path}.".startswith(f"{owner}.")  # which reads the parameter at `path`
            if not around and not any(f"{owner}.".startswith(f"{known}.") for known in found):
                found.append(owner)
    return found


def _wanted(expert: int | str | None, count: int) -> list[int | None]:
    if expert is None:
        return [None]
    if expert == "each":
        return list(range(count))
    if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < count:
        raise ValueError(f"expert: got {expert!r}, expected None, 'each' or 0 <= expert < {count}")
    return [expert]


def _lora_layer(model: nn.Module, path: str, merged: bool) -> RoutedLoRALinear | Factors:
    state = adamix_state(model)
    layer: Any = model.get_submodule(path)
    kept = state.stash.get(path)
    # The one LoRA of a merged layer may have been trained on since.
    if kept is not None and not (merged and (state.gate_spread or isinstance(layer, RoutedLoRALinear))):
        layer = kept[0]
    if not isinstance(layer, RoutedLoRALinear):
        layer = state.factors.get(path)
    if layer is None:
        raise ValueError(
            f"model: got a merged checkpoint without factors for {path!r}, as releases before version 3 of the format "
            "wrote it, expected an unmerged one, or one merged and saved anew"
        )
    found: RoutedLoRALinear | Factors = layer
    return found


def _write(
    model: nn.Module, folder: Path, layers: dict[str, RoutedLoRALinear | Factors], saved: list[str], expert: int | None
) -> None:
    tensors = {}
    for path, layer in layers.items():
        lora_a, lora_b = _one_lora(layer, expert)
        tensors[f"base_model.model.{path}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{path}.lora_B.weight"] = lora_b
    for path in saved:
        for name, value in model.get_submodule(path).state_dict().items():
            tensors[f"base_model.model.{path}.{name}"] = value
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", _peft_config(model, layers, saved))
    write_card(folder, peft_card(model, expert))


@torch.no_grad()
def _one_lora(layer: RoutedLoRALinear | Factors, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A [G * r, K] and the block-diagonal B [N, G * r] of one LoRA with the same update."""
    if expert is None or isinstance(layer, Factors):
        lora_a, stacked = layer.merged_factors()
    else:
        lora_a, stacked = (bank[min(expert, bank.shape[0] - 1)] for bank in (layer.lora_a, layer.lora_b))
    lora_b = stacked.new_zeros(layer.out_features, lora_a.shape[0])
    for group, (block, offset) in enumerate(zip(stacked.chunk(layer.groups), layer.output_offsets, strict=True)):
        lora_b[offset : offset + block.shape[0], group * layer.r : (group + 1) * layer.r] = block
    return lora_a, lora_b


def _peft_config(model: nn.Module, layers: dict[str, RoutedLoRALinear | Factors], saved: list[str]) -> dict[str, Any]:
    ranks = {path: layer.groups * layer.r for path, layer in layers.items()}
    first = next(iter(layers.values()))
    # G blocks of rank r are one LoRA of rank G*r, whose scaling divides by G, or its root.
    alphas = {
        path: _whole((math.sqrt(layer.groups) if layer.use_rslora else layer.groups) * layer.alpha)
        for path, layer in layers.items()
    }
    # vLLM holds r, and no pattern, against its bound; all layers have one scaling.
    widest = max(ranks, key=ranks.__getitem__)
    rank, alpha = ranks[widest], alphas[widest]
    return {
        "peft_type": "LORA",
        "task_type": _task(model, saved),
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "bias": "none",
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "target_modules": _target_names(model, list(layers)),
        "modules_to_save": saved or None,
    }


def _task(model: nn.Module, saved: list[str]) -> str | None:
    """PEFT's class for the task; None is its plain one, which passes on whatever the model takes."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":  # the others know of input_ids alone
        return None
    named = next((task for part, task in _TASKS.items() if part in type(model).__name__), None)
    task = adamix_state(model).config.task_type or named
    absent = [head for head in _TASK_HEADS.get(task or "", ()) if hasattr(model, head) and head not in saved]
    return None if absent else task


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The layers' last names where those single out exactly these layers, as PEFT's users write them."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    matched = {p for p, _ in model.named_modules() if p and p.rpartition(".")[2] in names}
    return names if matched == set(paths) else paths
