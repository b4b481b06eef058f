"""adamix_kernels.peft.accelerate against PEFT's own loop, on this CPU: `python -m benchmarks.peft_loop --write`.

64 samples, each with its adapter, 1 to 64 adapters in the batch: one layer, and whole encoders of 6 layers of 384
columns with LoRA in query and value, or in every linear layer. In training PEFT refuses mixed batches: there its loop
is one pass an adapter over that one's samples. Process time of one thread in interleaved rounds; the middle of the
rounds' ratios.

bound: what PEFT takes over what the same takes without adapters, which nothing that keeps the base's products can pass.
peft_ops, our_ops: operators that a GPU would launch a kernel for, views and empty memory left out; routed_lora is one
forward and three backward. --write: results/peft_loop.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adamix_kernels.peft import accelerate

from . import RESULTS
from .measure import record

TABLE = RESULTS / "peft_loop.csv"
COLUMNS = (
    "scope", "mode", "adapters", "samples", "tokens", "rank", "peft_ms", "our_ms", "speedup", "speedup_p20",
    "speedup_p80", "bound", "peft_ops", "our_ops", "rounds", "threads", "peft", "torch", "cpu_name", "commit",
)  # fmt: skip
ADAPTERS, SAMPLES, RANK, WIDTH = (1, 4, 16, 64), 64, 8, 384
QV, LINEAR = ["query", "value"], ["query", "key", "value", "dense"]
# scope -> (the layers with LoRA, None: one linear layer alone; tokens of a sample in inference, and in training)
SCOPES: dict[str, tuple[list[str] | None, tuple[int, ...], tuple[int, ...]]] = {
    "layer": (None, (1, 8, 32, 128), (8, 32)),
    "model, q and v": (QV, (8, 32), (8,)),
    "model, all linear": (LINEAR, (8, 32), (8,)),
}
_UNSEEN = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}
# Launches of an op of ours; any other operator is one.
_LAUNCHES = {"adamix_kernels::routed_lora_backward": 3}


class Layer(nn.Module):
    """One linear layer, in which PEFT finds its place."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.dense(x)
        return out


