"""UniPELT by AdapterHub's adapters, which stands on transformers 4.57 (`make test` runs this there as well)."""

import importlib.util
import sys
import types

import pytest
import tiny
import tiny_recipes

from adamix_kernels.recipes import expand_methods, parse_method, read_rows, run_recipe
from adamix_kernels.recipes.methods import build, kept_parameters

HAS_ADAPTERS = importlib.util.find_spec("adapters") is not None
needs_adapters = pytest.mark.skipif(not HAS_ADAPTERS, reason="adapters is not installed: it needs transformers 4.57")
pytest.importorskip("sklearn")


def _run(recipe, methods, path):
    return run_recipe(recipe, expand_methods(methods, recipe), [0], path)


def test_without_the_library_a_row_says_so_and_it_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "adapters", None)
    recipe, path = tiny_recipes.tiny_recipe(tmp_path), tmp_path / "rows.jsonl"
    nothing_there = recipe.changed({"data": str(tmp_path / "none"), "model": str(tmp_path / "none")})
    assert "skipped" in _run(nothing_there, ["unipelt"], tmp_path / "other.jsonl")[0]  # before anything is read
    for _ in range(2):
        (row,) = _run(recipe, ["unipelt"], path)
        assert "adapters 1.3 with transformers 4.57" in row["skipped"]
    assert len(read_rows(path)) == 1
    monkeypatch.setitem(sys.modules, "adapters", types.ModuleType("adapters"))  # installed since
    outcome = {"scores": {"plain": {"accuracy": 50.0}}}
    monkeypatch.setattr("adamix_kernels.recipes.training.train_once", lambda *_args: outcome)
    assert _run(recipe, ["unipelt"], path)[0]["scores"] == outcome["scores"]
    assert ["skipped" in row for row in read_rows(path)] == [True, False]


@needs_adapters
@pytest.mark.parametrize("parts", ["ap", "apl"])
def test_gates_prefixes_adapters_and_lora_are_trained(parts):
    built = build(
        parse_method(f"unipelt:parts={parts}"), tiny.tiny_bert(), tiny_recipes.from_dict(tiny_recipes.SETTINGS)
    )
    trained = {name: p for name, p in built.model.named_parameters() if p.requires_grad}
    kinds = {kind for name in trained for kind in ("prefix", "gate", "adapters", "loras", "classifier") if kind in name}
    assert kinds == {"prefix", "gate", "adapters", "classifier"} | ({"loras"} if parts == "apl" else set())
    assert kept_parameters(built) == sum(p.numel() for p in trained.values())
    built.model.train()(**tiny.batch_for(tiny.tiny_bert())).loss.backward()
    assert all(p.grad is not None for p in trained.values())


@needs_adapters
def test_a_classifier_and_a_generator_from_end_to_end(tmp_path):
    recipe = tiny_recipes.tiny_recipe(tmp_path, select="best")
    (row,) = _run(recipe, ["unipelt"], tmp_path / "rows.jsonl")
    assert 0 <= row["scores"]["plain"]["accuracy"] <= 100
    pytest.importorskip("sacrebleu")
    text = tiny_recipes.tiny_recipe(
        tmp_path,
        kind="generation",
        model=str(tiny_recipes.write_causal(tmp_path / "gpt2")),
        data=str(tiny_recipes.write_e2e(tmp_path / "e2e")),
        metrics=["bleu"],
        adamix={"method": "lora"},
        generation={"beams": 2, "max_new_tokens": 4, "batch_size": 2},
    )
    (row,) = _run(text, ["unipelt:parts=ap"], tmp_path / "rows.jsonl")
    assert 0 < row["scores"]["plain"]["loss"] < 6
