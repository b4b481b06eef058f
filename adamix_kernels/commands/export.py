"""adamix export: a checkpoint in PEFT's or AdapterHub's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ._checkpoint import add_checkpoint, open_checkpoint
from ._options import OptionParser, start


def main(argv: Sequence[str]) -> int:
    parser = OptionParser(
        prog="adamix export",
        description="Write the merged experts as a PEFT LoRA (method lora) or an AdapterHub adapter (method adapter).",
    )
    add_checkpoint(parser)
    parser.add_argument("--format", choices=("peft", "adapterhub"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the exported files")
    args = parser.parse(argv)
    start(args)
    from .. import convert

    model, _, run = open_checkpoint(args)
    if run.pooling != "model":
        raise ValueError(
            f"{args.checkpoint}: its head reads the mean of the hidden states, which these formats cannot say: "
            "train with --pooling model"
        )
    write = convert.export_peft if args.format == "peft" else convert.export_adapterhub
    write(model, args.out)
    print(f"{args.format} files: {args.out}")
    return 0
