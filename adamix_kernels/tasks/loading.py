"""load: a model and its tokenizer from a saved folder, or from the Hub, in one call."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from .._extras import needed
from ..models.checkpoint import load_adamix
from ..models.header import CHECKPOINT_NAME, read_header
from ..models.hub import resolve_folder, with_paths
from ..models.pooling import MARK, set_pooling
from ._pretrained import first_line, from_pretrained, tokenizer_of
from .encoders import Encoder, load_classifier, resolve_model
from .run_file import RUN_NAME, read_run

logger = logging.getLogger(__name__)

_TOKENIZER = "tokenizer_config.json"


def load(
    source: str | os.PathLike[str], *, revision: str | None = None, model: str | None = None, backend: str = "auto"
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of what was trained: the base model with the saved adaptation in it, in evaluation mode.

    The base is loaded by the class, the configuration (labels, dtype, quantisation) and the name that the checkpoint
    holds; a base that is a folder of this disk is found as long as both folders stand as they did to each other. Both
    results go into transformers.pipeline(task, model=model, tokenizer=tokenizer).

    Args:
        source: a folder of `adamix train`, `adamix merge`, save_pretrained, save_adamix or of a trainer (checkpoint-N
            too), a plain Transformers folder that a merged LoRA was saved as; or "user/repo" on the Hub.
        revision: branch, tag or commit of the repository.
        model: the base, a Hub id, a folder or "all-MiniLM-L6-v2", where the checkpoint does not lead to it.
        backend: as in adapt().

    Returns the model, on the CPU, and its tokenizer; None for a model that has no tokenizer.

    Example:
        >>> model, tokenizer = load("my_run")  # doctest: +SKIP
        >>> model(**tokenizer("what a fine day", return_tensors="pt")).logits.argmax()  # doctest: +SKIP

    Raises:
        TypeError: an argument is of another kind.
        ValueError: no such folder or repository; no checkpoint in it, or a damaged one; its base cannot be found (the
            message says what to pass), or is another one.
        ModuleNotFoundError: transformers is not installed; the message says how to install it.
    """
    if model is not None and not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model: got {type(model).__name__}, expected the name of a base model, its folder, or None")
    folder = resolve_folder(source, revision)
    with needed("load"):
        from transformers import GenerationConfig

    if not (folder / CHECKPOINT_NAME).is_file():
        return _plain(folder, source)
    header = read_header(folder / CHECKPOINT_NAME)
    base = _base(folder, header["base_model"], None if model is None else os.fspath(model), Path(source).is_dir())
    facts = header["base_model"]
    if facts.get("config") is None:
        built, tokenizer = _older(folder, base)
    else:
        built = _built(base, header)
        tokenizer = _tokenizer(folder, base, built.config)
    if facts.get("generation") is not None:
        built.generation_config = GenerationConfig.from_dict(dict(facts["generation"]))
    try:
        load_adamix(built, folder, backend=backend)
    except ValueError as error:
        raise ValueError(f"{error}{_quantised(header)}") from error
    return built.eval(), tokenizer


def _base(folder: Path, facts: dict[str, Any], given: str | None, local: bool) -> Encoder:
    """The base model: as given, as the run names it, or as the checkpoint does."""
    if given is not None:
        return resolve_model(given)
    name = facts.get("name_or_path")
    if (folder / RUN_NAME).is_file():
        name = read_run(folder).model
    elif name is not None and facts.get("folder") is not None and local:
        name = with_paths({"base": name, "base_path": facts["folder"]}, folder)["base"]
    if name is None:
        raise ValueError(
            f"{folder / CHECKPOINT_NAME}: got no name of its base model, a {facts.get('class')} that was built, not "
            'loaded: expected model="...", a Hub id or a folder; or call load_adamix(base, folder)'
        )
    return resolve_model(name)


def _built(base: Encoder, header: dict[str, Any]) -> Any:
    """The bare base model, by the class and the configuration that the checkpoint holds."""
    import transformers

    facts = header["base_model"]
    kind = getattr(transformers, str(facts.get("class")), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"source: got a checkpoint of a {facts.get('class')}, which transformers {transformers.__version__} has "
            "not, expected one of its models; build the base yourself and call load_adamix(base, folder)"
        )
    config_class: Any = kind.config_class
    config = config_class.from_dict(dict(facts["config"]))
    options: dict[str, Any] = {"config": config, "local_files_only": base.packaged}
    if facts.get("dtype") is not None and "quantization_config" not in facts["config"]:
        options["dtype"] = facts["dtype"]
    try:
        # A head that was trained comes with the checkpoint; any other is the base's.
        head = bool(header["saved_modules"])
        model = from_pretrained(kind, base.path, unread=_unread(facts), new_head=head, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f'model: cannot load the base model {base.name!r} ({first_line(error)}), expected model="...", a Hub id or '
            "a folder that has it"
        ) from error
    model.config.name_or_path = base.name
    return model


def _unread(facts: dict[str, Any]) -> str | None:
    return ".pooler." if facts.get("pooling") == "mean" else None


def _older(folder: Path, base: Encoder) -> tuple[Any, Any]:
    """For a checkpoint whose header does not tell how to build its base: its run does, for a classifier."""
    if not (folder / RUN_NAME).is_file():
        raise ValueError(
            f"{folder / CHECKPOINT_NAME}: got a checkpoint of an older release, or of a model without a configuration, "
            f"and no {RUN_NAME} beside it, expected load_adamix(base, folder), base being the model it was saved from"
        )
    run = read_run(folder)
    return load_classifier(base, run.label_names, run.pooling, run.task)


def _plain(folder: Path, source: object) -> tuple[Any, Any]:
    """A whole model in Transformers' own format: a LoRA merged into its weights, or one that was never adapted."""
    import transformers

    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = values.get("architectures") or []
    except (OSError, ValueError, AttributeError):
        names, values = [], {}
    kind = getattr(transformers, str(names[0]), None) if names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"source: got {str(source)!r}, which holds no {CHECKPOINT_NAME} and no whole model, expected a folder of "
            "adamix train, adamix merge, save_pretrained, save_adamix or a trainer"
        )
    try:
        model = from_pretrained(kind, str(folder), new_head=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"source: cannot load {str(source)!r}: {first_line(error)}") from error
    if values.get(MARK) == "mean":
        set_pooling(model, "mean")
    return model.eval(), _tokenizer(folder, Encoder(str(source), str(folder), packaged=True), model.config)


def _tokenizer(folder: Path, base: Encoder, config: Any) -> Any:
    own = (folder / _TOKENIZER).is_file()
    try:
        return tokenizer_of(str(folder) if own else base.path, own or base.packaged, config=config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if own:
            raise ValueError(f"{folder / _TOKENIZER}: cannot load the tokenizer: {first_line(error)}") from error
        logger.warning("No tokenizer in %s, nor with %s: %s", folder, base.name, first_line(error))
        return None


def _quantised(header: dict[str, Any]) -> str:
    """What to add to an error about a LoRA that was merged, but not into its weights: its base was quantised."""
    kept = [path for path, layer in header["layers"].items() if "share" in layer]
    if header["merged"] and header["config"].get("method") == "lora" and kept:
        return "; its base was quantised: load and quantise it as then, and call load_adamix(base, folder)"
    return ""
