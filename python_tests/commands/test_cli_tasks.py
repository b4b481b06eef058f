"""One small run each of a CSV with its own columns, a regression and a generation, from train to export."""

import json
import random
import re

import pytest
import tiny_recipes
import tiny_text

from adamix_kernels import cli, tasks
from adamix_kernels.commands import _baselines, _kinds, export, train
from adamix_kernels.models.state import adamix_state

RATES = ("--learning_rate", "2e-2", "--head_learning_rate", "5e-2")
WORDS = ("the", "film", "meal", "was", "a", "an", "story", "very", "not")


def text(draw, first, length):
    return " ".join([first, *(draw.choice(WORDS) for _ in range(length))])


def write_reviews(path, rows=60):
    draw = random.Random(0)
    lines = [
        f'"{text(draw, ("bad bad poor", "good good fine")[i % 2], 3)}, was",{("one", "five")[i % 2]}'
        for i in range(rows)
    ]
    path.write_text("\n".join(["review,stars", *lines]) + "\n")
    return str(path)


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


def run(folder, model, data, *more, out="out"):
    flags = ["--model", str(model), "--data", data, "--out", str(folder / out), "--use_cpu", "--disable_tqdm"]
    return cli.main(["train", *flags, "--per_device_train_batch_size", "8", *more])


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    tiny_text.write_encoder(folder / "encoder")
    data = write_reviews(folder / "own.csv")
    columns = ["--text_column", "review", "--label_column", "stars", "--metrics", "f1", "accuracy"]
    assert run(folder, folder / "encoder", data, *columns, *RATES, "--num_train_epochs", "8") == 0
    return folder


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


def report(folder):
    return json.loads((folder / "out" / "adamix_report.json").read_text())


def test_own_columns_are_read_and_kept(reviews):
    found = tasks.read_run(reviews / "out")
    assert (found.text_column, found.text_pair_column, found.label_column) == ("review", None, "stars")
    assert (found.task, found.label_names, found.pooling) == ("classification", ["five", "one"], "mean")


def test_the_report_sets_the_run_beside_what_is_simpler(reviews):
    values = report(reviews)
    assert list(values["scores"]) == ["f1", "accuracy"]
    assert values["scores"]["accuracy"] == 100  # the first word tells
    assert values["baselines"][_baselines.MAJORITY] == {"f1": 0.0, "accuracy": 50.0}
    assert set(values["baselines"]) == {_baselines.MAJORITY, _baselines.FROZEN}
    assert values["training"]["loss"] > 0
    assert any("no dev part" in note for note in values["notes"])
    assert any("adamix export will refuse" in note for note in values["notes"])


def test_what_a_short_run_prints(reviews, capfd):
    data, more = str(reviews / "own.csv"), ["--text_column", "review", "--label_column", "stars", "--max_steps", "3"]
    assert run(reviews, reviews / "encoder", data, *more, "--learning_rate", "1e-9", out="short run") == 0
    done = capfd.readouterr()
    out = done.out
    assert "note: There is no dev part" in out
    assert "AdaMix adapter, 4 experts" in out
    assert "training loss " in out
    # Also in a run shorter than logging_steps.
    assert re.search(r"^epoch \S+: loss \d.*, cross-entropy \d.*, learning rate ", out, re.M)
    assert re.search(r"^epoch \S+: dev loss \d.*, accuracy 50.00 %$", out, re.M)
    assert re.search(r"^trained in \d+ s, ", out, re.M)
    assert "{'" not in out
    assert "dev accuracy 50.00 % (merged experts, 6 texts)" in out
    assert f"{_baselines.MAJORITY}: accuracy 50.00 %" in out
    assert f"WARNING: AdaMix is not better than: {_baselines.MAJORITY}" in out
    folder = reviews / "short run"
    assert f"adamix predict --run '{folder}' \"some text\"" in out
    assert f"adamix eval '{folder}'" in out
    assert "adamix export" not in out.partition("next:")[2]
    for noise in ("pin_memory", "LOAD REPORT", "MISSING", "newly initialized"):
        assert noise not in out + done.err


def test_rate_epochs_and_warm_up_are_chosen_by_model_and_rows(reviews):
    model, _ = tasks.load(reviews / "out")

    def chosen(*flags):
        options = train.parse(["--use_cpu", *flags])
        return train._choose(options, model, "classification", 1000, options.adaptation.method), options.arguments

    steps, arguments = chosen()
    assert (steps, arguments.num_train_epochs, arguments.learning_rate) == (630, 10.0, 3e-3)
    assert (arguments.warmup_steps, arguments.logging_steps) == (38, 20)
    model.config.hidden_size = 768
    assert chosen("--method", "lora")[1].learning_rate == 5e-4
    model.config.hidden_size = 16
    steps, arguments = chosen("--learning_rate", "1e-3", "--num_train_epochs", "2", "--warmup_steps", "0")
    assert (steps, arguments.learning_rate, arguments.warmup_steps) == (126, 1e-3, 0)
    steps, arguments = chosen("--max_steps", "8", "--gradient_accumulation_steps", "4")
    assert (steps, arguments.warmup_steps, arguments.logging_steps) == (8, 1, 2)
    assert chosen("--gradient_accumulation_steps", "4")[0] == 608  # 63 batches are 16 updates, of 38 epochs


