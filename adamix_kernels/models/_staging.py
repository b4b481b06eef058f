"""Files that are written in full beside their folder, and then take their places together."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._files import _flush, _os_error, _temporary, naming, remove_leftover, sha256

TOKENIZER_NAME = "tokenizer_config.json"
# Any of these holds a tokenizer's words.
WORDS = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json",
)  # fmt: skip


def word_files(tokenizer: Any) -> set[str]:
    """Files of which any holds its words, its class' own too; none where bytes are the words."""
    own = {*getattr(tokenizer, "vocab_files_names", {}).values()}
    return {*WORDS, *own} - {TOKENIZER_NAME} if own else set()


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A place in `folder` for what goes again; what a killed process left of one goes with its other leftovers."""
    place = _temporary(folder)
    try:
        remove_leftover(place)
        place.mkdir()
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """A place to write into. At its end all that is in it is on the disk, and takes its place in `folder` file by file,
    `last` after all others, each in one step; what is there already as it is, is not touched. After an error, a full
    disk's too, nothing of `folder` has changed."""
    with naming(folder, _temporary(folder)), beside(folder) as place:
        yield place
        order = sorted(place.rglob("*"), key=lambda path: (path.name == last, path.name == TOKENIZER_NAME))
        files = {path: folder / path.relative_to(place) for path in order if path.is_file()}
        for path in files:
            _flush(path)
        for path, target in files.items():
            if not _same(path, target):
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
        with contextlib.suppress(OSError):  # not every system can open a folder
            _flush(folder)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """tokenizer.save_pretrained(folder), each file in one step. tokenizer_config.json comes last: without it the base
    model's tokenizer is taken, and with it alone one that knows no word."""
    with staged(folder, TOKENIZER_NAME) as place:
        try:
            tokenizer.save_pretrained(place)
        except Exception as error:
            if type(error) is not Exception:  # what the library tokenizers raises for any error of the system
                raise
            raise _os_error(error, folder, errno.EIO) from error


def _same(one: Path, other: Path) -> bool:
    if not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    return sha256(one) == sha256(other)
