"""Bad input of the commands, the recipes and the data they read. What the commands raise is one line on stderr."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from adamix_kernels.commands import _words, evaluate, export, merge, recipe, train
from adamix_kernels.commands._train_options import AdaptationOptions
from adamix_kernels.models.config import AdaMixConfig
from adamix_kernels.recipes import config as recipes
from adamix_kernels.recipes import metrics, shots
from adamix_kernels.recipes.methods import parse_method
from adamix_kernels.recipes.prompt import Prompt, prompt_for
from adamix_kernels.tasks.encoders import load_causal, load_classifier, resolve_model
from adamix_kernels.tasks.loading import load
from adamix_kernels.tasks.reading import load_task
from adamix_kernels.tasks.run_file import read_run
from adamix_kernels.tasks.table_data import load_tables
from adamix_kernels.tasks.text import TextSplit

from .kinds import Kind


def kinds() -> list[Kind]:
    folder = Path(tempfile.mkdtemp(prefix="adamix_bad_options_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # the kinds are tried later
    return [*_commands(folder), *_train_options(), *_recipes(folder), *_methods(), *_data(folder)]


def _file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _commands(folder: Path) -> Iterator[Kind]:
    for command, main in (("eval", evaluate.main), ("export", export.main), ("merge", merge.main)):
        for words, text in (("no JSON", "{"), ("a JSON list", "[]")):
            path = _file(folder, f"{command} {words}.json", text)
            yield Kind(f"adamix {command}: {words}", str(path), lambda main=main, path=path: main([str(path)]))
        path = _file(folder, f"{command} unknown.json", '{"nonsense": 1}')
        yield Kind(f"adamix {command}: an unknown option", "nonsense", lambda main=main, path=path: main([str(path)]))
    path = _file(folder, "train.json", '{"nonsense": 1}')
    yield Kind("adamix train: an unknown option", "nonsense", lambda: train.parse([str(path)]))
    for words, text in (("no JSON", "{"), ("a JSON list", "[]")):
        bad = _file(folder, f"train {words}.json", text)
        yield Kind(f"adamix train: {words}", str(bad), lambda bad=bad: train.parse([str(bad)]))
        yield Kind(f"options: {words}", str(bad), lambda bad=bad: _words.read_options(str(bad)))
    missing = folder / "missing"
    yield Kind("adamix eval: no such checkpoint", str(missing), lambda: evaluate.main([str(missing)]))
    yield Kind("adamix merge: over its own checkpoint", "out", lambda: merge.main([str(folder), "--out", str(folder)]))
    yield Kind("adamix recipe: no such recipe", "recipe", lambda: recipe.main(["show", "nonsense"]))


def _train_options() -> Iterator[Kind]:
    for name, value in (
        ("method", "prefix"), ("num_experts", 0), ("bottleneck", -1), ("r", 0), ("alpha", 0.0), ("alpha", -1.0),
        ("share", "both"), ("routing", "expert"), ("consistency_weight", -1.0),
    ):  # fmt: skip
        options = AdaptationOptions(**{name: value})
        yield Kind(f"adamix train --{name} {value}", name, options.config)
    yield Kind("adamix train --lora_dropout 1", "lora_dropout", AdaptationOptions(lora_dropout=1.0).config)


def _recipe(**changes) -> dict:
    values = dict(
        name="a", kind="classification", model="m", data="d", metrics=["accuracy"], training={},
        adamix=AdaMixConfig().to_dict(),
    )  # fmt: skip
    return {**values, **changes}


def _recipes(folder: Path) -> Iterator[Kind]:
    for argument, values in (
        ("version", {"version": 9}), ("kind", {"kind": "ranking"}), ("select", {"select": "worst"}),
        ("evaluations", {"evaluations": []}), ("evaluations", {"evaluations": ["all"]}), ("metrics", {"metrics": []}),
        ("prompt", {"kind": "prompt"}), ("num_experts", {"adamix": {"num_experts": 0}}),
        ("config", {"adamix": {"experts": 0}}), ("config", {"adamix": [1]}), ("recipe", {"nonsense": 1}),
    ):  # fmt: skip
        yield Kind(
            f"recipe: {argument} of {values}", argument, lambda values=values: recipes.from_dict(_recipe(**values))
        )
    yield Kind("recipe: a field is missing", "recipe", lambda: recipes.from_dict({"name": "a"}))
    good = recipes.from_dict(_recipe())
    yield Kind("recipe: a change of no object", "name.a", lambda: good.changed({"name.a": 1}))
    yield Kind("recipe: a change of no field", "recipe", lambda: good.changed({"nonsense": 1}))
    yield Kind("recipe: no such name", "recipe", lambda: recipes.load_recipe("nonsense"))
    for words, text in (("no JSON", "{"), ("a list", "[]"), ("an unknown key", json.dumps(_recipe(nonsense=1)))):
        path = _file(folder, f"recipe {words}.json", text)
        yield Kind(f"recipe file: {words}", str(path), lambda path=path: recipes.load_recipe(str(path)))
    for template in ("", "{text}", "{mask}", "{text} {mask} {mask}"):
        yield Kind(f"prompt: template {template!r}", "template", lambda template=template: Prompt(template, ["a"]))
    yield Kind(
        "prompt: a label without a word", "words",
        lambda: prompt_for({"template": "{text} {mask}", "words": {"good": ["1"]}}, ["0", "1"]),
    )  # fmt: skip
    yield Kind("metrics: of labels, unknown", "metrics", lambda: metrics.label_scores(["bleu"], [1], [1]))
    yield Kind("metrics: of texts, unknown", "metrics", lambda: metrics.text_scores(["accuracy"], ["a"], [["a"]]))


def _methods() -> Iterator[Kind]:
    for text, argument in (
        ("", "method"), ("nonsense", "method"), ("bitfit:r", "method"), ("lora:nonsense=1", "method"),
        ("adamix:num_experts=0", "num_experts"), ("adamix:nonsense=1", "config"), ("adamix:share=both", "share"),
        ("adamix:dropout=2", "dropout"),
    ):  # fmt: skip
        yield Kind(f"method {text!r}", argument, lambda text=text: parse_method(text))


def _data(folder: Path) -> Iterator[Kind]:
    tables = {
        "one line": "sentence\tlabel\n",
        "ragged": "sentence\tlabel\na\t1\nb\n",
        "a column twice": "sentence\tsentence\na\t1\n",
        "no label": "sentence\tother\na\t1\n",
        "one class": "sentence\tlabel\na\t1\nb\t1\n",
    }
    named = {"one line": "train.tsv", "ragged": "train.tsv", "a column twice": "train.tsv", "no label": "label",
             "one class": "label"}  # fmt: skip
    for words, text in tables.items():
        where = folder / words
        for split in ("train", "dev"):
            _file(where, f"{split}.tsv", text)
        yield Kind(f"data: {words}", named[words], lambda where=where: load_task(str(where)))
    where = folder / "bytes"
    _file(where, "dev.tsv", "sentence\tlabel\na\t1\nb\t0\n")
    (where / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    yield Kind("data: bytes that are no text", "train.tsv", lambda: load_task(str(where)))
    split = TextSplit(["a"] * 4, None, [0, 1, 0, 1])
    yield Kind("shots: fewer than classes", "shots", lambda: shots.draw_shots(split, 1, 0))
    yield Kind("shots: more than rows", "shots", lambda: shots.draw_shots(split, 20, 0))
    yield Kind("tables: another format", "data_format", lambda: load_tables(str(folder), "csv"))
    e2e = folder / "e2e"
    for name in ("train", "valid", "test"):
        _file(e2e, f"{name}.txt", "no separator\n")
    yield Kind("tables: E2E without its separator", "line 1", lambda: load_tables(str(e2e), "e2e"))
    yield Kind("run file: no such folder", str(folder / "none"), lambda: read_run(folder / "none"))
    _file(folder / "run", "run.json", "{}")
    encoder = resolve_model(str(folder))
    yield Kind("pooling: another", "pooling", lambda: load_classifier(encoder, ["a", "b"], "max"))
    yield Kind("load_classifier: another task", "task", lambda: load_classifier(encoder, [], task="generation"))
    yield Kind("load_causal: no model", str(folder), lambda: load_causal(encoder))
    for value in (None, 3, b"run"):
        yield Kind(f"load: {value!r}", "source", lambda value=value: load(value))
    yield Kind("load: no such folder", "source", lambda: load(str(folder / "none")))
    yield Kind("load: an empty folder", "source", lambda: load(folder / "run"))
    yield Kind("load: a file", "source", lambda: load(folder / "run" / "run.json"))
    yield Kind("load: a revision of a folder", "revision", lambda: load(folder, revision="main"))
    yield Kind("load: a list for a model", "model", lambda: load(folder, model=["a"]))
