"""The end of a run: what was trained, how good it is and beside what, and the next commands to type."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..models._files import write_json
from ..models.gating import gates_of_layers, is_learned
from ..models.state import adamix_state
from ..models.summary import count_parameters, summary
from ..tasks import Run
from ._baselines import Baselines, not_above
from ._kinds import Kind, written
from ._runs import DIVERGED, REPORT_NAME
from .export import FORMATS, problem

FEW = 50  # dev rows, of which each is two points


@dataclass
class Outcome:
    """A finished run on the main process. scores: on dev, merged, or by the learned gates. losses: of the training.
    diverged: it is not saved."""

    model: nn.Module
    kind: Kind
    run: Run
    scores: dict[str, float]
    losses: dict[str, float]
    baselines: Baselines | None
    notes: list[str]
    dev_rows: int
    diverged: bool = False


def tell(outcome: Outcome, folder: str) -> None:
    """Prints the report, and writes it into the folder as adamix_report.json."""
    print(summary(outcome.model))
    losses = outcome.losses
    words = {"cross_entropy": "squared error" if outcome.run.task == "regression" else "cross-entropy"}
    parts = ", ".join(f"{words.get(name, name)} {losses[name]:.4f}" for name in losses if name != "loss")
    print(f"training loss {losses['loss']:.4f}, mean of the run" + (f"; at its end {parts}" if parts else ""))
    values = ", ".join(written(name, value) for name, value in outcome.scores.items())
    served = "experts by their gates" if is_learned(outcome.model) else "merged experts"
    texts = f"{outcome.dev_rows} text{'' if outcome.dev_rows == 1 else 's'}"
    print(f"dev {values} ({served}, {texts})")
    gates = mean_gates(outcome.model)
    if gates:
        shares = [(share, number, path) for path, row in gates.items() for number, share in enumerate(row)]
        least, most = ("{:.0%} (expert {} of {})".format(*found) for found in (min(shares), max(shares)))
        print(f"mean gates from {least} to {most}; all of them: {REPORT_NAME}")
    absent = [name for name in outcome.kind.metrics if name not in outcome.scores]
    if absent:
        print(f"  {', '.join(absent)}: no score on these texts; adamix eval says why")
    if outcome.kind.kind == "classification" and outcome.dev_rows < FEW:
        print(f"  dev has only {texts}: each is {100 / outcome.dev_rows:.0f} points")
    warning = None
    if outcome.baselines is not None:
        for name, found in outcome.baselines.values.items():
            print(f"  {name}: " + ", ".join(written(metric, value) for metric, value in found.items()))
        for name, why in outcome.baselines.absent.items():
            print(f"  {name}: not measured ({why})")
        lost = not_above(outcome.scores, outcome.baselines)
        if lost:
            warning = (
                f"AdaMix is not better than: {', '.join(lost)}. Try more epochs (--num_train_epochs), another "
                "--learning_rate, or another --model; look at the labels"
            )
            print(f"WARNING: {warning}")
    if outcome.diverged:
        warning = (
            "the training diverged: its numbers are not finite, and it is not saved. Try a lower --learning_rate, and "
            "another --out"
        )
        print(f"WARNING: {warning}")
    _write(outcome, Path(folder), warning)
    if outcome.diverged:
        return
    print(f"checkpoint: {folder}\nnext:")
    for command in next_commands(outcome, folder):
        print(f"  {command}")


def mean_gates(model: nn.Module) -> dict[str, list[float]]:
    """path -> each expert's mean gate over the last training batches; empty without gates."""
    gates = {path: gate for path, gate in gates_of_layers(model).items() if bool(gate.batches)}
    return {path: [round(share, 6) for share in gate.mean_gates.tolist()] for path, gate in gates.items()}


def next_commands(outcome: Outcome, folder: str) -> list[str]:
    """To be pasted into a shell."""
    run, place = outcome.run, shlex.quote(folder)
    texts = '"some text"' + (' --pair "its second text"' if run.text_pair_column else "")
    if run.task_names:
        texts = f"--task_name {shlex.quote(run.task_names[0])} {texts}"
    learned, merged = is_learned(outcome.model), shlex.quote(folder.rstrip("/") + "_merged")
    commands = [
        f"adamix predict --run {place} {texts}",
        f"adamix eval {place}",
        f"adamix merge {place}{' --gates mean' if learned else ''} --out {merged}",
    ]
    method = adamix_state(outcome.model).config.method
    if not problem(outcome.model, run, method):
        name = FORMATS[method]
        out = shlex.quote(f"{folder.rstrip('/')}_{name}")
        commands.append(f"adamix export {merged if learned else place} --format {name} --out {out}")
    return commands


def _write(outcome: Outcome, folder: Path, warning: str | None) -> None:
    trainable, total = count_parameters(outcome.model)
    baselines = outcome.baselines
    values: dict[str, Any] = {
        "task": outcome.run.task,
        "dev_rows": outcome.dev_rows,
        "scores": outcome.scores,
        "baselines": {} if baselines is None else {**baselines.values, **{n: None for n in baselines.absent}},
        "warning": warning,
        **({DIVERGED: True} if outcome.diverged else {}),
        "training": {name: value if math.isfinite(value) else None for name, value in outcome.losses.items()},
        **({"mean_gates": gates} if (gates := mean_gates(outcome.model)) else {}),
        "trainable_parameters": trainable,
        "parameters": total,
        "notes": outcome.notes,
    }
    write_json(folder / REPORT_NAME, values)
