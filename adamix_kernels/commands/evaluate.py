"""adamix eval: accuracy of a saved checkpoint on dev or test."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from ..models.contexts import eval_routing
from ..models.state import adamix_state
from ..tasks import accuracy, collator, load_task, predict, tokenize
from ._checkpoint import add_checkpoint, open_checkpoint
from ._options import OptionParser, is_main_process, start


def main(argv: Sequence[str]) -> int:
    parser = OptionParser(prog="adamix eval", description="Accuracy of a saved checkpoint.")
    add_checkpoint(parser)
    parser.add_argument("--data", help="as in adamix train (default: what it was trained on)")
    parser.add_argument("--split", choices=("train", "dev", "test"), default="dev", help="default: %(default)s")
    parser.add_argument(
        "--routing",
        choices=("merged", "batch", "sample", "token"),
        default="merged",
        help="merged experts, or one drawn at random per batch, sample or token (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random routing (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--max-rows", type=int, help="use the first N rows only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    args = parser.parse(argv)
    start(args)
    model, tokenizer, run = open_checkpoint(args)
    source = args.data or run.data
    task = load_task(source, task="classification")
    if task.label_names != run.label_names:
        raise ValueError(f"data: {source!r} has the labels {task.label_names}, the checkpoint has {run.label_names}")
    split = getattr(task, args.split)
    if split is None:
        raise ValueError(f"split: {source!r} has no labelled test split")
    rows = tokenize(split.head(args.max_rows), tokenizer, run.max_tokens)
    if torch.cuda.is_available():
        model.cuda()
    torch.manual_seed(args.seed)
    with eval_routing(model, args.routing):
        bar = not args.disable_tqdm and is_main_process()
        percent = accuracy(predict(model, rows, collator(tokenizer), args.batch_size, progress=bar), rows)
    # A merged checkpoint has one expert a side, whatever the routing.
    routing = "merged" if adamix_state(model).merged else args.routing
    if not is_main_process():
        return 0
    if args.json:
        values = {"accuracy": percent, "rows": len(rows), "split": args.split, "data": source, "routing": routing}
        print(json.dumps(values))
    else:
        print(f"accuracy {percent:.2f} % on {len(rows)} {args.split} texts of {source} ({routing})")
    return 0