class Launches(TorchDispatchMode):
    """Counts the operators that a GPU would launch a kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not (func.is_view or name in _UNSEEN or name == "aten::detach"):
            self.count += _LAUNCHES.get(name, 1)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Workload:
    """model: PEFT's, its adapters "0" to "<adapters - 1>"; called: it, or the one layer. inputs: of SAMPLES samples;
    names: whose each is."""

    model: Any
    called: Any
    inputs: dict[str, torch.Tensor]
    names: list[str]
    training: bool

    def theirs(self) -> None:
        if not self.training:
            with torch.no_grad():
                self.called(**self.inputs, adapter_names=self.names)
            return
        for name in dict.fromkeys(self.names):
            mine = [n for n, other in enumerate(self.names) if other == name]
            self.model.set_adapter(name)
            _backward(self.called(**{key: value[mine] for key, value in self.inputs.items()}))

    def ours(self) -> None:
        """On an accelerated model."""
        if not self.training:
            self.theirs()
            return
        _backward(self.called(**self.inputs, adapter_names=self.names))

    def bare(self) -> None:
        """Within disable_adapter(): what both pay for the base."""
        with torch.no_grad():
            self.called(**self.inputs)

    def gradients(self) -> list[torch.Tensor | None]:
        found = [None if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters() if "lora_" in n]
        self.model.zero_grad()
        return found


def workload(scope: str, adapters: int, tokens: int, training: bool, width: int = WIDTH) -> Workload:
    import peft
    import transformers

    torch.manual_seed(0)
    targets = SCOPES[scope][0]
    base: nn.Module = Layer(width)
    inputs = {"x": torch.randn(SAMPLES, tokens, width)}
    if targets is not None:
        config = transformers.BertConfig(
            vocab_size=1000, hidden_size=width, num_hidden_layers=6, num_attention_heads=12,
            intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        base = transformers.BertModel(config)
        inputs = {"input_ids": torch.randint(1000, (SAMPLES, tokens))}
    lora = peft.LoraConfig(r=RANK, target_modules=targets or ["dense"], init_lora_weights=False)
    model = peft.get_peft_model(base, lora, adapter_name="0")
    for n in range(1, adapters):
        model.add_adapter(str(n), lora)
    model.train(training)
    called = model if targets else model.get_base_model().dense
    return Workload(model, called, inputs, [str(n % adapters) for n in range(SAMPLES)], training)


def measured(scope: str, adapters: int, tokens: int, training: bool, rounds: int, width: int = WIDTH) -> dict[str, Any]:
    """One row. Raises AssertionError where the two do not compute the same."""
    import peft

    work = workload(scope, adapters, tokens, training, width)
    all_names = [str(n) for n in range(adapters)]
    _compare(work, all_names)
    spent: dict[str, list[float]] = {"theirs": [], "ours": [], "bare": []}
    repeats = max(1, int(0.03 / _seconds(work.theirs, 1)))
    # What a round holds is turned round in every second one.
    for number in range(rounds):
        for kind in ("theirs", "ours", "bare")[:: 1 - 2 * (number % 2)]:
            if kind == "ours":
                with accelerate(work.model):
                    work.model.set_requires_grad(all_names)
                    work.ours()
                    spent[kind].append(_seconds(work.ours, repeats))
            elif kind == "bare":
                with work.model.disable_adapter():
                    spent[kind].append(_seconds(work.bare, repeats))
            else:
                spent[kind].append(_seconds(work.theirs, repeats))
            work.model.zero_grad()
    ratios = sorted(a / b for a, b in zip(spent["theirs"], spent["ours"]))
    bound = statistics.median(a / b for a, b in zip(spent["theirs"], spent["bare"]))
    with Launches() as theirs:
        work.theirs()
    with accelerate(work.model):
        work.model.set_requires_grad(all_names)
        work.ours()  # after which the batch's index is at hand, as in every layer but the first
        work.model.zero_grad()
        with Launches() as ours:
            work.ours()
    facts = record.environment()
    return {
        "scope": scope, "mode": "training" if training else "inference", "adapters": adapters, "samples": SAMPLES,
        "tokens": tokens, "rank": RANK, "peft_ms": f"{1e3 * statistics.median(spent['theirs']):.3f}",
        "our_ms": f"{1e3 * statistics.median(spent['ours']):.3f}", "speedup": f"{statistics.median(ratios):.3f}",
        "speedup_p20": f"{ratios[len(ratios) // 5]:.3f}", "speedup_p80": f"{ratios[-1 - len(ratios) // 5]:.3f}",
        "bound": "" if training else f"{bound:.3f}", "peft_ops": theirs.count, "our_ops": ours.count, "rounds": rounds,
        "threads": torch.get_num_threads(), "peft": peft.__version__,
        **{key: facts[key] for key in ("torch", "cpu_name", "commit")},
    }  # fmt: skip


def cases(scopes: list[str]) -> Iterator[tuple[str, int, int, bool]]:
    for scope in scopes:
        for training in (False, True):
            for tokens in SCOPES[scope][2 if training else 1]:
                for adapters in ADAPTERS:
                    yield scope, adapters, tokens, training


def _compare(work: Workload, names: list[str]) -> None:
    """The outputs, or the gradients, of both."""

    def output() -> torch.Tensor:
        with torch.no_grad():
            return _tensor(work.called(**work.inputs, adapter_names=work.names))

    if work.training:
        work.theirs()
        want: Any = work.gradients()
        with accelerate(work.model):
            work.model.set_requires_grad(names)
            work.ours()
            got: Any = work.gradients()
    else:
        want = output()
        with accelerate(work.model):
            got = output()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def _tensor(output: Any) -> torch.Tensor:
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    return found


def _backward(output: Any) -> None:
    _tensor(output).sum().backward()


def _seconds(call: Callable[[], None], repeats: int) -> float:
    began = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - began) / repeats


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peft_loop", description=__doc__.splitlines()[0])
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=list(SCOPES))
    parser.add_argument("--only", default="", help='cases whose words hold this, as in "inference 16 8"')
    parser.add_argument("--rounds", type=int, default=11, help="of the layer; a whole model takes half as many")
    parser.add_argument("--write", action="store_true", help=f"put what was measured into {TABLE.name}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = {_key(row): row for row in read()} if options.write else {}
    for case in cases(options.scopes):
        scope, adapters, tokens, training = case
        if options.only not in f"{scope} {'training' if training else 'inference'} {adapters} {tokens}":
            continue
        rounds = options.rounds if case[0] == "layer" else max(1, options.rounds // 2)
        row = measured(*case, rounds)
        rows[_key(row)] = row
        print(", ".join(f"{key} {row[key]}" for key in COLUMNS[:14]), flush=True)
        if options.write:
            record.write_csv(TABLE, COLUMNS, rows.values())
    return 0


def read() -> list[dict[str, Any]]:
    """The committed rows."""
    if not TABLE.exists():
        return []
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, Any]]) -> str:
    """Of docs/packs.md: how many times as fast as PEFT, in brackets the bound; last the operators for 16 adapters."""
    found = {_key(row): row for row in rows}
    kinds = dict.fromkeys((row["scope"], row["mode"], row["tokens"]) for row in rows)
    heads = [*(f"{n} adapter{'s' * (n > 1)}" for n in ADAPTERS), "operators of 16: PEFT, here"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for scope, mode, tokens in kinds:
        cells, operators = [], ""
        for n in ADAPTERS:
            row = found.get((scope, mode, str(n), str(tokens)))
            bound = f" ({float(row['bound']):.2f})" if row and row["bound"] else ""
            cells.append(f"{float(row['speedup']):.2f}{bound}" if row else "")
            if row and n == 16:
                operators = f"{row['peft_ops']}, {row['our_ops']}"
        words = f"{scope}, {mode}, {tokens} token{'s' * (int(tokens) > 1)}"
        lines.append(f"| {' | '.join([words, *cells, operators])} |")
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("scope", "mode", "adapters", "tokens"))


if __name__ == "__main__":
    sys.exit(main())
