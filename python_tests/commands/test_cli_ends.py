"""How a training ends that is interrupted, whose numbers are not finite, or to which nobody listens."""

import errno
import io
import os
import shutil
import sys

import pytest
import tiny_runs
import tiny_text

from adamix_kernels import cli
from adamix_kernels.commands import _fit, _pipes, _report, train
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
        ("learning_rate", "nan", "a finite number, at least 0"),
        ("learning_rate", "inf", "a finite number, at least 0"),
        ("learning_rate", "-1", "at least 0"),
        ("head_learning_rate", "nan", "a finite number, at least 0"),
        ("weight_decay", "inf", "a finite number, at least 0"),
        ("max_grad_norm", "-1", "at least 0"),
        ("max_grad_norm", "nan", "a finite number, at least 0"),
        ("adam_epsilon", "nan", "a finite number, at least 0"),
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


def test_numbers_that_torch_takes_are_taken(place):
    numbers = ["--learning_rate", "0", "--adam_epsilon", "0", "--max_grad_norm", "inf"]
    assert train.parse([*numbers, "--out", str(place / "zero"), "--use_cpu"]).arguments.max_grad_norm == float("inf")


def test_a_training_that_diverges_is_no_run(place, capsys):
    assert _train(place, "nan", "--learning_rate", "1e30", "--max_steps", "4") == 1
    printed = capsys.readouterr()
    assert "WARNING: the training diverged" in printed.out
    assert "adamix predict" not in printed.out
    assert printed.err.endswith(f"adamix train: the training diverged, and {place / 'nan'} holds no run\n")
    assert not (place / "nan" / "adamix_checkpoint.json").exists()
    assert cli.main(["predict", "--run", str(place / "nan"), "good film"]) == 2
    assert "whose training diverged and was not saved, expected one with a lower" in capsys.readouterr().err


def test_a_finished_run_whose_resumed_training_diverges_is_as_it_was(place, monkeypatch, capsys):
    assert _train(place, "before", "--max_steps", "4", "--save_steps", "2", "--save_strategy", "steps") == 0
    shutil.rmtree(place / "before" / "checkpoint-4")
    kept = (place / "before" / "adamix_checkpoint.json").read_bytes()
    monkeypatch.setattr(_fit, "all_finite", lambda _: False)
    more = ["--max_steps", "4", "--save_steps", "2", "--save_strategy", "steps", "--resume"]
    assert _train(place, "before", *more) == 1
    assert capsys.readouterr().err.endswith(f"diverged, and {place / 'before'} holds the run as it was before\n")
    assert (place / "before" / "adamix_checkpoint.json").read_bytes() == kept


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


def test_a_command_without_an_output_works(monkeypatch, capsys):
    def says(_):
        print("something")
        return 3

    monkeypatch.setattr(train, "main", says)
    assert cli.main(["train"]) == 3
    assert capsys.readouterr().out == "something\n"
    monkeypatch.setattr("sys.stdout", None)
    assert cli.main(["train"]) == 3


def test_a_pipe_that_is_not_of_the_output_is_an_error(monkeypatch, capsys):
    def broken(_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(train, "main", broken)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "adamix train: [Errno 32] Broken pipe\n"


class Refusing(io.StringIO):
    """A stream without a file, whose every write fails."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, _):
        raise self.error

    def flush(self):
        raise self.error


def test_a_closed_pipe_without_a_file_is_one(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", Refusing(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    with _pipes.outlives_its_reader("adamix train"):
        print("something")
    assert capsys.readouterr().err == "adamix train: nobody reads its output any more; it goes on\n"


def test_windows_calls_a_closed_pipe_an_invalid_argument(monkeypatch):
    errors = OSError(errno.EINVAL, "Invalid argument"), OSError(errno.EINVAL, "Invalid argument", "a?b")
    found = []
    for system in ("posix", "nt"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "name", system)
            found += [_pipes.is_closed_pipe(error) for error in errors]
    assert found == [False, False, True, False]


def test_a_full_disk_leaves_the_streams_as_they_were(monkeypatch):
    full, errors = Refusing(OSError(errno.ENOSPC, "No space left on device")), io.StringIO()
    monkeypatch.setattr("sys.stdout", full)
    monkeypatch.setattr("sys.stderr", errors)
    with pytest.raises(OSError, match="No space left"), _pipes.outlives_its_reader("adamix train"):
        pass
    assert sys.stdout is full
    assert sys.stderr is errors


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["train", "predict"])
def test_an_output_that_cannot_be_written_is_one_error(command, monkeypatch, capsys):
    stream = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    monkeypatch.setattr(f"adamix_kernels.commands.{command}.main", lambda _: print("something", file=stream) or 0)
    monkeypatch.setattr("sys.stdout", stream)
    assert cli.main([command]) == 2
    stream.close()  # as Python does at its end, which fails no second time
    assert capsys.readouterr().err == f"adamix {command}: [Errno 28] No space left on device\n"


def test_a_reader_that_goes_before_the_last_line_is_no_error(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    monkeypatch.setattr("adamix_kernels.commands.predict.main", lambda _: print("something", file=stream) or 0)
    monkeypatch.setattr("sys.stdout", stream)
    assert cli.main(["predict"]) == 0
    stream.close()
