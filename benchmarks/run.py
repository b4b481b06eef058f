"""`python -m benchmarks.run step`: measures, prints a table, writes a CSV."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from dataclasses import fields

from .host import bench as bench_host
from .measure import record
from .measure.harness import RedCheckError
from .mixtures import bench as bench_mixtures
from .models import inference as bench_inference
from .models import step as bench_step
from .models import workloads as bench_models
from .models.contenders import TITLES, Workload
from .ops import paired as bench_paired
from .ops import predicted as bench_predicted
from .ops import run as run_ops

# The sizes that goals are set for: (batch, tokens).
SIZES = ((32, 64), (2, 16))


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 1 when a correctness check was red and so nothing was timed."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    return options.run(options)


def _step(options: argparse.Namespace) -> int:
    if (options.batch is None) != (options.tokens is None):
        raise SystemExit("step: --batch and --tokens go together")
    sizes = SIZES if options.batch is None else ((options.batch, options.tokens),)
    made = []
    for batch, tokens in sizes:
        try:
            result = bench_step.measure(
                _workload(options, batch=batch, tokens=tokens),
                threads=options.threads,
                rounds=options.repeats,
                seconds=options.seconds,
                memory=options.memory,
            )
        except RedCheckError as error:
            print(f"step {batch}x{tokens}: {error}", file=sys.stderr)
            return 1
        _print_table(*bench_step.table(result))
        made += bench_step.rows(result)
    if options.out:
        record.write(options.out, made)
        print(f"wrote {len(made)} rows to {options.out}")
    return 0


def _step_memory(options: argparse.Namespace) -> int:
    peak = bench_step.peak_memory(options.name, _workload(options), options.threads)
    if peak is not None:
        print(peak)
    return 0


def _workload(options: argparse.Namespace, **sizes: int) -> Workload:
    given = {f.name: getattr(options, f.name) for f in fields(Workload)}
    return Workload(**{**given, **sizes})


def _print_table(title: str, header: list[str], lines: list[list[str]]) -> None:
    with contextlib.suppress(ImportError):
        from rich.console import Console
        from rich.table import Table

        shown = Table(*header, title=title, title_justify="left")
        for line in lines:
            shown.add_row(*line)
        Console(width=None if sys.stdout.isatty() else 150).print(shown)
        return
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    print(title)
    for line in (header, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the checks found")
    commands = parser.add_subparsers(required=True)

    step = commands.add_parser("step", help="whole training steps on an encoder, on the CPU")
    _add_sizes(step, batch=None, tokens=None)
    step.add_argument("--repeats", type=int, help="timed rounds (default: what fits into --seconds)")
    step.add_argument("--seconds", type=float, default=120.0, help="budget for the timed rounds of a size")
    step.add_argument("--out", help="CSV to write, for example benchmarks/results/step_cpu.csv")
    step.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    step.set_defaults(run=_step)

    run_ops.add_parser(commands)
    bench_paired.add_parser(commands)
    bench_predicted.add_parser(commands)
    bench_models.add_parser(commands)
    bench_inference.add_parser(commands)
    bench_host.add_parser(commands)
    bench_mixtures.add_parser(commands)

    memory = commands.add_parser("step-memory", help="peak memory of one step in this process, in MiB")
    memory.add_argument("name", choices=TITLES)
    _add_sizes(memory, batch=Workload.batch, tokens=Workload.tokens)
    memory.set_defaults(run=_step_memory)
    return parser


def _add_sizes(parser: argparse.ArgumentParser, *, batch: int | None, tokens: int | None) -> None:
    both = " (default: 32x64, then 2x16)" if batch is None else ""
    parser.add_argument(
        "--model", default=Workload.model, help='a folder, a hub id, or "tiny" (random, for smoke runs)'
    )
    parser.add_argument("--batch", type=int, default=batch, help="samples before doubling" + both)
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens a sample" + both)
    parser.add_argument("--experts", type=int, default=Workload.experts, help="M")
    parser.add_argument("--bottleneck", type=int, default=Workload.bottleneck, help="adapter width r")
    parser.add_argument("--labels", type=int, default=Workload.labels)
    parser.add_argument("--seed", type=int, default=Workload.seed)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")


if __name__ == "__main__":
    sys.exit(main())
