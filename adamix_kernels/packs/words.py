"""A pack's tokenizer, as files by name: which they are, whether two are one, and what is left of an earlier one."""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..models._files import sha256
from ..models._staging import TOKENIZER_NAME, WORDS, word_files
from .beside import json_of

logger = logging.getLogger(__name__)
DIGESTS = "tokenizer"  # of a JSON: the files that were written with it
_TEMPLATES = "additional_chat_templates"
_KNOWN = (
    TOKENIZER_NAME, *WORDS, "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_PATTERNS = (
    "tokenizer*", "vocab*", "chat_template*", f"{_TEMPLATES}/*", "bpe.codes", "dict.txt", "*.spm", "*.model", "*.bpe",
    "*.tiktoken",
)  # fmt: skip


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer of a folder, by name; empty where it has none."""
    if not (folder / TOKENIZER_NAME).is_file():
        return {}
    patterns = {*_KNOWN, *_PATTERNS, *_class_files(folder)}
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return _contents(folder, found)


def all_files(folder: Path) -> dict[str, bytes]:
    """The same of a folder that holds nothing else."""
    return _contents(folder, {path for path in folder.rglob("*") if path.is_file()})


def _contents(folder: Path, found: set[Path]) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(found)}


def write_files(place: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def left_over(folder: Path, last: str, files: Mapping[str, bytes]) -> list[Path]:
    """What `files` leave of the tokenizer in `folder`, a checkpoint or pack of ours whose JSON is `last`, and would be
    read with them. Without files: those that were written with that JSON, and are still as they were."""
    values = json_of(folder / last)
    if not values:
        return []
    told = values.get(DIGESTS)
    pairs = told.items() if isinstance(told, dict) else ()
    found = {name for name, digest in pairs if _plain(name) and _is(folder / name, digest)}
    if files:
        found |= {name for name in (*_KNOWN, *_class_files(folder)) if (folder / name).is_file()}
        found |= {path.relative_to(folder).as_posix() for path in folder.glob(f"{_TEMPLATES}/*.jinja")}
    return [folder / name for name in sorted(found - set(files))]


def check_words(name: str, files: Mapping[str, bytes], own: Mapping[str, bytes], config: Any) -> None:
    """A pack has one tokenizer, `files`. Raises ValueError where that of `name`, `own`, has other words for its
    numbers; warns where one of them does not load."""
    if not files or not own or files == own:
        return
    try:
        ours, theirs = _loaded(files, config), _loaded(own, config)
    except Exception as error:  # of a damaged file it may be anything
        logger.warning("The tokenizer of %s is another file than the pack's, and does not load: %s", name, error)
        return
    refuse_other_words(ours, theirs, "a tokenizer in which", "the names before")


def refuse_other_words(one: Any, other: Any, got: str, whose: str) -> None:
    """Raises ValueError where a number stands for different words in two tokenizers, that of `whose` and another, which
    `got` names."""
    ours, theirs = ({number: word for word, number in each.get_vocab().items()} for each in (one, other))
    number = next((n for n in sorted(ours.keys() & theirs.keys()) if ours[n] != theirs[n]), None)
    if number is not None:
        raise ValueError(
            f"folder: got {got} {number} is {theirs[number]!r}, expected {ours[number]!r}, as in that of {whose}: "
            "a pack has one tokenizer for all"
        )


def _loaded(files: Mapping[str, bytes], config: Any) -> Any:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as place:
        write_files(Path(place), files)
        made: Any = AutoTokenizer.from_pretrained(place, local_files_only=True, config=config)
    words = word_files(made)
    if words and not files.keys() & words:
        raise OSError(f"got {TOKENIZER_NAME} without its words")  # transformers 5 then gives one that knows no word
    return made


def _class_files(folder: Path) -> set[str]:
    """Names that the tokenizer's class gives its files, as RoCBert's word_shape.json."""
    kind = json_of(folder / TOKENIZER_NAME).get("tokenizer_class")
    try:
        import transformers

        found: Any = getattr(transformers, str(kind))
        module = sys.modules.get(found.__module__)
        names = {**getattr(module, "VOCAB_FILES_NAMES", {}), **found.vocab_files_names}
    except (ImportError, AttributeError, TypeError, RuntimeError):  # of a package that is not here, or of none
        return set()
    return {name for name in names.values() if isinstance(name, str) and _plain(name)}


def _plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and len(parts) <= 2 and ".." not in parts and not Path(name).is_absolute()


def _is(path: Path, digest: object) -> bool:
    return path.is_file() and sha256(path) == digest
