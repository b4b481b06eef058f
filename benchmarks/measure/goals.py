"""Every speed goal but those of host time (readme/host.py), and what the committed measurements say to it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .. import RESULTS, sizes
from ..sizes import StepSize
from . import record
from .goal_sources import (
    Rows,
    Source,
    count,
    cpu_ratio,
    memory_ratio,
    serving_ratio,
    share,
    speedup,
    step_ratio,
    step_speedup,
)
from .record import Row

# The goals of kernels are shares of what a GPU itself copies, and times of one over another's there: they hold for
# either of these. Where both were measured, the first is judged.
GPUS = ("H200", "H100")


# CPU steps of the MiniLM encoder, {(batch, tokens): {other step: AdaMix's time over its time, at most}}.
CPU_LIMITS = {
    (32, 64): {"one_expert": 1.05, "plain_adapter": 1.05, "original": 1.03},
    (2, 16): {"original": 0.85},
}

# A mixture's layer over a peer, {kind: {peer: (forward, with backward)}}, at least. Replayed: half of what the bytes
# that each moves say (mixtures_cpu.csv): the base's product, the same in all, takes about as long as our bytes.
# The loop waits for the GPU and is eager, where the Python of both sides counts: 41 calls and more to 2.
MIXTURE_LIMITS = {
    "dense": {"loop": (3, 3), "einsum": (3.5, 3), "peft x-lora": (7, 9), "grouped_mm": (5, 5.5)},
    "top-2": {"loop": (3, 3), "einsum": (3.5, 3), "peft x-lora": (7, 9), "grouped_mm": (2, 1.5)},
    "arrow top-2": {"peft arrow": (3, 2.5)},
}
# A decoded token with gates over its base, as issue 24 has it: 977 calls to 881, bytes 1.017.
DECODE_LIMIT = 1.15


@dataclass(frozen=True)
class Goal:
    """value <= limit, or >= limit with at_least; strict leaves out the limit itself.

    id: issue.line, then a number. metric: what `value` is, in words. source: rows -> Found, or in words why
    nothing was found. where: rows of "gpu" (one of those above), of the "cpu", or "any": of the GPU, else of the CPU.
    """

    id: str
    text: str
    metric: str
    limit: float
    at_least: bool
    source: Source
    where: str = "gpu"
    strict: bool = False

    @property
    def threshold(self) -> str:
        return f"{'>' if self.at_least else '<'}{'' if self.strict else '='} {self.limit:g}"

    def met(self, value: float) -> bool:
        if value == self.limit:
            return not self.strict
        return (value > self.limit) == self.at_least


@dataclass(frozen=True)
class Verdict:
    """state: "met", "missed" or "not measured"."""

    goal: Goal
    state: str
    value: float | None
    words: str


def all_goals() -> list[Goal]:
    """Every goal, in the order of the issues that set them."""
    return [*_cpu(), *_adapters(), *_losses(), *_steps(), *_mixtures()]


def _cpu() -> list[Goal]:
    made = []
    for (batch, tokens), limits in CPU_LIMITS.items():
        shape = f"{batch}x{tokens} M4 r48 all-MiniLM-L6-v2"
        for other, limit in limits.items():
            text = f"CPU step {batch}x{tokens} over {other}"
            source = cpu_ratio(shape, other)
            made.append(Goal(f"2.8.{len(made) + 1}", text, "time ratio", limit, False, source, where="cpu"))
    return made


def _adapters() -> list[Goal]:
    op, small, large = "routed_adapter", sizes.ADAPTER_8K, sizes.ADAPTER_64K
    made = []
    for way, limit in (("forward", 0.80), ("backward", 0.65)):
        source = share(op, way, large.words, large.dtype)
        made.append(Goal(f"3.9.{len(made) + 1}", f"adapter {way}, N=65,536", "copy bandwidth", limit, True, source))

    def add(text: str, limit: float, source: Source) -> None:
        made.append(Goal(f"3.9.{len(made) + 1}", text, "speed-up", limit, True, source))

    peer, which = "compile_gathered_bmm", (op, "both", small.words, small.dtype)
    add("adapter over compiled bmm, N=8,192, eager", 2, speedup(*which, peer))
    add("adapter over compiled bmm, N=8,192, replayed", 2, speedup(*which, peer, replayed=True))
    add("adapter over a loop of GEMMs, N=8,192", 3, speedup(*which, "expert_loop"))
    which = "routed_lora", "both", sizes.LORA_8K.words, sizes.LORA_8K.dtype
    add("LoRA update over PEFT's, eager", 1.5, speedup(*which, "peft_lora"))
    add("LoRA update over PEFT's, replayed", 1.5, speedup(*which, "peft_lora", replayed=True))
    return made


def _losses() -> list[Goal]:
    memory = memory_ratio("linear_adamix_loss", sizes.HEAD_MEMORY.words, "formula")
    made = [Goal("5.2.1", "linear loss, over the unfused path", "peak memory ratio", 0.15, False, memory, "any", True)]

    def add(text: str, metric: str, limit: float, at_least: bool, source: Source, strict: bool = False) -> None:
        made.append(Goal(f"5.5.{len(made)}", text, metric, limit, at_least, source, strict=strict))

    for loss, head in ((sizes.LOSS_GPT2, sizes.HEAD_GPT2), (sizes.LOSS_LLAMA, sizes.HEAD_LLAMA)):
        where, op = f"V={loss.vocab:,}", "adamix_loss"
        add(f"loss, {where}", "copy bandwidth", 0.80, True, share(op, "both", loss.words, loss.dtype))
        compiled = speedup(op, "both", loss.words, loss.dtype, "compile_formula")
        add(f"loss over the compiled formula, {where}", "speed-up", 2, True, compiled)
        liger = speedup(op, "both", loss.words, loss.dtype, "liger_kldiv_x2")
        add(f"loss over Liger's KLDiv x2, {where}", "speed-up", 1, True, liger, strict=True)
        fla = speedup("linear_adamix_loss", "both", head.words, head.dtype, "fla_fused_kl_div_x2")
        add(f"linear loss over fla's fused_kl_div x2, {where}", "speed-up", 1, True, fla, strict=True)
    for small in sizes.GLUE:
        launched = count("adamix_loss", "forward", small.words, "launches")
        add(f"loss, V={small.vocab}", "launches forward", 1, False, launched)
    which = "merge_banks", "forward", sizes.BANKS.words, sizes.BANKS.dtype
    add("merge of all banks", "copy bandwidth", 0.80, True, share(*which))
    add("merge over baddbmm, eager", "speed-up", 1, True, speedup(*which, "baddbmm"))
    add("merge over baddbmm, replayed", "speed-up", 1, True, speedup(*which, "baddbmm", replayed=True))
    return made


def _steps() -> list[Goal]:
    every: list[StepSize] = [size for models in sizes.STEPS["gpu"].values() for size in models]
    made = []

    def add(text: str, metric: str, limit: float, at_least: bool, source: Source) -> None:
        made.append(Goal(f"6.4.{len(made) + 1}", text, metric, limit, at_least, source))

    for size in every:
        for mode in ("eager", "graph"):
            text = f"step over one adapter, {size.model} B={size.batch}, {mode}"
            add(text, "time ratio", 1.05, False, step_ratio(size.words, mode))
    for size in every:
        if size.batch in (16, 64):
            text = f"step over the published way, {size.model} B={size.batch}"
            add(text, "speed-up", 2.0 if size.batch == 16 else 1.5, True, step_speedup(size.words))
    (served,) = sizes.INFERENCE["gpu"]
    # 1.00x, to the two digits that the goal has.
    bare = serving_ratio("inference/merged_lora", "inference/base", served.words)
    add("merged LoRA over the base model", "time ratio", 1.005, False, bare)
    fused = serving_ratio("inference/merged_adapter", "inference/hand_fused_adapter", served.words)
    add("merged adapter over a hand-fused one", "time ratio", 1.03, False, fused)
    return made


def _mixtures() -> list[Goal]:
    made: list[Goal] = []
    for size in sizes.MIXTURE["gpu"]:
        for peer, limits in MIXTURE_LIMITS[size.kind].items():
            for direction, limit in zip(("forward", "both"), limits):
                mode = "eager" if peer == "loop" else "replayed"
                text = f"mixture layer, {size.kind}, {direction}, over {peer}, {mode}"
                source = speedup("mixture", direction, size.words, size.dtype, peer, replayed=peer != "loop")
                made.append(Goal(f"24.7.{len(made) + 1}", text, "speed-up", limit, True, source))
    for decoded in sizes.DECODE["gpu"]:
        for name in ("LoRAMoE", "MoLA top-2", "HydraLoRA"):
            source = serving_ratio(f"decode/{name}", "decode/base", decoded.words)
            text = f"a decoded token, {name} over its base"
            made.append(Goal(f"24.7.{len(made) + 1}", text, "time ratio", DECODE_LIMIT, False, source))
    return made


def judge(goal: Goal, rows: Rows) -> Verdict:
    """met, missed by how much, or not measured and why."""
    found = goal.source(rows)
    if isinstance(found, str):
        return Verdict(goal, "not measured", None, f"not measured{': ' if found else ''}{found}")
    detail = found.detail
    if found.spread is not None and found.spread[0] <= goal.limit <= found.spread[1]:
        detail += ", across the goal: not settled"
    if goal.met(found.value):
        return Verdict(goal, "met", found.value, f"met ({detail})")
    off = 1 - found.value / goal.limit if goal.at_least else found.value / goal.limit - 1
    return Verdict(goal, "missed", found.value, f"missed by {off:.1%} ({detail})")


def evaluate(rows: Iterable[Row]) -> list[Verdict]:
    """A verdict for every goal; GPU goals from rows of the first of GPUS that has some, CPU goals from rows of none."""
    rows = list(rows)
    judged = gpu_of(rows)
    places = {
        "gpu": Rows(r for r in rows if judged and _is(r, judged)),
        "cpu": Rows(r for r in rows if not r.gpu_name),
    }
    made = []
    for goal in all_goals():
        verdict = judge(goal, places["gpu" if goal.where == "any" else goal.where])
        if goal.where == "any" and verdict.value is None:
            verdict = judge(goal, places["cpu"])
        made.append(verdict)
    return made


def gpu_of(rows: Iterable[Row]) -> str:
    """The GPU that the goals are judged on, of GPUS; "" for none."""
    rows = list(rows)
    return next((name for name in GPUS if any(_is(r, name) for r in rows)), "")


def _is(row: Row, gpu: str) -> bool:
    """A GH200 is no H200."""
    return re.search(rf"\b{gpu}\b", row.gpu_name) is not None


def load(folder: Path = RESULTS) -> list[Row]:
    """The rows of every CSV under `folder` that has the benchmarks' columns."""
    rows = []
    for path in sorted(folder.rglob("*.csv")):
        if record.has_schema(path):
            rows += record.read(path)
    return rows


def main() -> int:
    """`adamix bench goals`: prints every goal and what benchmarks/results says to it."""
    verdicts = evaluate(load())
    print("\n".join(markdown(verdicts)))
    for state in ("met", "missed", "not measured"):
        print(f"{sum(v.state == state for v in verdicts)} {state}")
    return 0


def markdown(verdicts: Iterable[Verdict]) -> list[str]:
    """The goals as lines of a Markdown table."""
    lines = ["| goal | what | metric | wanted | measured | verdict |", "|---|---|---|---|---|---|"]
    for v in verdicts:
        value = "" if v.value is None else f"{v.value:.3g}"
        words = v.words.replace("|", "/")
        lines.append(f"| {v.goal.id} | {v.goal.text} | {v.goal.metric} | {v.goal.threshold} | {value} | {words} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
