"""export_adapterhub: an AdaMix adapter as a folder of AdapterHub's `adapters` library."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..models._files import make_folder, write_json, write_pickled_tensors, write_safetensors
from ..models.card import base_name, write_card
from ..models.gating import check_one
from ..models.saving import check_export
from ..models.state import AdaMixState, adamix_state, check_no_pack
from ..models.targets import layer_number, model_type
from ..modules import AdaptedLayer
from ._card import adapterhub_card

_FAMILIES = ("bert", "roberta")
_PLACE = re.compile(r"(?:(?:bert|roberta)\.)?encoder\.layer\.\d+\.output\.dense")
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu", None: "linear"}
_FORMAT = "adapters.1.3.0"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def export_adapterhub(model: nn.Module, directory: str | os.PathLike[str], name: str = "adamix") -> Path:
    """Writes the merged adapter as a sequential bottleneck adapter of `adapters`; returns the folder.

    Files: `adapter_config.json`; `pytorch_adapter.bin` and `adapter.safetensors`, the same tensors, under
    `{bert|roberta}.encoder.layer.{i}.output.adapters.{name}.adapter_down.0.{weight,bias}` ([r, H], [r]) and
    `.adapter_up.{weight,bias}` ([H, r], [H]); and the trained head as `head_config.json`,
    `pytorch_model_head.bin` and `model_head.safetensors`; where there is none yet, a model card `README.md`.
    The .bin files hold tensors alone (torch.load with weights_only). Load with `model.load_adapter(directory)`.

    Args:
        model: BERT or RoBERTa with adapters behind output.dense (adapt()'s default place), merged or not.
        directory: made when missing. name: of the adapter there: letters, digits, "_" and "-".

    Raises:
        ValueError: `model` is not adapted, is adapted with LoRA (see export_peft), is of another family or
            adapted in another place; its gates are learned and it is not merged; `name` has other characters;
            `directory` is a file or holds a whole model or a pack.

    Source: SeqBnConfig and AdapterLoader of adapters 1.3.

    Example:
        >>> folder = export_adapterhub(adapt(model), "adapterhub")
        >>> (folder / "pytorch_adapter.bin").is_file()
        True
    """
    state = adamix_state(model)
    check_no_pack(model, "export")
    check_one(model, "AdapterHub's adapter")
    _check(model, state, name)
    folder = make_folder(directory)
    check_export(folder, model)
    family = model_type(model)
    outer = "" if state.paths[0].startswith(f"{family}.") else f"{family}."
    tensors = {}
    for path in state.paths:
        stem = f"{outer}{path.removesuffix('.dense')}.adapters.{name}"
        with torch.no_grad():
            layer = cast("AdaptedLayer", model.get_submodule(path))
            down_weight, down_bias, up_weight, up_bias = layer.adapter.merged_banks()
        tensors[f"{stem}.adapter_down.0.weight"], tensors[f"{stem}.adapter_down.0.bias"] = down_weight[0], down_bias[0]
        tensors[f"{stem}.adapter_up.weight"], tensors[f"{stem}.adapter_up.bias"] = up_weight[0], up_bias[0]
    heads = {
        f"{path}.{key}": value for path in state.saved for key, value in model.get_submodule(path).state_dict().items()
    }
    _write_weights(folder, "pytorch_adapter.bin", "adapter.safetensors", tensors)
    write_json(folder / "adapter_config.json", {**_facts(model, name), "config": _adapter_config(model, state)})
    if heads:
        _write_weights(folder, "pytorch_model_head.bin", "model_head.safetensors", heads)
        config: Any = model.config
        labels = {"label2id": config.label2id, "num_labels": config.num_labels}
        write_json(folder / "head_config.json", {**_facts(model, None), "config": None, **labels})
    write_card(folder, adapterhub_card(model, name))
    return folder


def _check(model: nn.Module, state: AdaMixState, name: str) -> None:
    if state.config.method != "adapter":
        raise ValueError(f"model: got method {state.config.method!r}, expected 'adapter'; use export_peft for LoRA")
    if model_type(model) not in _FAMILIES:
        raise ValueError(f"model: got model_type {model_type(model)!r}, expected one of {', '.join(_FAMILIES)}")
    for path in state.paths:
        if not _PLACE.fullmatch(path):
            raise ValueError(f"model: got an adapter at {path!r}, expected encoder.layer.N.output.dense only")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name: got {name!r}, expected letters, digits, '_' and '-'")


def _facts(model: nn.Module, name: str | None) -> dict[str, Any]:
    config: Any = model.config
    return {
        "model_type": model_type(model),
        "hidden_size": config.hidden_size,
        "model_name": base_name(model),
        "model_class": type(model).__name__,
        "name": name,
        "version": _FORMAT,
    }


def _adapter_config(model: nn.Module, state: AdaMixState) -> dict[str, Any]:
    """SeqBnConfig's fields with AdaMix's placement: behind the dense layer, before the residual and LayerNorm."""
    config: Any = model.config
    adapters = {layer_number(path): cast("AdaptedLayer", model.get_submodule(path)).adapter for path in state.paths}
    adapter = next(iter(adapters.values()))
    # adapters rounds hidden_size // reduction_factor down: the next float below H / r gives exactly r.
    factors = {str(i): math.nextafter(one.hidden_size / one.bottleneck, 0.0) for i, one in adapters.items()}
    same = len(set(factors.values())) == 1
    return {
        "mh_adapter": False,
        "output_adapter": True,
        "reduction_factor": factors[next(iter(factors))] if same else factors,
        "non_linearity": _ACTIVATIONS[adapter.activation],
        "original_ln_before": False,
        "original_ln_after": True,
        "ln_before": False,
        "ln_after": False,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "is_parallel": False,
        "scaling": 1.0,
        "use_gating": False,
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "cross_adapter": False,
        "leave_out": [i for i in range(config.num_hidden_layers) if i not in adapters],
        "dropout": 0.0,
        "init_weights": "bert",
        "phm_layer": False,
    }


def _write_weights(folder: Path, pickled: str, safe: str, tensors: dict[str, torch.Tensor]) -> None:
    ready = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    write_safetensors(folder / safe, ready)
    write_pickled_tensors(folder / pickled, ready)
