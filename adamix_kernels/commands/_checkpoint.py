"""What eval, merge and export share: a checkpoint folder, opened with the encoder it belongs to."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from ..models.checkpoint import load_adamix
from ..tasks import Run, load_classifier, read_run, resolve_model
from ._options import OptionParser, add_output


def add_checkpoint(parser: OptionParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder written by adamix train, adamix merge or the demo")
    parser.add_argument("--model", help="hub id or folder of the encoder (default: the one it was trained on)")
    add_output(parser)


def open_checkpoint(args: argparse.Namespace) -> tuple[nn.Module, Any, Run]:
    """(model, tokenizer, run). Raises ValueError for a folder that is no checkpoint."""
    run = read_run(args.checkpoint)
    if args.model is not None:
        run = dataclasses.replace(run, model=args.model)
    model, tokenizer = load_classifier(resolve_model(run.model), run.label_names, run.pooling)
    load_adamix(model, args.checkpoint)
    return model, tokenizer, run
