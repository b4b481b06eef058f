"""Peak memory of linear_adamix_loss against losses on all logits: `python -m benchmarks.bench_linear_memory`.

The unfused path is PyTorch's formula in eager mode; our own loss on all logits stands beside it. Forward and backward,
on the CPU. Counted is what PyTorch's allocator hands out beyond what was there before the
forward; memory that a matrix library takes for itself is not seen, on either side.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from adamix_kernels.functional import adamix_loss, linear_adamix_loss

from . import RESULTS
from .measure import record
from .ops.consistency import head_formula
from .sizes import HEAD_MEMORY, LossSize

RESULT = RESULTS / "linear_memory_cpu.csv"
OP = "linear_adamix_loss/both"
# The fused path's share of the unfused one's, at most.
LIMIT = 0.15
FUSED, UNFUSED, WHOLE = "reference", "formula", "unfused"


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that were allocated and not yet freed, at any moment of function()."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = [e for e in trace if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    if not events:
        raise RuntimeError("the profiler reported no allocation; this PyTorch may lack it")
    live = peak = 0
    for event in sorted(events, key=lambda e: (e["ts"], e["args"].get("Ev Idx", 0))):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def measure(
    rows: int, width: int, vocab: int, dtype: torch.dtype, train_head: bool, chunk_rows: int | None = None
) -> dict[str, int]:
    """path -> peak bytes of one forward and backward with `rows` rows a pass; the gradients of the leaves included."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, rows, width, generator=generator).to(dtype).requires_grad_()
    head = (torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype).requires_grad_(train_head)
    labels = torch.randint(vocab, (1, rows), generator=generator)
    losses = {
        FUSED: lambda: linear_adamix_loss(hidden, head, labels, chunk_rows=chunk_rows, backend="reference").loss,
        UNFUSED: lambda: head_formula(hidden.flatten(0, 1), head, labels.flatten()),
        WHOLE: lambda: adamix_loss(F.linear(hidden, head), labels, backend="reference").loss,
    }
    peaks = {}
    for name, loss in losses.items():
        hidden.grad = head.grad = None
        peaks[name] = peak_bytes(lambda: loss().backward())  # noqa: B023
    return peaks


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 1 where the share is over the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_linear_memory", description=__doc__)
    parser.add_argument("--rows", type=int, default=HEAD_MEMORY.rows, help="rows of one pass")
    parser.add_argument("--width", type=int, default=HEAD_MEMORY.hidden, help="D")
    parser.add_argument("--vocab", type=int, default=HEAD_MEMORY.vocab, help="V")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--out", type=Path, help=f"CSV to write, for example benchmarks/results/{RESULT.name}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    words = LossSize(options.rows, options.vocab, hidden=options.width).words
    made, over = [], False
    note = f"allocator peak of forward+backward, threads={options.threads}"
    for train_head in (False, True):
        shape = words + " trained head" * train_head
        peaks = measure(options.rows, options.width, options.vocab, getattr(torch, options.dtype), train_head)
        share = peaks[FUSED] / peaks[UNFUSED]
        over |= share >= LIMIT
        print(f"{shape}, {options.dtype}: {share:.2%} of the unfused path's peak")
        for name, peak in peaks.items():
            made.append(record.row(OP, name, shape, options.dtype, "peak_memory", "MiB", peak / 2**20, note))
            print(f"  {name} {made[-1].value:.1f} MiB")
    if options.out:
        record.write(options.out, made)
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
