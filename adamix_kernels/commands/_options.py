"""What the commands share: common options, and logging that speaks on the main process alone."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ..recipes.processes import is_main

_FORMAT = "%(levelname)s %(name)s: %(message)s"
Level = Literal["debug", "info", "warning", "error", "critical"]


def option(text: str, default: Any = None, **more: Any) -> Any:
    """A dataclass's field with its help. A list is made anew for each instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **more})
    return field(default=default, metadata={"help": text, **more})


@dataclass
class OutputOptions:
    """As in adamix train, where they are the Trainer's."""

    _argument_group_name = "output"

    log_level: Level = option("what goes to stderr", "warning")
    disable_tqdm: bool = option("no progress bars", False)


def set_log_level(level: int) -> None:
    """Sends the records of this package and of transformers at `level` and above to stderr."""
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    logging.basicConfig(format=_FORMAT)
    # Each has a handler of its own; the Hub's records, and transformers' where CI is set, reach the root's as well.
    transformers.logging.disable_propagation()
    hub_logging.disable_propagation()
    logging.getLogger("adamix_kernels").setLevel(level)


def start(options: OutputOptions) -> None:
    """Sets the log level; bars only on the main process; from transformers, errors alone unless more is asked for."""
    import transformers

    level: int = getattr(logging, options.log_level.upper())
    set_log_level(level)
    transformers.logging.set_verbosity(level if level < logging.WARNING else max(level, logging.ERROR))
    # Its bars are about loading a file or two.
    transformers.logging.disable_progress_bar()


def at_least(bound: float, **given: float | None) -> None:
    """Raises ValueError, naming the option, for a number below `bound`, or that is not finite; None is none."""
    for name, value in given.items():
        if value is not None and not bound <= value < math.inf:
            finite = "" if math.isfinite(value) else "a finite number, "
            raise ValueError(f"{name}: got {value}, expected {finite}at least {bound}")


def needs_out(out: str, name: str = "out") -> None:
    """Raises, before any work, ValueError where `out` names no folder, OSError where nothing may be written there."""
    if not out:
        raise ValueError(f"{name}: got nothing, expected a folder to write to: --{name} FOLDER")
    path = os.path.abspath(out)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise ValueError(f"{name}: got {out!r}, but {path!r} is a file, expected a folder or a new name")
    may_write(name, out, path)


def may_write(option: str, given: str, path: str) -> None:
    """Raises PermissionError, naming the option, where the file or folder `path` cannot be written to."""
    if not os.access(path, os.W_OK | (os.X_OK if os.path.isdir(path) else 0)):
        raise PermissionError(f"{option}: {given!r}: nothing may be written to {path!r}, expected another place")


def needs_file(option: str, given: str, made: bool = False) -> None:
    """Raises, before any work, OSError where no file `given` can be written. made: its folder is, where it is not there
    (ValueError where it cannot be)."""
    folder = os.path.dirname(given) or "."
    if made and not os.path.isdir(folder):
        needs_out(folder, option)
        return
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{option}: {folder!r}: no such folder")
    if os.path.isdir(given):
        raise IsADirectoryError(f"{option}: got {given!r}, a folder, expected a file in it")
    may_write(option, given, given if os.path.exists(given) else folder)


def same_file(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def shows_bars(options: OutputOptions) -> bool:
    return not options.disable_tqdm and is_main()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """From transformers, errors alone: it reports a head that it drew, which is meant, and warns of its own calls."""
    import transformers

    before, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if bars:
            transformers.logging.enable_progress_bar()
