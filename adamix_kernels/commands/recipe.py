"""adamix recipe: the paper's experiments, their baselines and ablations, and the tables and plots of their results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._options import OutputOptions, at_least, needs_file, needs_out, option, shows_bars, start
from ._parser import OptionParser
from ._words import closest

ACTIONS = {
    "list": "names of the recipes of this package",
    "methods": "what can be compared",
    "show": "a recipe as JSON",
    "run": "train and evaluate; finished runs in --results are left alone",
    "report": "table.md and plots of one or more result files",
}
RECIPE = (
    "RECIPE is one of `adamix recipe list`, or a JSON file as `adamix recipe show RECIPE` prints it. Methods are names "
    "of `adamix recipe methods`, with options after a colon (adamix:num_experts=8,routing=sample; of every method "
    "learning_rate, times_epochs, warmup_ratio), or the groups default, baselines, ablations and controls."
)


@dataclass
class RecipeOptions:
    _argument_group_name = "changes of the recipe"

    recipe: str = option("name or JSON file; also as the word after the action", "")
    model: str | None = option("hub id or folder, in place of the recipe's")
    data: str | None = option("folder or hub data set, in place of the recipe's")
    epochs: float | None = option("in place of the recipe's, for every method")
    set: list[str] = option(
        "change a field, dotted: --set adamix.num_experts 8 --set methods.full.learning_rate 2e-5",
        [],
        nargs=2,
        action="append",
        metavar=("KEY", "VALUE"),
    )


@dataclass
class RunOptions:
    _argument_group_name = "runs"

    methods: list[str] = option("names, or default, baselines, ablations, controls", ["default"])
    seeds: int | None = option("seeds 0 to N-1; the recipe's number by default")
    results: str = option("JSON-lines file of finished runs", "results.jsonl")
    train_rows: int | None = option("N training rows, drawn by the seed, classes in proportion")
    dev_rows: int | None = option("N dev rows, drawn once for all seeds")
    shots: int | None = option("K labelled training rows, drawn by the seed evenly over the classes")
    reports: str | None = option("a folder for a training report of every AdaMix run")


@dataclass
class ReportOptions:
    _argument_group_name = "report"

    out: str = option("folder for the table and the plots", "recipe_report")
    against: list[str] = option(
        "methods: differences.md has every method minus these, seed by seed, with 95%% intervals", []
    )


def main(argv: Sequence[str]) -> int:
    """Raises ValueError for an action that is none of ACTIONS."""
    action, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if action in ("-h", "--help", "--help_all", "--help-all"):
        _top().print_help()
        return 0
    if action not in ACTIONS:
        raise ValueError(f"action: got {action!r}, expected one of {', '.join(ACTIONS)}{closest(action, ACTIONS)}")
    work = {"list": _list, "methods": _methods, "show": _show, "run": _run, "report": _report}[action]
    return work(rest)


def _top() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="adamix recipe",
        usage="adamix recipe ACTION ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The paper's experiments, their baselines and ablations; tables and plots of their results.",
        epilog="actions:\n" + "\n".join(f"  {name:9}{text}" for name, text in ACTIONS.items())
        + "\n\nadamix recipe ACTION --help shows an action's options.",
    )  # fmt: skip


def _parser(action: str, types: Sequence[type], words: str) -> OptionParser:
    text = f"{ACTIONS[action][0].upper()}{ACTIONS[action][1:]}. {RECIPE if 'RECIPE' in words else ''}"
    return OptionParser(f"recipe {action}", types, text.strip(), words=words, lone_file=False)


def _list(argv: Sequence[str]) -> int:
    _parser("list", (), "").parse(argv)
    from ..recipes import recipe_names

    print("\n".join(recipe_names()))
    return 0


def _methods(argv: Sequence[str]) -> int:
    _parser("methods", (), "").parse(argv)
    from ..recipes.methods import METHODS

    print("\n".join(f"{name:10}{text}" for name, text in METHODS.items()))
    return 0


def _show(argv: Sequence[str]) -> int:
    parsed = _parser("show", (RecipeOptions,), "RECIPE").parse(argv)
    print(json.dumps(_recipe(parsed.parts[0], parsed.words).to_dict(), indent=2))
    return 0


def _run(argv: Sequence[str]) -> int:
    parsed = _parser("run", (RecipeOptions, RunOptions, OutputOptions), "RECIPE").parse(argv)
    changes, options, output = parsed.parts
    from ..recipes import Limits, expand_methods, run_recipe
    from ..recipes.processes import is_main
    from ..recipes.summary import group_rows, markdown

    at_least(1, seeds=options.seeds)
    needs_file("results", options.results, made=True)
    if options.reports is not None:
        needs_out(options.reports, "reports")
    start(output)
    recipe = _recipe(changes, parsed.words)
    rows = run_recipe(
        recipe,
        expand_methods(options.methods, recipe),
        range(recipe.seeds if options.seeds is None else options.seeds),
        options.results,
        limits=Limits(options.train_rows, options.dev_rows, options.shots),
        reports=options.reports,
        progress=shows_bars(output),
    )
    if not is_main():
        return 0
    print(markdown(group_rows(rows)))
    print(f"rows: {options.results}; table and plots: adamix recipe report {options.results}")
    return 0


def _report(argv: Sequence[str]) -> int:
    parsed = _parser("report", (ReportOptions,), "RESULTS ...").parse(argv)
    from ..recipes import read_rows, write_summary

    if not parsed.words:
        raise ValueError("results: got nothing, expected one or more result files")
    paths = [Path(word) for word in parsed.words]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"results: {missing[0]}: no such file")
    rows = {}
    for path in paths:
        for row in read_rows(path):
            if not {"key", "identity", "recipe"} <= row.keys():
                raise ValueError(f"results: {path} has a line of another kind, expected rows of adamix recipe run")
            rows[row["key"]] = row
    options = parsed.parts[0]
    written = write_summary(list(rows.values()), Path(options.out))
    if options.against:
        from ..recipes.paired import write_differences

        written.append(write_differences(list(rows.values()), options.against, Path(options.out)))
    for path in written:
        print(path)
    return 0


def _recipe(options: RecipeOptions, words: Sequence[str]) -> Any:
    from ..recipes import load_recipe
    from ..recipes.methods import as_value

    given = [*([options.recipe] if options.recipe else []), *words]
    if len(given) != 1:
        raise ValueError(f"recipe: got {', '.join(map(repr, given)) or 'nothing'}, expected one name or JSON file")
    changes: dict[str, Any] = {n: v for n in ("model", "data") if (v := getattr(options, n)) is not None}
    if options.epochs is not None:
        changes["training.num_train_epochs"] = options.epochs
    pairs: Any = options.set  # appended two by two
    return load_recipe(given[0]).changed({**changes, **{key: as_value(text) for key, text in pairs}})
