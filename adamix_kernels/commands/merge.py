"""adamix merge: M experts into one, saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..models.checkpoint import save_adamix
from ..models.header import CHECKPOINT_NAME, read_header
from ..models.merging import merge
from ..tasks import write_run
from ._options import OutputOptions, needs_out, same_file, start
from ._parser import OptionParser
from ._runs import RunOptions, open_run, the_run


@dataclass
class MergeOptions:
    _argument_group_name = "merge"

    out: str = field(default="", metadata={"help": "folder for the merged checkpoint"})


def main(argv: Sequence[str]) -> int:
    parser = OptionParser(
        "merge",
        (RunOptions, MergeOptions, OutputOptions),
        "Average a run's experts: one adapter, or LoRA in the weights.",
        words="RUN",
        aliases={"checkpoint": "run"},
    )
    parsed = parser.parse(argv)
    place, options, output = parsed.parts
    run, out = the_run(place, parsed.words, "merge"), Path(options.out)
    needs_out(options.out)
    _keep_experts(run.run, out)
    start(output)
    opened = open_run(run)
    save_adamix(merge(opened.model), out)
    opened.tokenizer.save_pretrained(out)
    if opened.filed:
        write_run(out, opened.run)
    print(f"merged checkpoint: {out}")
    return 0


def _keep_experts(run: str, out: Path) -> None:
    """Raises ValueError where `out` is the run itself, or another one that is not merged."""
    if same_file(run, str(out)):
        raise ValueError(f"out: {out} is the checkpoint itself, and merging there would lose its experts")
    path = out / CHECKPOINT_NAME
    if path.is_file() and not read_header(path)["merged"]:
        raise ValueError(f"out: {out} holds another run, whose experts would be lost, expected another folder")
