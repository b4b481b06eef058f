"""A layer of eight LoRAs with gates against other ways to compute it, and a 24-layer model of them against its base.

`python -m benchmarks.run mixtures`. On the CPU times are paired: all ways of a case run right after one another,
round by round; with --size gpu each is timed by the clock of a GPU (device.py).
`calls` are what reaches the dispatcher and computes, views left out: one launch each, or more, on a GPU; `moved` is the
bytes of their arguments and results. `calls, kernels`: the same where kernels serve, a router as one op,
with its LoRAs where it can be. `kept` is what
autograd saves beside arguments, and parameters, until the backward. --table prints what docs/gates.md shows of a CSV.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import RESULTS, sizes
from ..measure import record
from ..measure.harness import Check, time_paired
from ..ops.run import add_run_options
from . import device
from .counted import counted, kept_bytes
from .decoding import count_decoding, measure_decoding
from .layer import EXPERTS, KINDS, RANK, Layer, Way, ways, wrong

TABLE = RESULTS / "mixtures_cpu.csv"


def measure_layer(batch: int, tokens: int, width: int, rounds: int | None, seconds: float) -> list[record.Row]:
    made = []
    for kind in KINDS:
        layer = Layer(batch, tokens, width, kind)
        found = ways(layer)
        shape = f"{kind} {batch}x{tokens} K=N={width} M={EXPERTS} r={RANK}"
        grad = torch.randn_like(layer.x)

        def both(way: Way, layer: Layer = layer, grad: torch.Tensor = grad) -> None:
            for leaf in layer.leaves():
                leaf.grad = None
            way(layer).backward(grad)

        def forward(way: Way, layer: Layer = layer) -> None:
            with torch.no_grad():
                way(layer)

        checks = [
            Check(f"{kind} {name}", lambda n=name, way=way, layer=layer: wrong(way, layer, peer=n != "adamix"))
            for name, way in found.items()
        ]
        for direction, run in (("forward", forward), ("forward+backward", both)):
            calls = {name: lambda _k, way=way, run=run: run(way) for name, way in found.items()}
            timing = time_paired(calls, checks, rounds=rounds, seconds=seconds)
            for name, way in found.items():
                op = f"mixture/{direction}"
                made.append(record.row(op, name, shape, "float32", "time_p50", "ms", 1e3 * timing.time(name).p50))
                ratio = timing.ratio(name, "adamix").p50
                made.append(record.row(op, name, shape, "float32", "ratio_p50 to adamix", "", ratio))
                called = counted(lambda r=run, w=way: r(w))
                made.append(record.row(op, name, shape, "float32", "calls", "", called.count))
                made.append(record.row(op, name, shape, "float32", "moved", "MiB", called.bytes / 2**20))
        given = [*layer.leaves(), *layer.base.parameters()]
        for name, way in found.items():
            size = kept_bytes(lambda w=way, one=layer: w(one), given) / 2**20
            made.append(record.row("mixture/forward+backward", name, shape, "float32", "kept", "MiB", size))
    return made


def table(rows: list[record.Row]) -> str:
    """What docs/gates.md shows of a CSV's rows."""
    found = {(row.op, row.backend, row.shape, row.metric): row.value for row in rows}
    lines = [
        "| layer | way | forward | calls | moved, MiB | forward and backward | calls | moved, MiB | kept, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    shapes = dict.fromkeys(row.shape for row in rows if row.op == "mixture/forward")
    for shape in shapes:
        for name in dict.fromkeys(row.backend for row in rows if row.shape == shape):
            cells = [shape.partition(" ")[0], "ours" if name == "adamix" else name]
            for op in ("mixture/forward", "mixture/forward+backward"):
                ratio, calls = (found[op, name, shape, metric] for metric in ("ratio_p50 to adamix", "calls"))
                cells += [f"{ratio:.2f}", f"{calls:.0f}", f"{found[op, name, shape, 'moved']:.0f}"]
            cells.append(f"{found[op, name, shape, 'kept']:.1f}")
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| one token, 24 layers | calls, kernels | over the base | time over the base, reference, width 256 |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row.metric == "calls, kernels":
            base, ratio = (found["decode", name, row.shape, metric] for name, metric in (
                ("base", row.metric), (row.backend, "ratio_p50 to base")))  # fmt: skip
            lines.append(f"| {row.backend} | {row.value:.0f} | {row.value / base:.3f} | {ratio:.2f} |")
    return "\n".join(lines)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "mixtures", help="LoRAs with gates: a layer against PEFT and loops, 24 layers decoding"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=768, help="K = N of the layer")
    parser.add_argument("--decoder-width", type=int, default=256, help="of the 24-layer model")
    parser.add_argument("--repeats", type=int, help="timed rounds (default: what fits into 20 s, or --seconds, a case)")
    parser.add_argument("--recount", action="store_true", help=f"time nothing: the calls of decoding in {TABLE.name}")
    parser.add_argument("--table", action="store_true", help=f"measure nothing: the tables of {TABLE.name}")
    add_run_options(parser, sizes.MIXTURE)
    parser.set_defaults(run=run, size=None)


def recount(width: int) -> int:
    """Puts the calls of a decoded token, counted anew, into the committed table, whose times stay."""
    anew = {(row.op, row.backend, row.shape, row.metric): row for row in count_decoding(width)}
    rows = record.read(TABLE)
    record.write(TABLE, [anew.get((row.op, row.backend, row.shape, row.metric), row) for row in rows])
    return 0


def run(options: argparse.Namespace) -> int:
    if options.table:
        print(table(record.read(TABLE)))
        return 0
    if options.recount:
        return recount(options.decoder_width)
    if options.size is not None:
        return device.run(options)
    torch.set_num_threads(options.threads)
    seconds = 20.0 if options.seconds is None else options.seconds
    made = measure_layer(options.batch, options.tokens, options.width, options.repeats, seconds)
    made += measure_decoding(options.decoder_width, options.repeats, seconds)
    for one in made:
        print(f"{one.op:26} {one.backend:12} {one.metric:22} {one.value:10.4g} {one.unit:4} {one.shape}")
    if options.out:
        record.write(options.out, made)
        print(f"wrote {len(made)} rows to {options.out}")
    return 0
