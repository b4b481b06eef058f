"""The demo's main function.

Adapts a pretrained encoder with AdaMix on a few labelled sentences, merges it, and sets it beside a frozen
encoder with a trained head, beside one plain adapter, and beside one that trains as long as AdaMix does: for
every seed the same sentences and head initialisation, and the same batches but for the longer training.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .._extras import explained
from ..models._staging import write_tokenizer
from ..tasks import DEFAULT_MODEL, EMBEDDED, Run, load_classifier, load_task, resolve_model, write_run
from .report import compared, write_plot, write_results, write_table
from .seeds import POOLING, Work, all_seeds, quiet_transformers
from .training import Settings, prepare


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adamix_kernels.demo",
        description="Train, merge and compare AdaMix on a text-classification set.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="hub id or folder of an encoder (default: %(default)s)")
    parser.add_argument(
        "--data", default=EMBEDDED, help="a file or folder of labelled texts, or a hub data set (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for results (default: %(default)s)")
    parser.add_argument("--seeds", type=_positive, default=2, help="number of seeds (default: %(default)s)")
    parser.add_argument("--epochs", type=_positive, default=60, help="default: %(default)s")
    parser.add_argument("--batch-size", type=_positive, default=8, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=_positive, default=48, help="longer texts are cut (default: %(default)s)")
    parser.add_argument("--experts", type=_positive, default=4, help="M (default: %(default)s)")
    parser.add_argument("--bottleneck", type=_positive, default=16, help="adapter width (default: %(default)s)")
    parser.add_argument("--consistency", type=float, default=1.0, help="weight of the KL term (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the plain adapter (default: %(default)s)")
    parser.add_argument("--adamix-lr", type=float, default=3e-3, help="of the experts (default: %(default)s)")
    parser.add_argument("--head-lr", type=float, default=3e-3, help="of the head, in every row (default: %(default)s)")
    parser.add_argument(
        "--shots", "--max-train", type=int, default=30, metavar="N",
        help="N training rows, drawn by each seed, classes in proportion; 0: all (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-dev", type=_positive, help="draw N dev rows")
    parser.add_argument(
        "--jobs", type=_positive, default=torch.get_num_threads(),
        help="seeds trained at a time, each by its part of the threads (default: as many as threads)",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Returns 0; after one line on stderr 2 for wrong arguments, model or data, 1 where the process of a
    seed ended before it was done, and 130 when interrupted."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        why = "its own message stands above, if it had one; if not, there may have been too little memory"
        print(f"demo: a seed's process ended before it was done ({why}): --jobs 1 needs one process", file=sys.stderr)
        return 1


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    if args.consistency <= 0 or args.experts < 2:
        print("demo: --consistency must be above 0 and --experts at least 2", file=sys.stderr)
        return 2
    if args.shots < 0:
        print(f"demo: --shots: got {args.shots}, expected a number of rows, or 0 for all", file=sys.stderr)
        return 2
    quiet_transformers()
    try:
        encoder = resolve_model(args.model)
        task = load_task(args.data, task="classification")
        _, tokenizer = load_classifier(encoder, task.label_names)
        data = prepare(task, tokenizer, args.max_tokens, args.shots or None, args.max_dev, args.seeds)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError):
            error = explained(error, what="the demo", at_least="demo")
        print(f"demo: {error}", file=sys.stderr)
        return 2
    for note in task.notes:
        print(f"note: {note}")
    settings = Settings(args.epochs, args.batch_size, args.lr, args.adamix_lr, args.head_lr, args.consistency)
    jobs = min(args.jobs, args.seeds)
    rows = len(data[0].train)
    print(
        f"{args.model} on {args.data}: {rows} training and {len(data[0].dev)} dev texts, {task.num_labels} classes; "
        f"{args.seeds} seeds, {jobs} at a time, threads: {torch.get_num_threads()}"
    )
    start = time.perf_counter()
    folder = args.out / "merged"
    work = Work(encoder, task.label_names, settings, args.experts, args.bottleneck, folder)
    with tqdm(total=args.seeds * work.steps(rows), unit="step", smoothing=0.1) as bar:
        results = all_seeds(work, data, jobs, bar)
        bar.set_description("done")
    seconds = time.perf_counter() - start
    write_run(folder, Run(args.model, args.data, task.label_names, args.max_tokens, POOLING))
    write_tokenizer(folder, tokenizer)
    write_table(results, args.seeds)
    print(compared(results[-1], results[1:3]))
    plot = write_plot(results, args.out / "demo.png")
    command = shlex.join(["python", "-m", "adamix_kernels.demo", *arguments])
    record = write_results(results, settings, command, seconds, jobs, args.out / "results.json")
    print(f"merged checkpoint: {folder}\nplot: {plot}\nfigures: {record}\n{seconds:.0f} s in all")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value
