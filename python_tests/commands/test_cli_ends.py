"""How a training ends that is interrupted, whose numbers are not finite, or to which nobody listens."""

import os

import pytest
import tiny_runs
import tiny_text

from adamix_kernels import cli
from adamix_kernels.commands import _report, train
from adamix_kernels.models.trainer import AdaMixTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    tiny_text.write_encoder(folder / "encoder")
    tiny_text.write_data(folder / "data")
    return folder


def _train(place, out, *more):
    return tiny_runs.run(
        place, place / "encoder", str(place / "data"), "--max_steps", "2", "--no_baselines", *more, out=out
    )


@pytest.mark.parametrize(
    ("flag", "value", "wanted"),
    [
        ("learning_rate", "nan", "a finite number above 0"),
        ("learning_rate", "inf", "a finite number above 0"),
        ("learning_rate", "0", "a finite number above 0"),
        ("head_learning_rate", "nan", "a finite number, at least 0"),
        ("weight_decay", "inf", "a finite number, at least 0"),
        ("max_grad_norm", "-1", "at least 0"),
        ("adam_epsilon", "0", "a finite number above 0"),
        ("num_train_epochs", "inf", "more than 0, or --max_steps"),
        ("num_train_epochs", "nan", "more than 0, or --max_steps"),
        ("alpha", "nan", ""),
        ("lora_dropout", "nan", ""),
        ("consistency_weight", "nan", ""),
        ("balance_weight", "nan", ""),
        ("z_weight", "inf", ""),
        ("dev_fraction", "nan", ""),
    ],
)
def test_a_number_that_is_none_is_refused_by_its_flag_at_once(flag, value, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "resolve_model", lambda *_: pytest.fail("it was loaded"))
    assert cli.main(["train", f"--{flag}", value, "--out", str(tmp_path / "out"), "--use_cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"adamix train: {flag}: got ")
    assert error.endswith(f"expected {wanted}\n" if wanted else "\n")
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_is_no_run(place, capsys):
    assert _train(place, "nan", "--learning_rate", "1e30", "--max_steps", "4") == 1
    printed = capsys.readouterr()
    assert "WARNING: the training diverged" in printed.out
    assert "adamix predict" not in printed.out
    assert printed.err.endswith(f"adamix train: the training diverged, and {place / 'nan'} holds no run\n")
    assert not (place / "nan" / "adamix_checkpoint.json").exists()
    assert cli.main(["predict", "--run", str(place / "nan"), "good film"]) == 2
    assert "whose training diverged and was not saved, expected one with a lower" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "more", "message"),
    [
        ("evaluate", [], "checkpoint-2 is saved; the same command with --resume goes on"),
        ("evaluate", ["--save_strategy", "no"], "nothing is saved; the same command begins anew"),
        ("tell", [], "holds the trained run, without its report; adamix eval tells its score"),
    ],
)
def test_ctrl_c_after_the_training_says_what_is_there(where, more, message, place, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    out = f"stopped_{where}{len(more)}"
    with monkeypatch.context() as patch:
        if where == "evaluate":  # not that of an epoch's end
            more = [*more, "--eval_strategy", "no"]
            patch.setattr(AdaMixTrainer, "evaluate", stop)
        else:
            patch.setattr(_report, "tell", stop)
        assert _train(place, out, *more) == 130
    assert capsys.readouterr().err.endswith(f"{message}\n")
    command = ["eval", str(place / out)] if where == "tell" else None
    resume = [] if "no" in more and "--save_strategy" in more else ["--resume"]
    assert (cli.main(command) if command else _train(place, out, *more, *resume)) == 0


@pytest.mark.parametrize("both", [False, True])
def test_a_training_goes_on_without_a_reader(both, place, monkeypatch, capsys):
    streams = []
    for name in ("stdout", "stderr")[: 1 + both]:
        read, write = os.pipe()
        os.close(read)
        streams.append(os.fdopen(write, "w"))
        monkeypatch.setattr(f"sys.{name}", streams[-1])
    assert _train(place, f"unread{both}") == 0
    monkeypatch.undo()
    for stream in streams:
        stream.close()  # what was left in it finds no reader either
    assert (place / f"unread{both}" / "adamix_report.json").is_file()
    if not both:
        assert capsys.readouterr().err.count("adamix train: nobody reads its output any more; it goes on\n") == 1


def test_a_pipe_that_is_not_of_the_output_is_an_error(monkeypatch, capsys):
    def broken(_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(train, "main", broken)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "adamix train: [Errno 32] Broken pipe\n"
