"""What sharing the layers below the first adapted one saves of a training step: `python -m benchmarks.shared_prefix`.

Counted: operations of a step's matrix products, forward and backward, with and without sharing, for every first adapted
layer of BERT-base, RoBERTa-large and GPT-2 medium (two sequences of 128 tokens, on no device). --time MODEL ... instead
times a step of these on this CPU, two sequences of 64 tokens, at three layers, sharing over not, in interleaved
rounds. --write: results/shared_prefix.csv, docs/shared_prefix.png; what is not made now stays as it is there.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tr
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adamix_kernels import AdaMixConfig, adapt, both_passes, double_batch

from . import RESULTS, ROOT
from .measure.harness import time_paired

TABLE = RESULTS / "shared_prefix.csv"
PICTURE = ROOT / "docs" / "shared_prefix.png"
COLUMNS = ("model", "layers", "first", "operations", "shared", "saved", "time_ratio", "time_p20", "time_p80")
TOKENS = 128
TIMED = (2, 64)  # sequences, tokens
Row = dict[str, str]
_ADAPTER = {"method": "adapter", "num_experts": 4}


def _bert() -> nn.Module:
    return tr.BertForSequenceClassification(tr.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def _roberta() -> nn.Module:
    config = tr.RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, vocab_size=50265,
        max_position_embeddings=514, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return tr.RobertaForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = tr.GPT2Config(n_embd=1024, n_layer=24, n_head=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return tr.GPT2LMHeadModel(config)


# The paper's models and settings; sizes of the base models as published.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, Any]]] = {
    "bert-base": (_bert, 12, {**_ADAPTER, "bottleneck": 48}),
    "roberta-large": (_roberta, 24, {**_ADAPTER, "bottleneck": 16}),
    "gpt2-medium": (_gpt2, 24, {"method": "lora", "num_experts": 8, "r": 4}),
}


def adapted(name: str, first: int, device: str) -> nn.Module:
    build, layers, fields = MODELS[name]
    with torch.device(device):
        return adapt(build(), AdaMixConfig(**fields, layers_to_transform=list(range(first, layers)))).train()


def inputs(name: str, batch: int, tokens: int, device: str) -> dict[str, Any]:
    """Without a mask whose values transformers would look at: a tensor on no device has none."""
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
    if not name.startswith("gpt2"):
        return {"input_ids": ids}
    mask = torch.full((tokens, tokens), -torch.inf, device=device).triu(1).expand(batch, 1, tokens, tokens)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def step(model: nn.Module, batch: dict[str, Any], shared: bool) -> None:
    outputs = both_passes(model, batch) if shared else model(**double_batch(batch))
    outputs.logits.sum().backward()


def operations(name: str, first: int, shared: bool) -> int:
    model = adapted(name, first, "meta")
    with FlopCounterMode(display=False) as counter:
        step(model, inputs(name, 2, TOKENS, "meta"), shared)
    return int(counter.get_total_flops())


def timed(name: str, first: int, rounds: int) -> tuple[float, float, float]:
    """(median, 20th and 80th percentile) of the time with sharing over that without, round by round."""
    torch.manual_seed(0)
    model, given = adapted(name, first, "cpu"), inputs(name, *TIMED, "cpu")
    timing = time_paired(
        {"whole": lambda _k: step(model, given, False), "shared": lambda _k: step(model, given, True)},
        [],
        rounds=rounds,
    )
    ratio = timing.ratio("shared", "whole")
    return ratio.p50, ratio.p20, ratio.p80


def counted(names: list[str]) -> list[Row]:
    made: list[Row] = []
    for name in names:
        layers = MODELS[name][1]
        for first in range(layers):
            whole, shared = (operations(name, first, each) for each in (False, True))
            values = (name, layers, first, whole, shared, f"{1 - shared / whole:.4f}")
            made.append(dict(zip(COLUMNS, map(str, values))))
            _print(made[-1])
    return made


def with_times(made: list[Row], names: list[str], rounds: int) -> list[Row]:
    """`made` with times at a quarter, half and three quarters of these models."""
    for row in made:
        name, layers, first = row["model"], int(row["layers"]), int(row["first"])
        if name in names and first in (layers // 4, layers // 2, 3 * layers // 4):
            row.update(zip(COLUMNS[6:], (f"{value:.3f}" for value in timed(name, first, rounds))))
            _print(row)
    return made


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """`new`, with the times of `old`, and the rows of `old` whose model it has not; in the order of MODELS."""
    known = {(row["model"], row["first"]): row for row in old}
    for row in new:
        key = row["model"], row["first"]
        known[key] = {**known.get(key, {}), **row}
    order = list(MODELS)
    return sorted(known.values(), key=lambda row: (order.index(row["model"]), int(row["first"])))


def read() -> list[Row]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _print(row: Row) -> None:
    print(", ".join(f"{key} {value}" for key, value in row.items() if value), flush=True)


def draw(made: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, mark in zip(MODELS, "os^"):
        mine = [row for row in made if row["model"] == name]
        if not mine:
            continue
        places = [int(row["first"]) / int(row["layers"]) for row in mine]
        (line,) = axes.plot(places, [100 * float(row["saved"]) for row in mine], mark, ls="-", ms=4, label=name)
        timed_ = [row for row in mine if row.get("time_ratio")]
        if timed_:
            axes.plot(
                [int(row["first"]) / int(row["layers"]) for row in timed_],
                [100 * (1 - float(row["time_ratio"])) for row in timed_],
                "x", color=line.get_color(), ms=8, label=f"{name}, time on a CPU",
            )  # fmt: skip
    axes.set(xlabel="first adapted layer / layers", ylabel="saved of a training step, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="which are counted")
    parser.add_argument(
        "--time", nargs="+", default=[], choices=list(MODELS), metavar="MODEL", help="times these instead"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    if options.time:
        made = with_times(read(), options.time, options.rounds)
    else:
        made = merged(read() if TABLE.is_file() else [], counted(options.models))
    if options.write:
        with TABLE.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(made)
        draw(made, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
