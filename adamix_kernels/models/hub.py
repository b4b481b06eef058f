"""Folders of this disk and repositories of the Hub: where a checkpoint is, and what a local base is called in it."""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .._extras import install_line
from ._files import as_path

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Weights as safetensors, text and tokenizers; nothing that is unpickled, and no code.
ALLOWED = (
    "*.json", "*.safetensors", "*.txt", "*.model", "*.md", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.codes",
    "*.tokenizer",
)  # fmt: skip
_IGNORED = ("checkpoint-*/*", "runs/*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Names of what packages bring, whatever folder of this disk is called so.
PACKAGED = ("all-MiniLM-L6-v2", "remarks")
_LOCAL = "_path"
_PATIENCE = 10.0  # seconds
_KEPT = 60.0  # seconds that an answer of the Hub stands: a load asks for a tokenizer, a config and a model
_answers: dict[tuple[str, str, str], tuple[float, bool]] = {}
_MISSING = "the Hub has no such repository, or it is private (hf auth login)"

logger = logging.getLogger(__name__)


def resolve_folder(source: str | os.PathLike[str], revision: str | None = None, name: str = "source") -> Path:
    """`source` where it is a folder; else the snapshot of the Hub's repository "user/repo", downloaded or cached.

    Args:
        source: a folder, or "user/repo". revision: branch, tag or commit of a repository; None: its main branch.
        name: what messages call `source`.

    Only JSON, safetensors, text and tokenizer files are fetched: no pickle and no code.

    Raises:
        TypeError: `source` is no path and no string.
        ValueError: it is neither a folder nor a repository that can be had (the message says which, and whether the
            Hub was reached); or a revision of a folder is asked for.
        ModuleNotFoundError: a repository, and huggingface_hub is not installed.
    """
    path = as_path(name, source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision: got {revision!r} for {str(source)!r}, a folder of this disk, expected None")
        return path
    if path.exists():
        raise ValueError(f"{name}: got {str(source)!r}, a file, expected its folder")
    if not isinstance(source, str) or not _REPOSITORY.fullmatch(source):
        raise ValueError(f"{name}: got {str(source)!r}, no such folder, expected one, or 'user/repo' on the Hub")
    return _snapshot(source, revision, name)


def _snapshot(repository: str, revision: str | None, name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        line = install_line("hf")  # transformers brings it
        raise ModuleNotFoundError(
            f"{name}: {repository!r}, which is no folder here, needs the package huggingface_hub: {line}",
            name=error.name,
        ) from error

    ways = [
        (
            errors.GatedRepoError,
            "the Hub asks for its owner's leave: accept its terms there, and log in (hf auth login)",
        ),
        (errors.RepositoryNotFoundError, _MISSING),
        (errors.RevisionNotFoundError, f"its repository on the Hub has no revision {revision!r}"),
        (errors.LocalEntryNotFoundError, f"it is not in the cache of this machine, and {unreached()}"),
        (Exception, "the Hub did not give it"),
    ]
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(ALLOWED), ignore_patterns=list(_IGNORED)
        )
    except Exception as error:  # the Hub's own, the client's, the system's: all mean that there is no folder
        why = next(text for kind, text in ways if isinstance(error, kind))
        # What kept the Hub from answering: its own 429 or 5xx, or the network.
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        told = cause is None or any(isinstance(cause, kind) for kind, _ in ways[:-1])
        first = "" if told else next(iter(str(cause).strip().splitlines()), "")
        detail = "" if told else f" ({': '.join(filter(None, [type(cause).__name__, first]))})"
        raise ValueError(f"{name}: got {repository!r}, which is no folder here, and {why}{detail}") from error
    return Path(found)


def hub_answers(repository: str, name: str, kind: str = "model") -> bool:
    """Whether the Hub can be asked for a repository: one question, before a library asks file by file, half a minute
    of tries each. Where it cannot, a warning says so, and the cache of this machine is all there is. The answer stands
    for a minute in this process, unless it was that there is no such repository.

    Args:
        repository: a model's or a data set's name. name: what messages call it. kind: "model" or "dataset".

    Raises ValueError: the Hub has no such repository.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    api = HfApi()
    key = api.endpoint, repository, kind
    since, reached = _answers.get(key, (-_KEPT, False))
    if time.monotonic() - since >= _KEPT:
        reached = _ask(api, repository, name, kind)
        _answers[key] = time.monotonic(), reached
    return reached


def _ask(api: HfApi, repository: str, name: str, kind: str) -> bool:
    from huggingface_hub import errors

    try:
        api.repo_info(repository, repo_type=kind, timeout=_PATIENCE)
    except errors.RepositoryNotFoundError as error:
        if not isinstance(error, errors.GatedRepoError):  # of which the library says what to do
            raise ValueError(f"{name}: got {repository!r}, which is no folder here, and {_MISSING}") from error
    except (errors.HFValidationError, errors.HfHubHTTPError):  # the library's to name, or to try again
        pass
    except Exception as error:  # the network's, by whichever client
        why = f"{unreached()} ({type(error).__name__})"
        logger.warning("%s: %r is looked for in the cache of this machine alone", why, repository)
        return False
    return True


def unreached() -> str:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE keeps the Hub away" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"


def absent(name: str) -> bool:
    """Whether it is a path of this disk, where nothing is."""
    return os.path.isabs(name) and not os.path.exists(name)


def with_names(values: dict[str, str], folder: Path) -> dict[str, str]:
    """For a file in `folder`: what is a path of this disk becomes its last name, and beside it, under
    "<key>_path", the way to it from `folder`; everything else stays.

    So a folder and what it refers to may move together, and none tells where they stand.
    """
    found = {}
    for key, value in values.items():
        if value in PACKAGED or not (os.path.isabs(value) or os.path.exists(value)):
            found[key] = value
            continue
        found[key] = Path(value).resolve().name
        found[key + _LOCAL] = Path(os.path.relpath(os.path.realpath(value), os.path.realpath(folder))).as_posix()
    return found


def with_paths(values: dict[str, str], folder: Path) -> dict[str, str]:
    """What was given to with_names: a path where one was written, though it may lead nowhere now, and else the name."""
    found = {key: value for key, value in values.items() if key + _LOCAL not in values}
    for key in [key for key in values if key + _LOCAL in values]:
        found.pop(key + _LOCAL, None)
        found[key] = os.path.normpath(os.path.join(os.path.realpath(folder), values[key + _LOCAL]))
    return found
