"""The lines of a training, out of a Trainer's logs."""

from types import SimpleNamespace

import pytest

from adamix_kernels.commands._lines import MOST, Lines


def told(strategy, evaluations, all_of_them, capsys):
    """The lines about so many evaluations, ten steps apart, and one after the end."""
    lines = Lines(lambda logs: {"accuracy": 100 * logs["eval_accuracy"]}, all_of_them)
    args = SimpleNamespace(eval_strategy=strategy)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=10 * evaluations, eval_steps=10, global_step=0)
    state.num_train_epochs = evaluations
    for epoch in range(1, evaluations + 1):
        state.global_step = 10 * epoch
        lines.on_log(args, state, None, {"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_runtime": 1.0, "epoch": epoch})
    lines.on_train_end()
    lines.on_log(args, state, None, {"eval_loss": 0.5, "eval_accuracy": 0.75, "epoch": evaluations})
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
@pytest.mark.parametrize("evaluations", [1, MOST, 3 * MOST, 3 * MOST + 1, 1000])
def test_many_evaluations_are_told_in_few_lines_the_last_one_too(strategy, evaluations, capsys):
    lines = told(strategy, evaluations, False, capsys)
    assert min(evaluations, MOST // 2) <= len(lines) <= MOST + 1
    assert lines[-1] == f"epoch {evaluations}: dev loss 0.5000, accuracy 75.00 %"


def test_all_are_told_where_their_number_was_asked_for(capsys):
    assert len(told("steps", 3 * MOST, True, capsys)) == 3 * MOST


def test_other_processes_and_empty_logs_say_nothing(capsys):
    lines = Lines(lambda logs: {}, True)
    lines.on_log(None, SimpleNamespace(is_world_process_zero=False), None, {"loss": 1.0})
    lines.on_log(None, SimpleNamespace(is_world_process_zero=True), None, {})
    assert capsys.readouterr().out == ""