def test_eval_gives_the_scores_of_training_on_the_same_rows(reviews, capsys):
    assert cli.main(["eval", str(reviews / "out"), "--metrics", "f1", "matthews", "--json", "--disable-tqdm"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["f1"] == pytest.approx(report(reviews)["scores"]["f1"])
    assert values["rows"] == report(reviews)["dev_rows"]
    assert "matthews" in values


def test_eval_of_another_file_takes_every_row_of_it(reviews, tmp_path, capsys):
    data = write_reviews(tmp_path / "more.csv", 10)
    columns = ["--text_column", "review", "--label_column", "stars", "--json"]
    assert cli.main(["eval", str(reviews / "out"), "--data", data, *columns]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 10
    (tmp_path / "odd.csv").write_text("review,stars\ngood,six\n")
    assert cli.main(["eval", str(reviews / "out"), "--data", str(tmp_path / "odd.csv"), *columns]) == 2
    assert "line 2, column 'stars': got 'six'" in capsys.readouterr().err


def test_a_checkpoint_of_the_trainer_is_a_run(reviews, capsys):
    last = max((reviews / "out").glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    assert cli.main(["predict", "--run", str(last), "good story"]) == 0
    assert capsys.readouterr().out.startswith("five\t")


def test_a_head_that_no_format_can_say_is_refused(reviews, tmp_path, capsys):
    assert cli.main(["export", str(reviews / "out"), "--out", str(tmp_path / "no")]) == 2
    assert "train with --pooling model" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


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


def test_early_stopping_ends_and_keeps_the_best(reviews, capsys):
    more = ["--text_column", "review", "--label_column", "stars", "--learning_rate", "1e-9", "--early_stopping", "1"]
    assert run(reviews, reviews / "encoder", str(reviews / "own.csv"), *more, "--num_train_epochs", "9", out="s") == 0
    state = json.loads((reviews / "s" / "checkpoint-14" / "trainer_state.json").read_text())
    assert state["epoch"] == 2  # the second is no better than the first
    assert state["best_model_checkpoint"].endswith("checkpoint-7")


def test_a_sample_of_the_training_rows_is_drawn_by_the_seed(reviews, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(_kinds.LabelKind, "encode", lambda self, split: seen.append(split.texts) or stop())
    more = ["--text_column", "review", "--label_column", "stars", "--max_train_rows", "10"]

    def stop():
        raise ValueError("seen")

    for seed in ("1", "1", "2"):
        assert run(reviews, reviews / "encoder", str(reviews / "own.csv"), *more, "--seed", seed, out="x") == 2
    assert len(seen[0]) == 10
    assert seen[0] == seen[1] != seen[2]


def test_texts_are_cut_at_what_the_model_takes(reviews, capsys):
    data = reviews / "long.csv"
    long = " ".join(["good"] * 90)
    data.write_text("\n".join(["text,label", *(f"{long} {i},{i % 2}" for i in range(30))]) + "\n")
    assert run(reviews, reviews / "encoder", str(data), "--max_steps", "1", out="long") == 0
    assert "note: texts are cut at 32 tokens" in capsys.readouterr().out
    assert tasks.read_run(reviews / "long").max_tokens == 32
    assert cli.main(["predict", "--run", str(reviews / "long"), long]) == 0
    model, tokenizer = tasks.load(reviews / "out")
    model.config.model_type, model.config.pad_token_id = "roberta", 1
    assert _kinds.longest_text(model, tokenizer) == 30


def test_a_long_context_leaves_room_for_the_text(written, capsys):
    assert cli.main(["predict", "--run", str(written / "out"), "blue " * 300, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generated"] is not None
    assert cli.main(["predict", "--run", str(written / "out"), "blue", "--max_new_tokens", "128"]) == 2
    assert "max_new_tokens: got 128, expected less than the 128 tokens of a text" in capsys.readouterr().err


def test_metrics_are_checked_before_anything_is_loaded(reviews, capsys):
    data, more = str(reviews / "own.csv"), ["--text_column", "review", "--label_column", "stars"]
    assert run(reviews, "./nowhere", data, *more, "--metrics", "bleu", out="x") == 2
    assert "metrics: got 'bleu' for classification, expected some of accuracy, f1, matthews" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(reviews, capsys):
    assert run(reviews, reviews / "encoder", str(reviews / "own.csv"), "--text_column", "review") == 2
    assert "expected --resume, or another folder" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(reviews, capsys, monkeypatch):
    from transformers import Trainer

    step = Trainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    more = ["--text_column", "review", "--label_column", "stars", "--num_train_epochs", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", stop)
        assert run(reviews, reviews / "encoder", str(reviews / "own.csv"), *more, out="c") == 130
    message = "interrupted: checkpoint-7 is saved; the same command with --resume goes on\n"
    assert capsys.readouterr().err.endswith(message)
    last = reviews / "c" / "checkpoint-7"
    assert cli.main(["predict", "--run", str(last.parent), "good story"]) == 2
    assert (
        f"expected the same adamix train with --resume first, or its last checkpoint, {last}" in capsys.readouterr().err
    )
    assert cli.main(["predict", "--run", str(last), "good story"]) == 0
    assert run(reviews, reviews / "encoder", str(reviews / "own.csv"), *more, "--resume", out="c") == 0
    assert run(reviews, reviews / "encoder", str(reviews / "own.csv"), *more, out="w") == 0
    digests = [json.loads((reviews / o / "adamix_checkpoint.json").read_text())["tensors"]["sha256"] for o in "cw"]
    assert digests[0] == digests[1]


def test_the_head_has_its_own_learning_rate(reviews):
    from adamix_kernels.commands._fit import HeadRateTrainer

    model, _ = tasks.load(reviews / "out")
    arguments = train.parse(
        ["--use_cpu", "--out", str(reviews / "h"), "--learning_rate", "1e-3", "--eval_strategy", "no"]
    ).arguments
    trainer = HeadRateTrainer(model, arguments, head_learning_rate=5e-2)
    trainer.create_optimizer()
    head = {id(p) for path in adamix_state(model).saved for p in model.get_submodule(path).parameters()}
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert set(rates) == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(rate == (5e-2 if key in head else 1e-3) for key, rate in rates.items())


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
