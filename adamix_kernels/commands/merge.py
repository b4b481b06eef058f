"""adamix merge: M experts into one, saved."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..models._files import write_json
from ..models._staging import beside, write_tokenizer
from ..models.checkpoint import save_adamix
from ..models.gating import is_learned
from ..models.header import CHECKPOINT_NAME, read_header
from ..models.merging import merge
from ..models.run_values import RUN_NAME, of_model, sealed_run
from ..models.saving import save_folder
from ..models.state import adamix_state
from ..tasks.run_file import read_run, run_values
from ._folder import kept
from ._options import OutputOptions, needs_out, option, same_file, start
from ._runs import Opened, RunOptions, open_run, run_command


@dataclass
class MergeOptions:
    _argument_group_name = "merge"

    out: str = option("folder for the merged checkpoint", "")
    gates: str = option("mean: of a run with learned gates, the experts at their mean gates", "")


def main(argv: Sequence[str]) -> int:
    text = "Average a run's experts: one adapter, or LoRA in the weights."
    run, options, output = run_command(argv, "merge", MergeOptions, text)
    needs_out(options.out)
    with kept(options.out):
        return _merge(run, options, output)


def _merge(run: RunOptions, options: MergeOptions, output: OutputOptions) -> int:
    out = Path(options.out)
    _keep_experts(run.run, out)
    start(output)
    opened = open_run(run)
    if adamix_state(opened.model).merged:
        raise ValueError(f"run: got {run.run!r}, which is merged already, expected a run with its experts")
    _check_gates(opened.model, options.gates)
    merged = merge(opened.model, gates=options.gates or None)
    _keep_another(opened, merged, out)

    def beside(place: Path) -> None:
        write_tokenizer(place, opened.tokenizer)
        if opened.filed:
            write_json(place / RUN_NAME, sealed_run(of_model(run_values(opened.run), opened.model), out))

    save_folder(merged, out, beside=beside)
    if not opened.filed:
        (out / RUN_NAME).unlink(missing_ok=True)  # of what was merged here before
    lost = adamix_state(opened.model).gate_spread
    if lost:
        mean, worst = sum(lost.values()) / len(lost), max(lost, key=lost.__getitem__)
        print(
            f"the mean gates do not say {100 * mean:.1f}% of the learned ones, {100 * lost[worst]:.1f}% at {worst}; "
            f"what that costs: adamix eval {shlex.quote(run.run)} and adamix eval {shlex.quote(str(out))}"
        )
    print(f"merged checkpoint: {out}")
    return 0


def _check_gates(model: nn.Module, gates: str) -> None:
    """Raises ValueError where no one expert computes what the run does, with the option that takes one all the same."""
    if not gates and is_learned(model):
        raise ValueError(
            "run: got one whose gates differ by token or text, which no single expert computes, expected --gates mean, "
            "which takes the mean gates of the training and says what is lost"
        )


def _keep_another(opened: Opened, merged: nn.Module, out: Path) -> None:
    """Raises ValueError where `out` holds what was merged for other labels, or of a run on other data, unless this one
    comes to the same: its data may be called otherwise by now."""
    if not ((out / CHECKPOINT_NAME).is_file() and (out / RUN_NAME).is_file()):
        return
    there, here = read_run(out), opened.run
    other = None
    if (there.task, there.label_names) != (here.task, here.label_names):
        other = f"for {there.label_names or there.task}"
    elif opened.filed and Path(there.data).name != Path(here.data).name and not _is_in(merged, out):
        other = f"on {there.data}"
    if other:
        raise ValueError(
            f"out: {out} holds what was merged of another run, {other}, expected another folder, or this one removed"
        )


def _is_in(merged: nn.Module, out: Path) -> bool:
    """Whether the checkpoint in `out` has the values of `merged`."""
    with beside(out) as place:  # weights, for which /tmp may be too small
        files = (read_header(folder / CHECKPOINT_NAME)["tensors"] for folder in (save_adamix(merged, place), out))
        return len({file["sha256"] for file in files}) == 1


def _keep_experts(run: str, out: Path) -> None:
    """Raises ValueError where `out` is the run itself, or another one that is not merged."""
    if same_file(run, str(out)):
        raise ValueError(f"out: {out} is the checkpoint itself, and merging there would lose its experts")
    path = out / CHECKPOINT_NAME
    if path.is_file() and not read_header(path)["merged"]:
        raise ValueError(f"out: {out} holds another run, whose experts would be lost, expected another folder")
