"""What the commands share: flags or one JSON file, and logging that speaks on the main process alone."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEVELS = ("debug", "info", "warning", "error", "critical")
_FORMAT = "%(levelname)s %(name)s: %(message)s"


class OptionParser(argparse.ArgumentParser):
    """Flags as HfArgumentParser has them (--max-rows is --max_rows too), or one JSON file with an object of them."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False, epilog="Instead of flags, one JSON file of them may be given.")

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        more = [name.replace("-", "_").replace("__", "--", 1) for name in names if name.startswith("--")]
        return super().add_argument(*dict.fromkeys([*names, *more]), **options)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Raises ValueError for a JSON file that is no object, or has a key that is no option."""
        if len(argv) != 1 or not argv[0].endswith(".json"):
            return self.parse_args(argv)
        return self.parse_args(self._flags(argv[0], read_object(argv[0])))

    def _flags(self, path: str, values: dict[str, Any]) -> list[str]:
        actions = {action.dest: action for action in self._actions if action.dest != "help"}
        unknown = sorted(set(values) - set(actions))
        if unknown:
            raise ValueError(f"{path}: got the keys {unknown}, expected some of {sorted(actions)}")
        flags, positional = [], []
        for name, value in values.items():
            action = actions[name]
            if not action.option_strings:
                positional.append(str(value))
            elif action.nargs == 0:
                flags += [action.option_strings[0]] if value else []
            elif value is not None:
                flags += [action.option_strings[0], str(value)]
        return [*flags, "--", *positional]


def add_output(parser: argparse.ArgumentParser) -> None:
    """--log-level and --disable-tqdm, as in adamix train."""
    parser.add_argument("--log-level", choices=LEVELS, default="warning", help="default: %(default)s")
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bars")


def read_object(path: str) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError for another kind of JSON, or none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got a file that is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a JSON {type(values).__name__}, expected an object of options")
    return values


def is_main_process() -> bool:
    """Whether this is the first process of a launch (torchrun and accelerate set RANK), or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def set_log_level(level: int) -> None:
    """Sends the records of this package and of transformers at `level` and above to stderr."""
    import transformers

    logging.basicConfig(format=_FORMAT)
    # It has a handler of its own; where CI is set its records reach the root's as well.
    transformers.logging.disable_propagation()
    logging.getLogger("adamix_kernels").setLevel(level)


def start(args: argparse.Namespace) -> None:
    """Sets the log level; bars only on the main process; from transformers, errors alone unless more is asked for."""
    import transformers

    level = getattr(logging, args.log_level.upper())
    set_log_level(level)
    transformers.logging.set_verbosity(level if level < logging.WARNING else max(level, logging.ERROR))
    # Its bars are about loading a file or two.
    transformers.logging.disable_progress_bar()
