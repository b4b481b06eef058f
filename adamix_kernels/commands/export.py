"""adamix export: a checkpoint in PEFT's or AdapterHub's format."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..models.gating import is_learned
from ..models.state import adamix_state
from ..tasks import DEFAULT_MODEL, Run
from ..tasks.encoders import DEFAULT_HUB_ID
from ._folder import kept
from ._options import OutputOptions, needs_out, option, start
from ._runs import RunOptions, open_run, run_command

FORMATS = {"lora": "peft", "adapter": "adapterhub"}


@dataclass
class ExportOptions:
    _argument_group_name = "export"

    out: str = option("folder for the exported files", "")
    format: Literal["auto", "peft", "adapterhub"] = option(
        "auto: peft for --method lora, adapterhub for --method adapter", "auto"
    )
    no_head: bool = option("peft: leave the trained head out", False)
    base_model: str | None = option("hub id of the encoder to write into the files; without it, none of a folder")


def problem(model: Any, run: Run, method: str) -> str | None:
    """Why the formats cannot say this run, and what to do; None where they can."""
    if run.task != "generation" and run.pooling == "mean":
        what = "train with --pooling model" + (", or export with --no_head" if method == "lora" else "")
        return f"its head reads the mean of the hidden states, which these formats cannot say: {what}"
    kind = getattr(model.config, "model_type", None)
    if method == "adapter" and kind not in ("bert", "roberta"):
        return f"AdapterHub's format is written for BERT and RoBERTa, this is {kind}: train with --method lora"
    return None


def main(argv: Sequence[str]) -> int:
    text = "Write the merged experts as a PEFT LoRA (method lora) or an AdapterHub adapter (method adapter)."
    run, options, output = run_command(argv, "export", ExportOptions, text)
    needs_out(options.out)
    with kept(options.out):
        return _export(run, options, output)


def _export(run: RunOptions, options: ExportOptions, output: OutputOptions) -> int:
    start(output)
    from .. import convert

    opened = open_run(run)
    _check_gates(opened.model, run.run)
    method = adamix_state(opened.model).config.method
    wanted = FORMATS[method] if options.format == "auto" else options.format
    why = problem(opened.model, opened.run, "lora" if wanted == "peft" else "adapter")
    if why and not (options.no_head and wanted == "peft"):
        raise ValueError(f"{run.run}: {why}")
    if options.no_head and wanted != "peft":
        raise ValueError("no_head: got it with --format adapterhub, expected --format peft")
    known = DEFAULT_HUB_ID if opened.run.model == DEFAULT_MODEL else None
    if options.base_model or known:
        base: Any = opened.model.config
        base.name_or_path = options.base_model or known
    if wanted == "peft":
        convert.export_peft(opened.model, options.out, head=not options.no_head)
    else:
        convert.export_adapterhub(opened.model, options.out)
    print(f"{wanted} files: {options.out}")
    return 0


def _check_gates(model: Any, run: str) -> None:
    """Raises ValueError where gates still weigh the experts, with the command that ends that."""
    if is_learned(model) and not adamix_state(model).merged:
        raise ValueError(
            f"run: got {run!r}, whose gates differ by token or text, which these formats cannot say, expected a merged "
            f"one: adamix merge {shlex.quote(run)} --gates mean --out FOLDER"
        )
