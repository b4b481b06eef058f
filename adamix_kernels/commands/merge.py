"""adamix merge: M experts into one, saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..models.checkpoint import save_adamix
from ..models.merging import merge
from ..tasks import write_run
from ._checkpoint import add_checkpoint, open_checkpoint
from ._options import OptionParser, start


def main(argv: Sequence[str]) -> int:
    parser = OptionParser(prog="adamix merge", description="Average a checkpoint's experts.")
    add_checkpoint(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the merged checkpoint")
    args = parser.parse(argv)
    if args.out.exists() and args.out.resolve() == args.checkpoint.resolve():
        raise ValueError(f"out: {args.out} is the checkpoint itself, and merging there would lose its experts")
    start(args)
    model, tokenizer, run = open_checkpoint(args)
    save_adamix(merge(model), args.out)
    tokenizer.save_pretrained(args.out)
    write_run(args.out, run)
    print(f"merged checkpoint: {args.out}")
    return 0
