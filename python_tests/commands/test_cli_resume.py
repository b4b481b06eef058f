"""adamix train --resume goes on with what was begun, or says what is another."""

import csv
import json
import shutil

import pytest
import tiny_runs
import tiny_text

from adamix_kernels import cli
from adamix_kernels.commands import _begun


def _write(path, labels, rows=24):
    with open(path, "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["text", "label", "more"])
        for i in range(rows):
            text = f"{('good', 'bad')[i % 2]} {' '.join(tiny_text.WORDS[4 : 6 + i % 5])}"
            lines.writerow([text, labels[i % 2], f"{text} again"])
    return str(path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A finished run of two epochs in `out`."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_text.write_encoder(folder / "encoder")
    _write(folder / "own.csv", ("pos", "neg"))
    _write(folder / "other.csv", ("yes", "no"))
    shutil.copytree(folder / "encoder", folder / "copy")
    assert _train(folder) == 0
    return folder


def _train(folder, *more, data="own.csv", model="encoder", out="out"):
    flags = ["--num_train_epochs", "2", "--no_baselines", *more]
    return tiny_runs.run(folder, folder / model, str(folder / data), *flags, out=out)


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _old(folder, name):
    """As a release left it that wrote no file of what a run was begun with."""
    shutil.copytree(folder / "out", folder / name)
    (folder / name / _begun.BEGUN_NAME).unlink()
    return name


@pytest.mark.parametrize("release", ["this", "older"])
def test_other_data_are_refused_before_anything_is_written(begun, release, capsys):
    out = "out" if release == "this" else _old(begun, "older_data")
    before = _files(begun / out)
    assert _train(begun, "--resume", data="other.csv", out=out) == 2
    error = capsys.readouterr().err
    assert f"resume: the training in {str(begun / out)!r} was begun with --data {begun / 'own.csv'} and " in error
    assert f"got --data {begun / 'other.csv'} and labels no, yes, expected the same command, or another --out" in error
    flags = ["--out", str(begun / out), "--use_cpu", "--disable_tqdm"]
    assert cli.main(["train", "--resume", "--no_baselines", *flags]) == 2  # the defaults of model and data
    assert f"was begun with --model {begun / 'encoder'} and --data {begun / 'own.csv'}" in capsys.readouterr().err
    assert _files(begun / out) == before


@pytest.mark.parametrize(
    ("flags", "was", "now"),
    [
        (["--seed", "7"], "--seed 42", "--seed 7"),
        (["--learning_rate", "0.5"], "--learning_rate 0.", "--learning_rate 0.5"),
        (["--max_train_rows", "9"], "--max_train_rows 0", "--max_train_rows 9"),
        (["--num_experts", "2"], "--num_experts 4", "--num_experts 2"),
        (["--method", "lora", "--target_modules", "query"], "--method adapter", "--method lora"),
        (["--max_tokens", "16"], "--max_tokens 32", "--max_tokens 16"),
        (["--text_column", "more"], "--text_column text", "--text_column more"),
    ],
)
def test_other_settings_are_refused(begun, flags, was, now, capsys):
    before = _files(begun / "out")
    assert _train(begun, "--resume", *flags) == 2
    error = capsys.readouterr().err
    assert f"was begun with {was}" in error or f" and {was}" in error
    assert f"got {now}" in error or f" and {now}" in error
    assert _files(begun / "out") == before


def test_rows_that_changed_in_their_file_are_refused(begun, capsys):
    shutil.copytree(begun / "out", begun / "changed")
    text = (begun / "own.csv").read_text()
    try:
        (begun / "own.csv").write_text(text + "good film,neg,\n")
        assert _train(begun, "--resume", out="changed") == 2
    finally:
        (begun / "own.csv").write_text(text)
    message = f"was begun with other rows of --data {begun / 'own.csv'}, got those that are there now"
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_run_does_not_go_on_in_this_one(begun, capsys):
    assert _train(begun, data="other.csv", out="second") == 0
    last = str(max((begun / "second").glob("checkpoint-*")))
    before = _files(begun / "out")
    assert _train(begun, "--resume", last, data="other.csv") == 2  # --out is the first run's
    assert f"the training in {str(begun / 'out')!r} was begun with --data" in capsys.readouterr().err
    assert _train(begun, "--resume", last, out="third") == 2  # the checkpoint is the second run's
    assert f"the training in {str(begun / 'second')!r} was begun with --data" in capsys.readouterr().err
    assert _files(begun / "out") == before


@pytest.mark.parametrize("release", ["this", "older"])
def test_copies_of_data_and_model_go_on_to_the_same_bits(begun, release, capsys):
    out = f"moved_{release}"
    shutil.copytree(begun / "out", begun / out)
    shutil.copy(begun / "own.csv", begun / f"{release}.csv")
    for name in ("adamix_checkpoint.json", f"checkpoint-{_last(begun / out)}"):
        path = begun / out / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    data, model = (f"{release}.csv", "copy") if release == "this" else ("own.csv", "encoder")
    if release == "older":
        (begun / out / _begun.BEGUN_NAME).unlink()
    assert _train(begun, "--resume", data=data, model=model, out=out) == 0
    assert "was begun with" not in capsys.readouterr().out
    digests = [
        json.loads((begun / o / "adamix_checkpoint.json").read_text())["tensors"]["sha256"] for o in ("out", out)
    ]
    assert digests[0] == digests[1]


def _last(folder):
    return max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def test_more_epochs_go_on_with_a_word(begun, capsys):
    shutil.copytree(begun / "out", begun / "more")
    assert _train(begun, "--resume", "--num_train_epochs", "3", out="more") == 0
    out = capsys.readouterr().out
    assert "note: the training was begun with --num_train_epochs 2.0, and goes on with --num_train_epochs 3.0: " in out
    assert _train(begun, "--resume", "--num_train_epochs", "3", out="more") == 0
    assert "was begun with" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset", "mola", "--target_modules", "query,value"],
        ["--method", "lora", "--layers_to_transform", "0", "--modules_to_save", "classifier"],
    ],
)
def test_the_same_command_goes_on_whatever_the_layers(begun, flags, tmp_path):
    assert _train(begun, *flags, out=str(tmp_path)) == 0
    assert _train(begun, *flags, "--resume", out=str(tmp_path)) == 0


def test_a_run_that_was_begun_is_told_from_a_damaged_file(begun, capsys):
    shutil.copytree(begun / "out", begun / "damaged")
    path = begun / "damaged" / _begun.BEGUN_NAME
    path.write_text(path.read_text().replace('"seed": 42', '"seed": 43'))
    assert _train(begun, "--resume", out="damaged") == 2
    assert "it is corrupt, or was edited" in capsys.readouterr().err
