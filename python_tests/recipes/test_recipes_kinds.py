"""Recipes of every kind of task: numbers, prompts, texts; each in a few steps of a tiny model."""

import json

import pytest
import tiny_recipes
import tiny_text
import torch

from adamix_kernels import cli
from adamix_kernels.recipes import (
    Limits,
    expand_methods,
    load_recipe,
    problems,
    read_rows,
    run_recipe,
)
from adamix_kernels.recipes.runner import run_identity

pytest.importorskip("peft")
pytest.importorskip("sklearn")

CLASSIFIERS = ["full", "head", "bitfit", "pfeiffer", "houlsby", "prefix:tokens=2", "lora:r=2", "adamix"]


def _run(recipe, methods, path, seeds=1, **options):
    return run_recipe(recipe, expand_methods(methods, recipe), range(seeds), path, **options)


def test_regression(tmp_path):
    pytest.importorskip("scipy")
    recipe = tiny_recipes.tiny_recipe(
        tmp_path, regression=True, metrics=["pearson", "spearman"], evaluations=["merged"]
    )
    words = tiny_text.WORDS
    lines = [f"{words[i % 4]} film\tthe {words[4 + i % 5]}\t{i / 4}" for i in range(12)]
    for split in ("train", "dev"):
        text = "\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n"
        (tmp_path / "data" / f"{split}.tsv").write_text(text, encoding="utf-8")
    (row,) = _run(recipe, ["adamix"], tmp_path / "rows.jsonl")
    assert set(row["scores"]["merged"]) == {"pearson", "spearman"}
    # Predictions below the minimum count as it (the released RoBERTa on STS-B); older rows keep their keys.
    logits, labels = torch.tensor([[-3.0], [-1.0], [1.0], [2.0]]), [0.0, 0.5, 1.0, 3.0]
    clipped = recipe.changed({"minimum": 0.0})
    for one, seen in ((recipe, [-3.0, -1.0, 1.0, 2.0]), (clipped, [0.0, 0.0, 1.0, 2.0])):
        scores = problems.PROBLEMS["classification"](one, Limits()).scores_of(logits, labels)
        want = 100 * torch.corrcoef(torch.tensor([seen, labels]))[0, 1].item()
        assert scores.values["pearson"] == pytest.approx(want, abs=1e-3)
    method = expand_methods(["adamix"], recipe)[0]
    assert "minimum" not in run_identity(recipe, method, 0, Limits())["recipe"]
    assert run_identity(clipped, method, 0, Limits())["recipe"]["minimum"] == 0.0
    assert load_recipe("glue/roberta-large/stsb").minimum == 0.0
    assert load_recipe("glue/bert-base/stsb").minimum is None
    with pytest.raises(ValueError, match=r"minimum: got 0\.0, expected None where the label is no number"):
        load_recipe("glue/roberta-large/rte").changed({"minimum": 0.0})


def test_fewshot_prompts(tmp_path):
    words = {"good": ["up"], "bad": ["down"]}
    recipe = tiny_recipes.tiny_recipe(
        tmp_path, kind="prompt", shots=6, prompt={"template": "{text} was {mask}", "words": words}
    )
    methods = ["full", "head", "lora:r=2", "prefix", "adamix"]
    rows = _run(recipe, methods, tmp_path / "rows.jsonl", limits=Limits(dev_rows=4))
    assert [row.get("train_rows") for row in rows] == [6, 6, 6, None, 6]
    assert "masked language models" in rows[3]["skipped"]
    assert all(0 <= row["scores"]["plain"]["accuracy"] <= 100 for row in rows[:3])
    assert set(rows[4]["scores"]) == {"merged", "random", "fixed"}


def test_the_evidence_of_a_small_encoder(tmp_path):
    tiny = tiny_recipes.tiny_recipe(tmp_path)
    changes = {"model": tiny.model, "data": tiny.data, "training.num_train_epochs": 1, "training.use_cpu": True}
    recipe = load_recipe("evidence/minilm").changed(
        {**changes, "adamix.bottleneck": 4, "evaluations": ["merged", "random"]}
    )
    rows = _run(recipe, ["default"], tmp_path / "rows.jsonl", limits=Limits(shots=4, dev_rows=4))
    assert [row["method"] for row in rows] == recipe.default_methods
    assert [row["shots"] for row in rows] == [4] * 7
    one_pass = ["consistency_weight=0" in row["method"] for row in rows[3:]]
    assert one_pass == [not any(row["history"]["consistency"]) for row in rows[3:]]
    assert rows[2]["kept"] == rows[3]["kept"]


