"""What the end of a run says of its score, and what it names."""

import json
import math

import peft
import pytest
import tiny

from adamix_kernels import adapt
from adamix_kernels.commands import _baselines, _fit, _kinds, _report, train
from adamix_kernels.tasks import Run


@pytest.mark.parametrize(
    ("score", "baseline", "told"),
    [
        ({"accuracy": 100.0}, {"accuracy": 100.0}, False),  # nothing is better
        ({"accuracy": 80.0}, {"accuracy": 80.0}, True),
        ({"accuracy": 80.0}, {"accuracy": 79.0}, False),
        ({"rmse": 0.0}, {"rmse": 0.0}, False),
        ({"rmse": 0.5}, {"rmse": 0.4}, True),
        ({"loss": 120.0}, {"loss": 130.0}, False),
        ({"cider": 120.0}, {"cider": 130.0}, True),  # its scale has no end
    ],
)
def test_a_baseline_that_is_not_beaten_is_named(score, baseline, told):
    assert _baselines.not_above(score, _baselines.Baselines({"the other": baseline})) == ["the other"] * told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num_train_epochs", "6"), "6 epochs, 30 updates of 16 texts"),
        (("--max_steps", "7"), "1.4 epochs, 7 updates of 16 texts"),
        (("--num_train_epochs", "4", "--gradient_accumulation_steps", "2"), "4 epochs, 12 updates of 32 texts"),
    ],
)
def test_the_plan_counts_epochs_as_the_trainer_does(flags, words, tmp_path):
    options = train.parse(["--out", str(tmp_path), *flags])
    steps = train._choose(options, tiny.tiny_bert(), "classification", 72, "adapter")
    assert f"training on 72 texts, 8 for dev: {words}" in train._plan(options.arguments, 72, 8, steps)


def test_the_rank_of_a_lora_may_be_called_as_elsewhere(tmp_path):
    assert train.parse(["--out", str(tmp_path), "--lora_r", "8"]).adaptation.r == 8


def test_a_lora_config_is_answered_with_what_makes_one_of_ours():
    with pytest.raises(TypeError, match=r"AdaMixConfig\.from_peft makes one"):
        adapt(tiny.tiny_bert(), peft.LoraConfig(r=8))


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_training_that_diverged_is_told(value, tmp_path, capsys):
    model = adapt(tiny.tiny_bert())
    list(model.parameters())[-1].data.fill_(value)  # the head's, which is trained
    kind = _kinds.LabelKind("classification", ["no", "yes"], None, 16, ("accuracy",))
    run, losses = Run("model", "data", ["no", "yes"], 16), {"loss": 0.2, "cross_entropy": value}
    diverged = not _fit.all_finite(model)
    assert diverged == math.isnan(value)
    outcome = _report.Outcome(model, kind, run, {"accuracy": 50.0}, losses, None, [], 60, diverged)
    _report.tell(outcome, str(tmp_path))
    told = json.loads((tmp_path / _report.REPORT_NAME).read_text(), parse_constant=pytest.fail)
    printed = capsys.readouterr().out
    assert ("WARNING: the training diverged" in printed) == diverged
    assert ("checkpoint: " in printed) != diverged
    assert told.get("diverged", False) == diverged
    assert (told["warning"] is not None) == diverged
    assert told["training"]["cross_entropy"] == (None if diverged else value)
