"""A regression and a generation, from train to export, and what may be exported."""

import json
import random

import pytest
import tiny_recipes
import tiny_text
import transformers
from tiny_runs import report, run, text

from adamix_kernels import cli, tasks
from adamix_kernels.commands import _baselines, _kinds, export


def write_pairs(path, rows=60):
    """Numbers around 3: what is far from zero must be learnt, too."""
    draw = random.Random(1)
    lines = []
    for i in range(rows):
        score = 3 + i % 2 + 0.5 * (i % 3 == 0)
        lines.append(f"{text(draw, ('bad', 'good')[i % 2], 4)}\t{text(draw, ('fine', 'poor')[i % 3 == 0], 4)}\t{score}")
    path.write_text("\n".join(["left\tright\tvalue", *lines]) + "\n")
    return str(path)


def write_prompts(path):
    lines = []
    for name in ("blue", "red"):
        for area in ("north", "south"):
            for food in ("food", "place", "is", "in", "and", "a"):
                row = {"prompt": f"name : {name} | area : {area} | food : {food}", "completion": f"the {name} place ."}
                lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    tiny_text.write_encoder(folder / "encoder")
    data = write_pairs(folder / "pairs.tsv")
    columns = ["--text_column", "left", "--text_pair_column", "right", "--label_column", "value"]
    more = ["--method", "lora", "--pooling", "model", "--num_train_epochs", "2"]
    assert run(folder, folder / "encoder", data, *columns, *more) == 0
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    tiny_recipes.write_causal(folder / "gpt")
    data = write_prompts(folder / "prompts.jsonl")
    more = ["--task", "generation", "--method", "lora", "--learning_rate", "1e-2", "--num_train_epochs", "3"]
    assert run(folder, folder / "gpt", data, *more, "--metrics", "bleu", "--max_new_tokens", "6", "--beams", "2") == 0
    return folder


