"""Each family of recipes from end to end on tiny models and data made here: train, evaluate, resume, report."""

import json

import pytest
import tiny_recipes
import torch

from adamix_kernels import cli
from adamix_kernels.models.gating import routed_layers
from adamix_kernels.recipes import (
    Limits,
    commits,
    expand_methods,
    load_recipe,
    problems,
    read_rows,
    run_recipe,
    together,
    training,
)
from adamix_kernels.recipes.paired import differences
from adamix_kernels.recipes.runner import run_identity
from adamix_kernels.recipes.summary import group_rows

pytest.importorskip("peft")
pytest.importorskip("sklearn")

CLASSIFIERS = ["full", "head", "bitfit", "pfeiffer", "houlsby", "prefix:tokens=2", "lora:r=2", "adamix"]


def _run(recipe, methods, path, seeds=1, **options):
    return run_recipe(recipe, expand_methods(methods, recipe), range(seeds), path, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(recipe, results file, rows) of every baseline and AdaMix, with a training report."""
    folder = tmp_path_factory.mktemp("glue")
    recipe = tiny_recipes.tiny_recipe(folder, pooling="mean")
    path = folder / "rows.jsonl"
    return recipe, path, _run(recipe, CLASSIFIERS, path, reports=folder / "reports")


def test_baselines_and_adamix_share_rows_steps_and_seeds(finished):
    _, path, rows = finished
    assert rows == read_rows(path)
    assert [row["method"] for row in rows] == CLASSIFIERS
    for row in rows:
        assert (row["train_rows"], row["steps"], row["seed"], row["epochs"]) == (12, 2, 0, 1)
        assert row["seconds_per_step"] > 0
        assert row["metric_sources"]["accuracy"].startswith("scikit-learn")
        assert len(row["history"]["loss"]) == 2
        assert set(row["scores"]) == ({"merged", "random", "fixed"} if row["method"] == "adamix" else {"plain"})
        assert all(0 <= s["accuracy"] <= 100 for s in row["scores"].values())
    adamix = rows[-1]
    assert [len(adamix["spread"][k]) for k in ("random", "fixed")] == [3, 2]
    assert adamix["trained"] > adamix["kept"]
    assert all(v > 0 for v in adamix["history"]["consistency"])
    # The first batch passes through the same head, whatever is trained: without dropout these would be equal.
    first = [row["history"]["loss"][0] for row in rows]
    assert max(first) - min(first) < 0.5


def test_every_method_sees_the_same_batches(finished, tmp_path, monkeypatch):
    recipe, seen = finished[0], []
    plain = problems.collator

    def collator(tokenizer):
        inner = plain(tokenizer)

        def collate(rows):
            seen[-1].append([tuple(row["input_ids"]) for row in rows])
            return inner(rows)

        return collate

    monkeypatch.setattr(problems, "collator", collator)
    for method in ("full", "lora:r=2", "adamix", "adamix:consistency_weight=0,num_experts=4"):
        seen.append([])
        _run(recipe, [method], tmp_path / "rows.jsonl", limits=Limits(dev_rows=2))
    batches = [calls[:2] for calls in seen]
    assert sorted(len(rows) for rows in batches[0]) == [6, 6]
    assert all(other == batches[0] for other in batches[1:])


def test_an_adamix_run_leaves_its_report(finished):
    _, path, _ = finished
    (folder,) = (path.parent / "reports").iterdir()
    report = json.loads((folder / "training_report.json").read_text())
    assert [p["step"] for p in report["points"]] == [1, 2]
    assert (folder / "training_report.png").read_bytes().startswith(b"\x89PNG")


def test_finished_rows_are_not_run_again(finished, monkeypatch):
    recipe, path, rows = finished
    before = path.read_bytes()

    def fail(*_args, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr("adamix_kernels.recipes.training.train_once", fail)
    assert _run(recipe, CLASSIFIERS, path) == rows
    assert path.read_bytes() == before
    with pytest.raises(AssertionError, match="trained again"):
        _run(recipe.changed({"training.num_train_epochs": 2}), ["head"], path)
    with pytest.raises(AssertionError, match="trained again"):
        _run(recipe, ["head"], path, limits=Limits(train_rows=6))
    # Another method's settings, or more seeds, do not make a run another one.
    assert _run(recipe.changed({"methods.full.learning_rate": 1.0, "seeds": 9}), ["head"], path) == rows[1:2]


def test_fewer_rows_are_drawn_by_the_seed_in_proportion_and_are_another_run_than_the_first_rows(finished, tmp_path):
    recipe = tiny_recipes.tiny_recipe(tmp_path)
    lines = [f"{('good', 'bad')[i // 30]} {i}\t{('up', 'down')[i // 30]}" for i in range(60)]  # sorted by label
    for split in ("train", "dev"):
        (tmp_path / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    problem = problems.LabelProblem(recipe, Limits(train_rows=10, dev_rows=4))
    problem.fresh()
    for seed in (0, 1):
        assert sum(row["labels"] for row in problem.train_rows(seed)) == 5
        assert problem.train_rows(seed) == problem.train_rows(seed)
    assert sum(row["labels"] for row in problem.dev_rows()) == 2
    (method,) = expand_methods(["head"], finished[0])
    whole, drawn = (run_identity(recipe, method, 0, limits)["limits"] for limits in (Limits(shots=2), Limits(4)))
    assert whole == {"train_rows": None, "dev_rows": None, "shots": 2}  # as in rows of old
    assert drawn == {"train_rows": 4, "dev_rows": None, "shots": None, "rows": "drawn"}
    for wrong in ({"train_rows": 0}, {"dev_rows": -1}, {"shots": 0}):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}: got .*, expected at least 1"):
            Limits(**wrong)


def test_the_same_seed_gives_the_same_row(finished, tmp_path):
    recipe, _, rows = finished
    (again,) = _run(recipe, ["adamix"], tmp_path / "rows.jsonl")
    for key in ("scores", "spread", "history", "key"):
        assert again[key] == rows[-1][key]


def test_learned_gates_are_judged_with_their_gates_and_merged_by_the_mean(finished, tmp_path):
    recipe = finished[0].changed({"evaluations": ["merged"]})
    gated, equal = _run(recipe, ["adamix:routing=learned,consistency_weight=0", "equal"], tmp_path / "rows.jsonl")
    assert (set(gated["scores"]), set(equal["scores"])) == ({"gates", "merged"}, {"plain"})
    assert gated["trained"] == gated["kept"] > equal["trained"]
    assert set(gated["history"]) == {"step", "loss", "cross_entropy", "consistency"}
    (group,) = group_rows([gated, equal])
    assert [line.name.partition(",")[2] for line in group.lines] == [
        "routing=learned, gated",
        "routing=learned, merged",
        "",
    ]
    assert differences(group, gated["method"])[0].line.evaluation == "merged"  # minus the gated one


def test_experts_that_begin_together_are_one_until_then(finished, tmp_path, monkeypatch):
    recipe, seen = finished[0].changed({"evaluations": ["merged"], "training.num_train_epochs": 2}), []
    spread = together._spread

    def watched(model, optimizer):
        banks = [bank for layer in routed_layers(model).values() for bank in layer.banks() if bank.shape[0] > 1]
        moments = optimizer.optimizer.state
        assert banks
        assert not any(moments[bank]["exp_avg"][1].any() for bank in banks)
        assert all(moments[bank]["exp_avg"][0].any() for bank in banks)
        spread(model, optimizer)
        for bank in banks:
            for values in (bank, moments[bank]["exp_avg"], moments[bank]["exp_avg_sq"]):
                assert torch.equal(values[0], values[1])
        assert model.adamix.router.experts is None
        seen.append(banks)

    monkeypatch.setattr(together, "_spread", watched)
    (row,) = _run(recipe, ["adamix:together=0.5"], tmp_path / "rows.jsonl")
    (banks,) = seen
    assert not any(torch.equal(bank[0], bank[1]) for bank in banks)  # two steps later
    assert (row["steps"], row["trained"] > row["kept"]) == (4, True)


def test_a_soup_is_the_mean_of_adapters_trained_apart(finished, tmp_path, monkeypatch):
    recipe, seen = finished[0], []
    plain = training.evaluate

    def evaluate(recipe, problem, built, seed):
        scored = plain(recipe, problem, built, seed)
        weights = {n: p.detach().clone() for n, p in built.model.named_parameters() if p.requires_grad}
        seen.append((built.members, weights))
        return scored

    monkeypatch.setattr(training, "evaluate", evaluate)
    one, soup = _run(recipe, ["pfeiffer", "soup:models=3"], tmp_path / "rows.jsonl")
    (_, alone), (members, mean) = seen
    assert len(members) == 3
    for name, value in mean.items():
        assert torch.equal(members[0][name], alone[name])  # the first is the plain adapter of the same seed
        assert not torch.equal(members[1][name], alone[name])
        torch.testing.assert_close(value, sum(m[name] for m in members) / 3)
    assert soup["scores"]["fixed"]["accuracy"] == pytest.approx(sum(soup["spread"]["fixed"]) / 3)
    assert soup["spread"]["fixed"][0] == one["scores"]["plain"]["accuracy"]
    assert (soup["trained"], soup["kept"], soup["steps"]) == (3 * one["trained"], one["kept"], 3 * one["steps"])
    assert soup["history"]["loss"] == one["history"]["loss"]


def test_a_method_may_train_longer(finished, tmp_path):
    (row,) = _run(finished[0], ["head:times_epochs=1.5,learning_rate=0.2"], tmp_path / "rows.jsonl")
    assert (row["steps"], row["epochs"], row["learning_rate"]) == (3, 1, 0.2)
    assert row["seconds"] > 0
    assert row["commit"] == commits.commit()


def test_the_commit_is_the_checkouts_or_not_named(monkeypatch):
    monkeypatch.setattr(commits, "_git", lambda *words: " M x.py" if words[0] == "status" else "0123456789ab")
    assert commits.commit.__wrapped__() in ("0123456789ab-dirty", None)
    monkeypatch.setattr(commits, "_git", lambda *words: None)
    monkeypatch.setattr(commits, "_recorded", lambda: {"vcs_info": {"commit_id": "f" * 40}})
    assert commits.commit.__wrapped__() == "f" * 12
    monkeypatch.setattr(commits, "_recorded", dict)
    assert commits.commit.__wrapped__() is None


def test_the_best_epoch_on_dev_is_kept(tmp_path):
    recipe = tiny_recipes.tiny_recipe(tmp_path, select="best").changed({"training.num_train_epochs": 2})
    rows = _run(recipe, ["head", "adamix"], tmp_path / "rows.jsonl")
    assert [row["steps"] for row in rows] == [4, 4]
    assert all(row["scores"] for row in rows)


def test_from_the_command_line(finished, tmp_path, capsys):
    recipe, path, _ = finished
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(recipe.to_dict()))
    results = tmp_path / "rows.jsonl"
    run = ["recipe", "run", str(mine), "--methods", "head", "--seeds", "2", "--results", str(results), "--disable-tqdm"]
    assert cli.main([*run, "--train-rows", "6", "--set", "training.learning_rate", "0.1"]) == 0
    assert "| head | " in capsys.readouterr().out
    rows = read_rows(results)
    assert [(r["seed"], r["learning_rate"], r["train_rows"]) for r in rows] == [(0, 0.1, 6), (1, 0.1, 6)]
    assert cli.main(["recipe", "report", str(path), str(results), "--out", str(tmp_path / "report")]) == 0
    assert "routings-1.png" in capsys.readouterr().out
    assert "adamix, merged" in (tmp_path / "report" / "table.md").read_text()
    assert cli.main(["recipe", "show", "glue/bert-base/rte", "--epochs", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["num_train_epochs"] == 3
    for listing, word in (("list", "nlg/lora/e2e"), ("methods", "houlsby")):
        assert cli.main(["recipe", listing]) == 0
        assert word in capsys.readouterr().out
    assert cli.main(["recipe", "run", str(mine), "--methods", "unipelt:parts=x"]) == 2
    assert "expected one of ap, apl" in capsys.readouterr().err
    assert cli.main([*run, "--set", "training.epochs", "3"]) == 2
    assert "training: got 'epochs', expected fields of TrainingArguments" in capsys.readouterr().err
    assert cli.main([*run, "--seeds", "0"]) == 2
    assert "seeds: got 0, expected at least 1" in capsys.readouterr().err
    assert cli.main(["recipe", "report", str(tmp_path / "none.jsonl")]) == 2


def _dropouts(model):
    return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}


def test_the_frozen_base_of_a_text_recipe_drops_nothing_as_published(tmp_path):
    tiny_recipes.write_causal(tmp_path / "gpt2")
    tiny_recipes.write_e2e(tmp_path / "e2e")
    for name in ("nlg/lora/e2e", "nlg/adapter/webnlg", "nlg/lora/dart"):
        recipe = load_recipe(name).changed(
            {"model": str(tmp_path / "gpt2"), "data": str(tmp_path / "e2e"), "data_format": "e2e"}
        )
        model = problems.TextProblem(recipe, Limits()).fresh()
        assert _dropouts(model) == {0.0}
        assert model.config.attn_pdrop == 0.0
        kept = problems.TextProblem(recipe.changed({"model_config": {}}), Limits()).fresh()
        assert _dropouts(kept) == {0.1}


def test_a_setting_of_the_base_reaches_a_classifier_and_one_it_lacks_is_told(tmp_path, caplog):
    recipe = tiny_recipes.tiny_recipe(tmp_path, model_config={"hidden_dropout_prob": 0.25, "resid_pdrop": 0.0})
    model = problems.LabelProblem(recipe, Limits()).fresh()
    assert 0.25 in _dropouts(model)
    assert "has no resid_pdrop, which is left out" in caplog.text
    method = expand_methods(["adamix"], recipe)[0]
    plain = run_identity(recipe.changed({"model_config": {}}), method, 0, Limits())
    assert "model_config" not in plain["recipe"]  # rows of earlier releases are still these runs
    assert run_identity(recipe, method, 0, Limits())["recipe"]["model_config"] == recipe.model_config
