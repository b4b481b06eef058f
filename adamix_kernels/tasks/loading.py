"""load: a model and its tokenizer from a saved folder, or from the Hub, in one call."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .._extras import needed
from ..models.checkpoint import load_adamix
from ..models.header import CHECKPOINT_NAME, PACK_NAME, read_header
from ..models.hub import resolve_folder
from ..models.pooling import MARK, set_pooling
from ..packs.folder import load_pack
from ._bases import bare_model, base_of, pack_header, tokenizer_for
from ._pretrained import first_line, from_pretrained
from .encoders import Encoder


def load(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    model: str | None = None,
    names: Sequence[str] | None = None,
    backend: str = "auto",
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of what was trained: the base model with the saved adaptation in it, in evaluation mode.

    The base is loaded by the class, the configuration (labels, dtype, quantisation) and the name that the checkpoint
    holds; a base that is a folder of this disk is found as long as both folders stand as they did to each other. Both
    results go into transformers.pipeline(task, model=model, tokenizer=tokenizer).

    Args:
        source: a folder of `adamix train`, `adamix merge`, save_pretrained, save_adamix or of a trainer (checkpoint-N
            too), of save_pack or `adamix pack`, a plain Transformers folder that a merged LoRA was saved as; or
            "user/repo" on the Hub.
        revision: branch, tag or commit of the repository.
        model: the base, a Hub id, a folder or "all-MiniLM-L6-v2", where the checkpoint does not lead to it.
        names: of a pack these alone, with room for as many; None: all.
        backend: as in adapt().

    Returns the model, on the CPU, and its tokenizer; None for a model that has no tokenizer.

    Example:
        >>> model, tokenizer = load("my_run")  # doctest: +SKIP
        >>> model(**tokenizer("what a fine day", return_tensors="pt")).logits.argmax()  # doctest: +SKIP

    Raises:
        TypeError: an argument is of another kind.
        ValueError: no such folder or repository; no checkpoint in it, or a damaged one; no such name in the pack; its
            base cannot be found (the message says what to pass), or is another one.
        ModuleNotFoundError: transformers is not installed; the message says how to install it.
    """
    if model is not None and not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model: got {type(model).__name__}, expected the name of a base model, its folder, or None")
    return load_folder(resolve_folder(source, revision), source, model, names, backend)


def load_folder(
    folder: Path,
    source: str | os.PathLike[str],
    model: str | os.PathLike[str] | None,
    names: Sequence[str] | None = None,
    backend: str = "auto",
) -> tuple[nn.Module, Any]:
    """load() of a source that was resolved to `folder`."""
    with needed("load"):
        import transformers  # noqa: F401

    is_pack = (folder / PACK_NAME).is_file()
    if names is not None and not is_pack:
        raise ValueError(f"names: got {names!r} for {str(source)!r}, which is no pack, expected None")
    if not is_pack and not (folder / CHECKPOINT_NAME).is_file():
        return _plain(folder, source)
    header = pack_header(folder) if is_pack else read_header(folder / CHECKPOINT_NAME)
    base = base_of(folder, header["base_model"], None if model is None else os.fspath(model), Path(source).is_dir())
    built, tokenizer = bare_model(folder, base, header)
    if is_pack:
        return load_pack(built, folder, names=names, backend=backend).eval(), tokenizer
    try:
        load_adamix(built, folder, backend=backend)
    except ValueError as error:
        raise ValueError(f"{error}{_quantised(header)}") from error
    return built.eval(), tokenizer


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
    return model.eval(), tokenizer_for(folder, Encoder(str(source), str(folder), packaged=True), model.config)


def _quantised(header: dict[str, Any]) -> str:
    """What to add to an error about a LoRA that was merged, but not into its weights: its base was quantised."""
    kept = [path for path, layer in header["layers"].items() if "share" in layer]
    if header["merged"] and header["config"].get("method") == "lora" and kept:
        return "; its base was quantised: load and quantise it as then, and call load_adamix(base, folder)"
    return ""
