"""save_pretrained and push_to_hub of an adapted model: an AdaMix checkpoint, which plain Transformers refuses."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..modules import AdaptedLayer, RoutedLoRALinear
from ..routing import process_rank
from ._files import one_writer, write_json
from .card import adamix_card, write_card
from .header import CHECKPOINT_NAME, check_no_pack_in, read_header
from .pooling import pooling_of
from .sharding import is_sharded
from .state import adamix_state

logger = logging.getLogger(__name__)

# Transformers tells an unknown model_type (AutoConfig, AutoModel, pipeline) and a wrong transformers_weights (a class
# by its name, before it builds anything) by printing them: so they say what is to be done.
_WAY = "an AdaMix checkpoint without its base model: use adamix_kernels.load, not from_pretrained"
GUARD = {"model_type": f"adamix ({_WAY})", "transformers_weights": f"none, this is {_WAY}"}
_INDEX = "model.safetensors.index.json"
_PLAIN = ("model.safetensors", _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def install_saving(model: nn.Module) -> None:
    """Puts the guards before the class's methods, where it has them; they travel through deepcopy and pickle."""
    owner: Any = model
    if callable(getattr(model, "save_pretrained", None)):
        owner.save_pretrained = GuardedSave(model)
    if callable(getattr(model, "push_to_hub", None)):
        owner.push_to_hub = GuardedPush(model)


def is_plain(model: nn.Module) -> bool:
    """Whether plain Transformers computes the same from the model's weights: LoRA merged into all of them, and a head
    that reads what its class gives it."""
    state = adamix_state(model)
    layers = [model.get_submodule(path) for path in state.paths]
    routed = any(isinstance(layer, (AdaptedLayer, RoutedLoRALinear)) for layer in layers)
    return not routed and pooling_of(model) != "mean"


def save_folder(
    model: nn.Module,
    directory: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor] | None = None,
    tags: Sequence[str] = (),
    here: bool = True,
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """save_adamix; config.json, for which plain Transformers refuses the folder by name; the list of tensors from which
    transformers' Trainer resumes and takes its best model; and a README.md where there is none.

    Where `directory` holds a whole model, its config.json stays, and a warning says so. Under FSDP2 without
    state_dict every process must call it, and the first one writes. Arguments and errors: see save_adamix.
    tags: more ones for the card. here, beside: see write_checkpoint.
    """
    from .checkpoint import write_checkpoint

    folder = write_checkpoint(model, directory, state_dict, here, beside)
    if state_dict is None and process_rank() != 0 and _sharded(model):
        return folder
    whole = _whole_model(folder)
    if whole is None:
        write_json(folder / "config.json", GUARD)
        # from_pretrained stops at such metadata, should a caller bring a configuration of his own.
        with one_writer(folder):  # another process may have put its checkpoint in the place of ours
            write_json(folder / _INDEX, {"metadata": _WAY, "weight_map": _tensor_names(folder)})
    else:
        logger.warning(
            "%s holds a whole model (%s) besides the AdaMix checkpoint that was written there: from_pretrained reads "
            "that model, adamix_kernels.load the checkpoint",
            folder,
            whole,
        )
    write_card(folder, adamix_card(model, tags))
    return folder


def check_export(folder: Path, model: nn.Module) -> None:
    """Raises ValueError for a folder that `model` in another project's format does not belong into: one of a
    checkpoint, too, unless it is the merged one that `model` was loaded from."""
    check_no_pack_in(folder)
    path, origin = folder / CHECKPOINT_NAME, adamix_state(model).origin
    if path.exists() and not (origin and read_header(path)["tensors"].get("sha256") == origin):
        raise ValueError(
            f"directory: got {str(folder)!r}, which holds an AdaMix checkpoint, expected another folder: what reads "
            "one of both would find the other's files"
        )
    whole = _whole_model(folder)
    if whole is not None:
        raise ValueError(
            f"directory: got {str(folder)!r}, which holds a whole model ({whole}), expected another folder: "
            "from_pretrained would put the adapter into every model that it reads from there"
        )


def _whole_model(folder: Path) -> str | None:
    """The file of a whole model's weights in `folder`, if there is one and its config.json is not the guard."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind == GUARD["model_type"]:
        return None
    return next((name for name in _PLAIN if (folder / name).exists()), None)


def _tensor_names(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    file = read_header(folder / CHECKPOINT_NAME)["tensors"]["file"]
    with safe_open(folder / file, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)


class Guarded:
    """A method of a model, in the place of its class's."""

    def __init__(self, model: nn.Module):
        self.model = model


class GuardedSave(Guarded):
    """model.save_pretrained that loses nothing: what is not plain Transformers is written as an AdaMix checkpoint."""

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Arguments as in transformers; those that cut a whole model's weights into files have no meaning here."""
        model: Any = self.model
        if is_plain(model):
            if (Path(save_directory) / CHECKPOINT_NAME).exists():
                raise ValueError(
                    f"save_directory: got {str(save_directory)!r}, which holds an AdaMix checkpoint, expected another "
                    "folder for the merged weights, or save_adamix"
                )
            if state_dict is not None:
                options["state_dict"] = state_dict
            kind: Any = type(model)
            kind.save_pretrained(model, save_directory, is_main_process, push_to_hub=push_to_hub, **options)
            return
        if not is_main_process and (state_dict is not None or not _sharded(model)):
            return
        save_folder(model, save_directory, state_dict)
        if push_to_hub and is_main_process:
            repository = options.pop("repo_id", None) or Path(save_directory).resolve().name
            model.push_to_hub(repository, **options)


class GuardedPush(Guarded):
    """model.push_to_hub of the same files."""

    def __call__(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] | None = None,
        **options: Any,
    ) -> str:
        """Arguments as in transformers. A README.md that the repository has stays."""
        model: Any = self.model
        if is_plain(model):
            kind: Any = type(model)
            given: dict[str, Any] = {"commit_message": commit_message, "private": private, "token": token}
            given["revision"] = revision
            given |= {"commit_description": commit_description, "create_pr": create_pr, "tags": tags, **options}
            url: str = kind.push_to_hub(model, repo_id, **{k: v for k, v in given.items() if v is not None})
            return url
        from huggingface_hub import HfApi

        client = HfApi(token=token)
        repository = client.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            client.create_branch(repository, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as name:
            folder = save_folder(model, name, tags=tags or (), here=False)
            if client.file_exists(repository, "README.md", revision=revision):
                (folder / "README.md").unlink()
            return str(
                client.upload_folder(
                    repo_id=repository,
                    folder_path=folder,
                    commit_message=commit_message or "Upload an AdaMix checkpoint",
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                )
            )


def _sharded(model: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in model.parameters())
