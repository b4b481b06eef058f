"""adamix recipe: the paper's experiments, their baselines and ablations, and the tables and plots of their results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._options import add_output, is_main_process, start

EPILOG = (
    "A recipe is one of `adamix recipe list`, or a JSON file as `adamix recipe show NAME` prints it. Methods are names "
    "of `adamix recipe methods`, with options after a colon (adamix:num_experts=8,routing=sample), or the groups "
    "default, baselines and ablations."
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="adamix recipe", description=__doc__.partition(": ")[2], epilog=EPILOG)
    commands = parser.add_subparsers(dest="action", required=True)
    commands.add_parser("list", help="names of the recipes of this package")
    commands.add_parser("methods", help="what can be compared")
    show = commands.add_parser("show", help="a recipe as JSON")
    run = commands.add_parser("run", help="train and evaluate; finished runs in --results are left alone")
    for sub in (show, run):
        sub.add_argument("recipe", help="name or JSON file")
        sub.add_argument("--model", help="hub id or folder, in place of the recipe's")
        sub.add_argument("--data", help="folder or hub data set, in place of the recipe's")
        sub.add_argument("--epochs", type=float, help="in place of the recipe's, for every method")
        sub.add_argument(
            "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"),
            help="change a field, dotted: --set adamix.num_experts 8 --set methods.full.learning_rate 2e-5",
        )  # fmt: skip
    run.add_argument("--methods", nargs="+", default=["default"], help="default: the recipe's own")
    run.add_argument("--seeds", type=int, help="seeds 0 to N-1 (default: the recipe's number)")
    run.add_argument("--results", type=Path, default=Path("results.jsonl"), help="default: %(default)s")
    run.add_argument("--train-rows", type=int, help="the first N training rows only")
    run.add_argument("--dev-rows", type=int, help="the first N dev rows only")
    run.add_argument("--shots", type=int, help="K labelled training rows, drawn by the seed evenly over the classes")
    run.add_argument("--reports", type=Path, help="a folder for a training report of every AdaMix run")
    add_output(run)
    report = commands.add_parser("report", help="table.md and plots of one or more result files")
    report.add_argument("results", type=Path, nargs="+")
    report.add_argument("--out", type=Path, default=Path("recipe_report"), help="default: %(default)s")
    args = parser.parse_args(argv)
    return {"list": _list, "methods": _methods, "show": _show, "run": _run, "report": _report}[args.action](args)


def _list(_args: argparse.Namespace) -> int:
    from ..recipes import recipe_names

    print("\n".join(recipe_names()))
    return 0


def _methods(_args: argparse.Namespace) -> int:
    from ..recipes.methods import METHODS

    print("\n".join(f"{name:10}{text}" for name, text in METHODS.items()))
    return 0


def _show(args: argparse.Namespace) -> int:
    print(json.dumps(_recipe(args).to_dict(), indent=2))
    return 0


def _run(args: argparse.Namespace) -> int:
    from ..recipes import Limits, expand_methods, run_recipe
    from ..recipes.processes import is_main
    from ..recipes.summary import group_rows, markdown

    start(args)
    recipe = _recipe(args)
    rows = run_recipe(
        recipe,
        expand_methods(args.methods, recipe),
        range(recipe.seeds if args.seeds is None else args.seeds),
        args.results,
        limits=Limits(args.train_rows, args.dev_rows, args.shots),
        reports=args.reports,
        progress=not args.disable_tqdm and is_main_process(),
    )
    if not is_main():
        return 0
    print(markdown(group_rows(rows)))
    print(f"rows: {args.results}; table and plots: adamix recipe report {args.results}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from ..recipes import read_rows, write_summary

    missing = [path for path in args.results if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"results: {missing[0]}: no such file")
    rows = {row["key"]: row for path in args.results for row in read_rows(path)}
    for path in write_summary(list(rows.values()), args.out):
        print(path)
    return 0


def _recipe(args: argparse.Namespace) -> Any:
    from ..recipes import load_recipe

    changes = {name: value for name in ("model", "data") if (value := getattr(args, name)) is not None}
    if args.epochs is not None:
        changes["training.num_train_epochs"] = args.epochs
    return load_recipe(args.recipe).changed({**changes, **{key: _value(text) for key, text in args.set}})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