NLG = {
    "e2e": (tiny_recipes.write_e2e, {"method": "lora", "r": 2, "num_experts": 2}),
    "webnlg": (tiny_recipes.write_webnlg, {"method": "adapter", "bottleneck": 2, "num_experts": 2}),
    "dart": (tiny_recipes.write_dart, {"method": "lora", "r": 2, "num_experts": 2, "dropout": 0.1}),
}


@pytest.mark.parametrize("task", NLG)
def test_text_from_tables(tmp_path, task):
    pytest.importorskip("sacrebleu")
    write, adamix = NLG[task]
    recipe = tiny_recipes.tiny_recipe(
        tmp_path,
        kind="generation",
        model=str(tiny_recipes.write_causal(tmp_path / "gpt2")),
        data=str(write(tmp_path / task)),
        data_format=task,
        metrics=["bleu", "ter", "rouge_l"],
        evaluations=["merged"],
        adamix={**adamix, "consistency_weight": 100.0},
        max_tokens=40,
        generation={
            "beams": 2,
            "max_new_tokens": 4,
            "stop_ids": [628],
            "tokens": "mteval" if task == "e2e" else "words",
            "batch_size": 2,
            "references": 1,
        },
    ).changed({"training.label_smoothing_factor": 0.1, "training.max_grad_norm": 0.0})  # fmt: skip
    methods = (
        ["lora:r=2", "adamix"] if task == "e2e" else ["prefix:tokens=2", "adamix"] if task == "dart" else ["adamix"]
    )
    rows = _run(recipe, methods, tmp_path / "rows.jsonl", limits=Limits(dev_rows=None if task == "webnlg" else 2))
    assert not any(row["metrics_missing"] for row in rows)
    names = ["bleu", "ter", "rouge_l"]
    parts = [f"{name}_{part}" for name in names for part in ("seen", "unseen") if task == "webnlg"]
    for row in rows:
        (scores,) = row["scores"].values()
        assert set(scores) == {*names, *parts, "loss"}
        assert 0 < scores["loss"] < 6


def test_webnlg_is_scored_by_part_and_against_its_first_references(tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu")
    recipe = tiny_recipes.tiny_recipe(
        tmp_path, kind="generation", model=str(tiny_recipes.write_causal(tmp_path / "gpt2")),
        data=str(tiny_recipes.write_webnlg(tmp_path / "webnlg")), data_format="webnlg", metrics=["bleu"], max_tokens=40,
    )  # fmt: skip
    problem = problems.TextProblem(recipe, Limits())
    known = problems.references(problem.data.test)
    *seen, unseen = known.values()
    texts = [texts[0] for texts in seen] + [unseen[1]]
    monkeypatch.setattr(problems, "beam_decode", lambda *_args, **_settings: texts)
    model = problem.fresh()
    whole = problem.scores(model).values
    assert whole["bleu_seen"] == whole["bleu_unseen"] == whole["bleu"] == pytest.approx(100)
    problem.recipe = recipe.changed({"generation.references": 1})  # the text of the unseen table is its second
    first = problem.scores(model).values
    assert first["bleu_seen"] == pytest.approx(100)
    assert first["bleu_unseen"] < 50 < first["bleu"] < 100
    with pytest.raises(ValueError, match=r"generation\.references: got 0, expected a whole number above 0"):
        recipe.changed({"generation.references": 0})


def test_a_model_with_too_few_positions_is_named_before_training(tmp_path, capsys):
    recipe = tiny_recipes.tiny_recipe(
        tmp_path, kind="generation", model=str(tiny_recipes.write_causal(tmp_path / "gpt2")),
        data=str(tiny_recipes.write_e2e(tmp_path / "e2e")), data_format="e2e", metrics=["bleu"], max_tokens=40,
        generation={"beams": 1, "max_new_tokens": 126},
    )  # fmt: skip
    results = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match=r"generation: got a context of \d+ tokens and max_new_tokens=126, .* 128"):
        _run(recipe, ["adamix"], results)
    assert read_rows(results) == []
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(recipe.to_dict()))
    assert cli.main(["recipe", "run", str(file), "--results", str(results)]) == 2
    assert "generation.max_context" in capsys.readouterr().err
    fits = recipe.changed({"generation.max_context": 2, "training.max_steps": 1, "evaluations": ["merged"]})
    (row,) = _run(fits, ["adamix"], results, limits=Limits(dev_rows=1))
    assert row["scores"]["merged"]["bleu"] >= 0
    # Training rows, of an encoder.
    long = tiny_recipes.tiny_recipe(tmp_path / "long", max_tokens=512)
    text = "label\tsentence\n" + "up\t" + "good " * 200 + "\ndown\tbad\n"
    (tmp_path / "long" / "data" / "train.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"max_tokens: got 512 and a row of \d+ tokens, expected at most 32"):
        _run(long, ["adamix"], results)
