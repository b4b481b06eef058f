"""from_pretrained that reports a weight drawn at random unless it belongs to a head that is meant to be new."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..models._staging import TOKENIZER_NAME, WORDS, word_files
from ..models.hub import hub_answers, unreached

logger = logging.getLogger(__name__)

# transformers 5's report and 4's warning.
_REPORTS = ("LOAD REPORT", "were not initialized from the model checkpoint", "were not used when initializing")
_ANY_SIZE = "ignore_mismatched_sizes"
_SHOWN = 4
_TOKENIZERS = WORDS[0], TOKENIZER_NAME, *WORDS[1:]


def from_pretrained(
    kind: Any, path: str, *, unread: str | None = None, new_head: bool | Sequence[str] = True, **options: Any
) -> Any:
    """kind.from_pretrained(path), without transformers' report: one warning names the weights drawn at random.

    new_head: whether a head that the files lack, or have for other labels, is meant to be drawn, and not named; or the
    paths of the modules of which this is true. unread: nor what has this in its name.

    Raises ValueError: below the head the files have a weight of another shape; or they are no safetensors.
    """
    from safetensors import SafetensorError

    options["output_loading_info"] = True
    with _without_report():
        try:
            model, info = kind.from_pretrained(path, **options)
        except SafetensorError as error:
            raise ValueError(
                f"{path}: got weights that safetensors cannot read ({first_line(error)}), expected whole files: they "
                "are cut, empty, or pointers of Git LFS"
            ) from error
        except RuntimeError as error:
            if not new_head or _ANY_SIZE not in str(error):
                raise
            model, info = kind.from_pretrained(path, **{_ANY_SIZE: True}, **options)
        except AttributeError as error:
            if "NoneType" not in str(error):
                raise
            # How transformers 4 says that it found no file, offline.
            raise OSError(f"{path}: no such folder, and no such model in the cache of this machine") from error
    new = _new_names(model, new_head)
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        if not new(name):
            raise ValueError(f"{path}: got {name} of shape {tuple(stored)}, expected {tuple(wanted)}")
    fresh = sorted(name for name in info["missing_keys"] if not new(name))
    fresh = [name for name in fresh if unread is None or unread not in name]
    if fresh:
        shown = ", ".join(fresh[:_SHOWN]) + (f" and {len(fresh) - _SHOWN} more" if len(fresh) > _SHOWN else "")
        logger.warning("%s has no values for %d weights, which were drawn at random: %s", path, len(fresh), shown)
    return model


def _new_names(model: Any, new_head: bool | Sequence[str]) -> Callable[[str], bool]:
    """Whether the weight of a name is meant to be drawn at random."""
    if not isinstance(new_head, bool):
        heads = tuple(f"{path}." for path in new_head)
        return lambda name: name.startswith(heads)
    prefix = f"{model.base_model_prefix}."
    headless = getattr(model, model.base_model_prefix, model) is model
    return lambda name: new_head and not headless and not name.startswith(prefix)


def tokenizer_of(path: str, local: bool, **options: Any) -> Any:
    """AutoTokenizer.from_pretrained(path). Raises OSError where no file of a tokenizer is there, or none with its
    words: transformers 5 then gives one that knows no word; ValueError for a damaged one."""
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    found = os.path.isdir(path)
    if not found and not _may_be_on_hub(path):
        raise OSError(f"{path}: no such folder")
    here = {"local_files_only": local, "_raise_exceptions_for_missing_entries": False}
    if not any(cached_file(path, name, **here) for name in _TOKENIZERS):
        files = f"no file of a tokenizer ({', '.join(_TOKENIZERS[:_SHOWN])}, ...)"
        beside = f" in the cache of this machine, and {unreached()}" if local else " on the Hub"
        raise OSError(f"{path}: {files}" if found else f"{path}: no such folder here, {files}{beside}")
    try:
        made: Any = AutoTokenizer.from_pretrained(path, local_files_only=local, **options)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # of a damaged file it may be anything
        raise ValueError(
            f"got a tokenizer that cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from error
    words = word_files(made)
    if words and not any(cached_file(path, name, **here) for name in words):
        own = " or ".join(made.vocab_files_names.values())
        raise OSError(f"{path}: got {TOKENIZER_NAME} without its words, expected {own} beside it")
    return made


def out_of_reach(path: str) -> bool:
    """Whether `path` is a name of the Hub, which cannot be asked. Raises ValueError: it has no such repository."""
    return not os.path.isdir(path) and _may_be_on_hub(path) and not hub_answers(path, "model")


def _may_be_on_hub(path: str) -> bool:
    return not path.startswith((".", "/", "~", "\\")) and path.count("/") <= 1


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    source = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(report in text for report in _REPORTS)

    source.addFilter(keep)
    try:
        yield
    finally:
        source.removeFilter(keep)
