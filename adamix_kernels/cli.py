"""The command line `adamix`: one subcommand a module of adamix_kernels.commands."""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import sys
from collections.abc import Sequence

from ._extras import explained

COMMANDS = {
    "train": "fine-tune an encoder with AdaMix on a text-classification set",
    "eval": "accuracy of a saved checkpoint",
    "merge": "average a checkpoint's experts and save the result",
    "export": "write a checkpoint in PEFT's or AdapterHub's format",
    "recipe": "the paper's experiments, their baselines and ablations, tables and plots",
    "bench": "run the benchmarks of the source tree",
    "env": "versions, device, and which backend can run here and why",
}
STATUSES = {
    0: "the work is done",
    1: "a defect, or the benchmarks' own status: the traceback is on stderr",
    2: "wrong usage or input: one line on stderr says what was wrong (--traceback shows where)",
    130: "interrupted (Ctrl-C)",
}
_MODULES = {name: f"adamix_kernels.commands.{'evaluate' if name == 'eval' else name}" for name in COMMANDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Returns 0 when it did its work; 2 after one line on stderr for wrong usage or wrong input (arguments,
    files, data, models); 130 when it was interrupted; bench passes on the benchmarks' own status. Any other
    error is a defect, which Python shows in full, with status 1.
    """
    parser = argparse.ArgumentParser(
        prog="adamix",
        description="AdaMix, mixture-of-adaptations fine-tuning.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items())
        + "\n\nadamix COMMAND --help shows a command's options; train, eval, merge and export also take one JSON file "
        "of them." + "\n\nexit status:\n" + "\n".join(f"  {status:<8}{text}" for status, text in STATUSES.items()),
    )
    parser.add_argument("--traceback", action="store_true", help="on wrong input, show where it was found")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="the command's own")
    args = parser.parse_args(argv)
    try:
        status: int = importlib.import_module(_MODULES[args.command]).main(args.options)
    except KeyboardInterrupt:
        print(f"adamix {args.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, NotImplementedError, ModuleNotFoundError) as error:
        if args.traceback:
            raise
        if isinstance(error, ModuleNotFoundError):
            error = explained(error, at_least="recipes" if args.command == "recipe" else "train")
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"adamix {args.command}: {lines[0]}", file=sys.stderr)
        return 2
    if "RANK" in os.environ:  # torchrun and accelerate set it
        _close_process_group_at_exit()
    return status


def _close_process_group_at_exit() -> None:
    """Closes what a launched command opened, before Python ends.

    gloo's threads may still be letting go of a tensor then, and abort the process; the launcher would end the other
    ranks for it, whatever they are writing. Not after an error: closing would wait for what the other ranks still owe.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from accelerate import PartialState

        atexit.register(PartialState().destroy_process_group)


if __name__ == "__main__":
    raise SystemExit(main())
