"""The bare base model that a saved folder belongs to, and its tokenizer."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ..models._staging import TOKENIZER_NAME
from ..models.header import CHECKPOINT_NAME, read_header
from ..models.hub import absent, resolve_folder, with_paths
from ..packs.folder import read_pack
from ..packs.peft_folder import CONFIG_NAME, head_rows, peft_config
from ._pretrained import first_line, from_pretrained, out_of_reach, tokenizer_of
from .encoders import Encoder, load_causal, load_classifier, resolve_model
from .run_file import RUN_NAME, read_run

logger = logging.getLogger(__name__)


def load_base(source: str | os.PathLike[str], *, model: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer): the bare base model of a folder of save_adamix or of a PEFT LoRA, in evaluation mode.

    Args:
        source: the folder, or "user/repo" on the Hub. model: the base, where the folder does not lead to it.

    Raises ValueError: no such folder, or one of something else; its base cannot be found.
    """
    folder = resolve_folder(source)
    if (folder / CHECKPOINT_NAME).is_file():
        header = read_header(folder / CHECKPOINT_NAME)
        base = base_of(folder, header["base_model"], model, Path(source).is_dir())
        built, tokenizer = bare_model(folder, base, header)
    elif (folder / CONFIG_NAME).is_file():
        built, tokenizer = _of_peft(folder, model)
    else:
        raise ValueError(
            f"source: got {str(source)!r}, which holds neither {CHECKPOINT_NAME} nor {CONFIG_NAME}, expected a folder "
            "of adamix train, of save_adamix or of a PEFT LoRA"
        )
    return built.eval(), tokenizer


def _of_peft(folder: Path, given: str | None) -> tuple[Any, Any]:
    values = peft_config(folder / CONFIG_NAME)
    name = given or values.get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"{folder / CONFIG_NAME}: got no base_model_name_or_path, expected a model to be given: --model"
        )
    base, task = resolve_model(name), values.get("task_type")
    if task == "CAUSAL_LM":
        found: tuple[Any, Any] = load_causal(base)
    elif task == "SEQ_CLS":
        labels = [f"LABEL_{number}" for number in range(head_rows(folder) or 2)]
        found = load_classifier(base, labels, "model")
    else:
        raise ValueError(
            f"{folder / CONFIG_NAME}: got task_type {task!r}, expected 'SEQ_CLS' or 'CAUSAL_LM'; in Python, "
            "pack(model, folders) takes any model"
        )
    return found


def pack_header(folder: Path) -> dict[str, Any]:
    """What a pack says of its base model, as a checkpoint says it."""
    values = read_pack(folder)
    return {"base_model": values["base_model"], "saved_modules": list(values["heads"])}


def bare_model(folder: Path, base: Encoder, header: dict[str, Any]) -> tuple[Any, Any]:
    """(model, tokenizer) of the base that a header tells of, without the adaptation."""
    from transformers import GenerationConfig

    facts = header["base_model"]
    if facts.get("config") is None:
        built, tokenizer = _older(folder, base)
    else:
        built = _built(base, header)
        tokenizer = tokenizer_for(folder, base, built.config)
    if facts.get("generation") is not None:
        built.generation_config = GenerationConfig.from_dict(dict(facts["generation"]))
    return built, tokenizer


def base_of(folder: Path, facts: dict[str, Any], given: str | None, local: bool) -> Encoder:
    """The base model: as given, as the run names it, or, where that is not there, as the checkpoint does.

    local: whether a folder of this disk was asked for, not a repository of the Hub.
    """
    if given is not None:
        return resolve_model(given)
    name = facts.get("name_or_path")
    if name is not None and facts.get("folder") is not None and local:
        name = with_paths({"base": name, "base_path": facts["folder"]}, folder)["base"]
    if (folder / RUN_NAME).is_file():
        told = read_run(folder).model
        name = told if name is None or not absent(told) or absent(name) else name
    if name is None:
        raise ValueError(
            f"{folder / CHECKPOINT_NAME}: got no name of its base model, a {facts.get('class')} that was built, not "
            'loaded: expected model="...", a Hub id or a folder; or call load_adamix(base, folder)'
        )
    if absent(name):
        if not local:  # of the Hub, where the way from another disk means nothing, and the name is its owner's word
            return resolve_model(os.path.basename(name))
        raise ValueError(
            f"model: got {name!r} as the base of {str(folder)!r}, but no such folder, expected where it is now: "
            "--model, in Python model=..."
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
    options: dict[str, Any] = {"config": config}
    if facts.get("dtype") is not None and "quantization_config" not in facts["config"]:
        options["dtype"] = facts["dtype"]
    try:
        options["local_files_only"] = base.packaged or out_of_reach(base.path)
        # A head that was trained comes with the checkpoint; any other is the base's.
        heads = header["saved_modules"]
        model = from_pretrained(kind, base.path, unread=_unread(facts), new_head=heads, **options)
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


def tokenizer_for(folder: Path, base: Encoder, config: Any) -> Any:
    own = (folder / TOKENIZER_NAME).is_file()
    try:
        local = own or base.packaged or out_of_reach(base.path)
        return tokenizer_of(str(folder) if own else base.path, local, config=config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if own:
            raise ValueError(f"{folder / TOKENIZER_NAME}: cannot load the tokenizer: {first_line(error)}") from error
        if hasattr(config.get_text_config(decoder=True), "vocab_size"):
            logger.warning("No tokenizer in %s, nor with its base: %s", folder, first_line(error))
        return None
