"""One small run of a CSV with its own columns: what it prints, how it ends early, goes on and is read again."""

import json
import random
import re

import pytest
import tiny_text
from tiny_runs import report, run, text

from adamix_kernels import cli, tasks
from adamix_kernels.commands import _baselines, _kinds, train
from adamix_kernels.models.state import adamix_state

RATES = ("--learning_rate", "2e-2", "--head_learning_rate", "5e-2")


def write_reviews(path, rows=60):
    draw = random.Random(0)
    lines = [
        f'"{text(draw, ("bad bad poor", "good good fine")[i % 2], 3)}, was",{("one", "five")[i % 2]}'
        for i in range(rows)
    ]
    path.write_text("\n".join(["review,stars", *lines]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    tiny_text.write_encoder(folder / "encoder")
    data = write_reviews(folder / "own.csv")
    columns = ["--text_column", "review", "--label_column", "stars", "--metrics", "f1", "accuracy"]
    assert run(folder, folder / "encoder", data, *columns, *RATES, "--num_train_epochs", "8") == 0
    return folder


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
