"""Every recipe of this package, its own settings, on tiny models and data in the task's own files: one epoch."""

import math

import pytest
import tiny_glue
import tiny_recipes
import tiny_text
from suite_size import NIGHTLY, covering

from adamix_kernels import AdaMixConfig
from adamix_kernels.recipes import Limits, expand_methods, load_recipe, recipe_names, run_recipe

pytest.importorskip("sklearn")
pytest.importorskip("sacrebleu")

TABLES = {"e2e": tiny_recipes.write_e2e, "webnlg": tiny_recipes.write_webnlg, "dart": tiny_recipes.write_dart}
# How many the training files hold; of a labelled task 36.
TEXTS = {"e2e": 8, "webnlg": 6, "dart": 4}


def _split(name):
    """("glue/bert-base", "sst2")"""
    kind, _, task = name.rpartition("/")
    return kind, task


def _write(name, folder):
    """(model, data) for a recipe, as paths."""
    _, task = _split(name)
    if name.startswith("nlg/"):
        return str(tiny_recipes.write_causal(folder / "model")), str(TABLES[task](folder / "data"))
    write_model = tiny_glue.write_roberta if "roberta" in name else tiny_text.write_encoder
    return str(write_model(folder / "model")), str(tiny_glue.write_task(folder / "data", task))


# By day every task and every model of each kind, at night each task with each model.
NAMES = recipe_names() if NIGHTLY else ["/".join(name) for name in covering([*map(_split, recipe_names())], 1)]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _name: None)  # METEOR's Java takes 16 seconds; it has a test of its own
    model, data = _write(name, tmp_path)
    published = load_recipe(name)
    # The published batch of 64 would be one step.
    changes = {"model": model, "data": data, "training.num_train_epochs": 1, "training.use_cpu": True}
    recipe = published.changed({**changes, "training.per_device_train_batch_size": 10, "seeds": 1})
    method = expand_methods(published.default_methods[-1:], recipe)
    (row,) = run_recipe(recipe, method, [0], tmp_path / "rows.jsonl", limits=Limits(dev_rows=3))

    rows = published.shots or TEXTS.get(name.rpartition("/")[2], 36)
    assert (row["train_rows"], row["steps"]) == (rows, math.ceil(rows / 10))
    assert set(row["scores"]) == set(published.evaluations)
    wanted = set(published.metrics) - set(row["metrics_missing"])
    for scores in row["scores"].values():
        assert {score for score in scores if not score.endswith(("_seen", "_unseen"))} - {"loss"} == wanted
        assert all(map(math.isfinite, scores.values()))
    # What three rows do not define (correlations of equal predictions, say) is the one thing that may lack.
    assert all("not defined" in why or "Java" in why for why in row["metrics_missing"].values())
    experts = AdaMixConfig.from_dict(published.adamix).num_experts
    assert len(row["spread"].get("fixed", [None] * experts)) == experts
    assert row["trained"] > row["kept"]