def test_regression_from_train_to_export(numbers, tmp_path, capsys):
    values = report(numbers)
    assert values["task"] == "regression"
    assert list(values["scores"]) == ["pearson", "spearman", "rmse"]
    assert set(values["baselines"]) == {_baselines.MEAN, _baselines.FROZEN}
    assert set(values["baselines"][_baselines.MEAN]) == {"rmse"}
    assert values["scores"]["rmse"] < 1  # and not 3 and a half: the head starts at the mean
    out = str(numbers / "out")
    assert cli.main(["predict", "--run", out, "good film", "--pair", "fine meal", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["text"], row["pair"]) == ("good film", "fine meal")
    assert 2 < row["score"] < 5
    assert cli.main(["predict", "--run", out, "good film"]) == 2
    assert "the run was trained on pairs" in capsys.readouterr().err
    assert cli.main(["eval", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rmse"] == pytest.approx(values["scores"]["rmse"], rel=1e-4)
    assert cli.main(["merge", out, "--out", str(tmp_path / "merged")]) == 0
    assert cli.main(["export", str(tmp_path / "merged"), "--out", str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "SEQ_CLS")
    for path in (tmp_path / "peft").glob("*.[jm][sd]*"):
        assert str(numbers) not in path.read_text()


def test_a_dev_part_too_small_for_a_correlation(numbers, capsys):
    lines = (numbers / "pairs.tsv").read_text().splitlines()[:13]
    (numbers / "few.tsv").write_text("\n".join(lines) + "\n")
    columns = ["--text_column", "left", "--text_pair_column", "right", "--label_column", "value"]
    more = ["--num_train_epochs", "2", "--load_best_model_at_end", "--no_baselines"]
    assert run(numbers, numbers / "encoder", str(numbers / "few.tsv"), *columns, *more, out="few") == 0
    out = capsys.readouterr().out
    assert "(merged experts, 1 text)\n  pearson, spearman: no score on these texts; adamix eval says why\n" in out
    values = json.loads((numbers / "few" / "adamix_report.json").read_text())
    assert list(values["scores"]) == ["rmse"]
    assert cli.main(["eval", str(numbers / "few"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rmse"] == pytest.approx(values["scores"]["rmse"], rel=1e-4)
    assert "not defined" in found["missing"]["pearson"]


def test_generation_from_train_to_export(written, tmp_path, capsys):
    values = report(written)
    assert values["task"] == "generation"
    assert set(values["scores"]) == {"loss", "bleu"}
    assert values["scores"]["loss"] < values["baselines"][_baselines.UNADAPTED]["loss"]
    assert values["warning"] is None
    out = str(written / "out")
    found = tasks.read_run(out)
    assert (found.task, found.generation) == ("generation", {"max_new_tokens": 6, "beams": 2})
    assert (found.text_column, found.label_column) == ("prompt", "completion")
    assert cli.main(["eval", out, "--metrics", "bleu", "--json", "--disable_tqdm"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["loss"], again["bleu"]) == pytest.approx((values["scores"]["loss"], values["scores"]["bleu"]))
    assert cli.main(["predict", "--run", out, "--json", "name : blue"]) == 0
    assert len(json.loads(capsys.readouterr().out)["generated"].split()) <= 6
    assert cli.main(["predict", "--run", out, "--file", str(written / "prompts.jsonl"), "--max_new_tokens", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 24
    assert all(len(line.partition("\t")[0].split()) <= 1 for line in lines)
    assert cli.main(["merge", out, "--out", str(tmp_path / "merged")]) == 0
    assert cli.main(["eval", str(tmp_path / "merged"), "--json", "--disable_tqdm"]) == 0
    merged = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert merged["loss"] == pytest.approx(values["scores"]["loss"], rel=1e-4)
    assert cli.main(["export", out, "--out", str(tmp_path / "peft")]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_a_long_context_leaves_room_for_the_text(written, capsys):
    assert cli.main(["predict", "--run", str(written / "out"), "blue " * 300, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generated"] is not None
    assert cli.main(["predict", "--run", str(written / "out"), "blue", "--max_new_tokens", "128"]) == 2
    assert "max_new_tokens: got 128, expected less than the 128 tokens of a text" in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "new"), [(20, 10), (64, 32), (128, 64)])
def test_the_tokens_of_a_generated_text_fit_by_default(tokens, new, tmp_path):
    tiny_recipes.write_causal(tmp_path / "gpt")
    data = write_prompts(tmp_path / "prompts.jsonl")
    more = ["--task", "generation", "--method", "lora", "--max_steps", "1", "--max_tokens", str(tokens)]
    assert run(tmp_path, tmp_path / "gpt", data, *more) == 0
    assert tasks.read_run(tmp_path / "out").generation["max_new_tokens"] == new


@pytest.mark.parametrize("reads_on", [True, False])
def test_an_encoder_that_sees_its_answers_is_not_trained_to_write(reads_on, tmp_path, capsys):
    folder = tiny_recipes.write_causal(tmp_path / "bert")  # whose tokenizer has an end of the text
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=0,
        is_decoder=not reads_on,
    )  # fmt: skip
    transformers.BertLMHeadModel(config).save_pretrained(folder)
    data = write_prompts(tmp_path / "prompts.jsonl")
    more = ["--task", "generation", "--max_steps", "1", "--max_tokens", "20", "--no_baselines"]
    status = run(tmp_path, folder, data, *more)
    told = capsys.readouterr()
    assert status == (2 if reads_on else 0)
    assert ("training on" in told.out) != reads_on
    assert (f"model: got '{folder}' (BertLMHeadModel), which sees the tokens behind each one" in told.err) == reads_on


def test_which_runs_can_be_exported(numbers):
    model, _ = tasks.load(numbers / "out")
    found = tasks.read_run(numbers / "out")
    assert export.problem(model, found, "lora") is None
    assert export.problem(model, found, "adapter") is None
    model.config.model_type = "gpt2"
    assert "BERT and RoBERTa" in export.problem(model, found, "adapter")


def test_a_missing_library_is_told_where_it_is_asked_for_alone(monkeypatch):
    from adamix_kernels.recipes import metrics

    def missing(*_args, **_options):
        raise ModuleNotFoundError("No module named 'scipy.stats'", name="scipy.stats")

    for name in ("pearson", "spearman"):
        monkeypatch.setitem(metrics._LABELS, name, missing)
    with pytest.raises(ValueError, match="metrics: got 'spearman', which needs scipy"):
        _kinds.checked_metrics("regression", ["spearman"])
    assert _kinds.checked_metrics("regression", []) == ("rmse",)
    kind = _kinds.make_kind("regression", ["score"], None, 8)
    assert kind.scores([1.0, 3.0], [1.0, 1.0]).values == {"rmse": 2**0.5}
    assert _kinds.checked_metrics("classification", ["f1,accuracy", "matthews"]) == ("f1", "accuracy", "matthews")
