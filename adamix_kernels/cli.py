"""The command line `adamix`: one subcommand a module of adamix_kernels.commands."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from ._extras import explained
from ._version import __version__
from .commands._pipes import is_closed_pipe, let_go, outlives_its_reader, to_nowhere
from .commands._words import closest

COMMANDS = {
    "train": "fine-tune a model with AdaMix on your texts: classification, regression, generation",
    "predict": "labels and probabilities, numbers or generated texts for new texts",
    "eval": "the scores of a saved run",
    "merge": "average a run's experts and save the result",
    "pack": "put runs, trained apart, into one model that serves them by name",
    "export": "write a run in PEFT's or AdapterHub's format",
    "recipe": "the paper's experiments, their baselines and ablations, tables and plots",
    "bench": "run the benchmarks of the source tree",
    "env": "versions, device, and which backend can run here and why",
    "verify": 'prove every kernel on this machine\'s GPUs, so that backend="auto" uses those that are right',
}
_READ = ("predict",)  # what it prints is what it is for; the others go on without a reader
_ALONE = ("predict", "eval", "merge", "pack", "export")
STATUSES = {
    0: "the work is done",
    1: "a defect, whose traceback is on stderr; bench: its own status; verify: a kernel is wrong; train: it diverged",
    2: "wrong usage or input: one line on stderr says what was wrong (--traceback shows where)",
    3: "verify: nothing, or not everything, could be verified here",
    130: "interrupted (Ctrl-C)",
}
_MODULES = {name: f"adamix_kernels.commands.{'evaluate' if name == 'eval' else name}" for name in COMMANDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; without any, prints the help.

    Returns 0 when it did its work; 2 after one line on stderr for wrong usage or wrong input (arguments,
    files, data, models); 130 when it was interrupted; bench passes on the benchmarks' own status, and verify has 1
    and 3 for what it found out, train 1 where it diverged. Any other error is a defect, which Python shows in full,
    with status 1.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command not in COMMANDS:
        hint = closest(args.command, COMMANDS)
        print(f"adamix: got {args.command!r}, expected one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        return 2
    if args.command in _ALONE and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        return 0  # the first process of the launch does it
    try:
        with contextlib.nullcontext() if args.command in _READ else outlives_its_reader(f"adamix {args.command}"):
            status: int = importlib.import_module(_MODULES[args.command]).main(args.options)
            if sys.stdout is not None:
                sys.stdout.flush()  # what finds no place is an error here, not one of Python's end
    except KeyboardInterrupt as error:
        print(": ".join(filter(None, [f"adamix {args.command}: interrupted", str(error)])), file=sys.stderr)
        return 130
    except (ValueError, OSError, NotImplementedError, ModuleNotFoundError) as error:
        if isinstance(error, OSError) and is_closed_pipe(error) and args.command in _READ:
            to_nowhere(sys.stdout)  # `adamix predict ... | head` has read enough
            return 0
        let_go(sys.stdout)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adamix",
        description="AdaMix, mixture-of-adaptations fine-tuning.",
        usage="adamix [--version] [--traceback] COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items())
        + "\n\nadamix COMMAND --help shows a command's options. Most also take them from a JSON or YAML file:"
        "\nadamix COMMAND FILE, or --config FILE beside other options, which override it (not bench, env, verify)."
        + "\n\nexit status:\n"
        + "\n".join(f"  {status:<8}{text}" for status, text in STATUSES.items()),
    )
    parser.add_argument("--version", action="version", version=f"adamix_kernels {__version__}")
    parser.add_argument("--traceback", action="store_true", help="on wrong input, show where it was found")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="the command's own")
    return parser


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
