"""Where commands write: told before any work, by one command at a time, and what a start finds after a cut-off one."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from adamix_kernels import AdaMixConfig, adapt, cli, recipes
from adamix_kernels.commands import _fit
from adamix_kernels.commands._folder import alone_in, kept
from adamix_kernels.commands._kinds import LabelKind
from adamix_kernels.commands._predictions import Lines
from adamix_kernels.models.hub import PACKAGED
from adamix_kernels.recipes import processes
from adamix_kernels.tasks import (
    DEFAULT_MODEL,
    EMBEDDED,
    InputRow,
    Run,
    load_classifier,
    read_run,
    resolve_model,
    write_run,
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--results", "folder"], "results: got 'folder', a folder, expected a file in it"),
        (["--results", "file/rows.jsonl"], "file' is a file, expected a folder or a new name"),
        (["--results", "new/rows.jsonl", "--reports", "file"], "reports: got 'file', but "),
    ],
)
def test_a_recipe_tells_before_it_trains_what_cannot_be_written(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(recipes, "run_recipe", lambda *_, **__: pytest.fail("it trains"))
    assert cli.main(["recipe", "run", "evidence/minilm", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ['{"a": 1}\n', '{"key": "a"}\n'])
def test_a_report_of_other_rows_is_refused_by_the_file_s_name(text, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(text)
    assert cli.main(["recipe", "report", str(tmp_path / "rows.jsonl")]) == 2
    assert "rows.jsonl has a line of another kind, expected rows of adamix recipe run" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["merge", "run"], ["export", "run"], ["pack", "a=run"]])
def test_a_folder_that_another_command_writes_to_is_refused(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with alone_in("out"):
        assert cli.main([*command, "--out", "out"]) == 2
    assert "out: got 'out', to which another command is writing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*command, "--out", "out"]) == 2
    assert "no such folder, expected one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing was written to it


def test_a_link_to_nothing_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="a link that leads nowhere"), kept(str(tmp_path / "link")):
        pass


def _one_more(lines, row, answer):
    assert lines.wants([row, row])
    lines.write([row, row], [answer, answer])


def test_two_predictions_do_not_share_a_file(tmp_path):
    path = str(tmp_path / "out.jsonl")
    row, answer = InputRow("a", None, "line 1"), {"label": "b"}
    with Lines(path) as first, Lines(path) as late:
        assert first.wants([row])
        first.write([row], [answer])
        with pytest.raises(ValueError, match="is there already"):
            late.write([row], [answer])
        for other in (Lines(path, resume=True), Lines(path, overwrite=True)):
            with other, pytest.raises(ValueError, match="another adamix predict is writing"):
                _one_more(other, row, answer)
    assert (tmp_path / "out.jsonl").read_text() == '{"text": "a", "label": "b"}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_told_with_the_file_s_name(tmp_path):
    (tmp_path / "out.jsonl").symlink_to("/dev/full")
    row, answer = InputRow("a", None, "line 1"), {"label": "b"}
    told = pytest.raises(OSError, match=r"No space left on device: '.*out\.jsonl'")
    with told, Lines(str(tmp_path / "out.jsonl"), overwrite=True) as full:
        _one_more(full, row, answer)


def test_names_of_packages_are_no_folders_that_are_called_so(tmp_path, monkeypatch):
    assert set(PACKAGED) == {DEFAULT_MODEL, EMBEDDED}
    monkeypatch.chdir(tmp_path)
    for name in (DEFAULT_MODEL, EMBEDDED, "own"):
        (tmp_path / name).mkdir()
    write_run(EMBEDDED, Run(DEFAULT_MODEL, EMBEDDED, ["a", "b"], 16))
    found = read_run(EMBEDDED)
    assert (found.model, found.data) == (DEFAULT_MODEL, EMBEDDED)
    write_run("own", Run(f"./{DEFAULT_MODEL}", "own", ["a", "b"], 16))
    found = read_run("own")
    assert (found.model, found.data) == (str(tmp_path / DEFAULT_MODEL), str(tmp_path / "own"))


def test_a_first_save_that_was_cut_off_is_no_dead_end(tmp_path, caplog):
    arguments = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="expected --resume, or another folder"):
        _fit.checkpoint_of("", arguments)
    with pytest.raises(ValueError, match="no checkpoint to go on from that is whole, expected one"):
        _fit.checkpoint_of(_fit.LAST, arguments)  # not of adamix train: it may be worth something
    write_run(tmp_path, Run("model", "data", ["a", "b"], 16))
    assert _fit.checkpoint_of(_fit.LAST, arguments) is None
    assert "first save of a checkpoint was interrupted: training from the beginning" in caplog.text
    (tmp_path / "checkpoint-2" / "adamix_files.json").write_text("damaged")
    with pytest.raises(ValueError, match="no checkpoint to go on from that is whole"):
        _fit.checkpoint_of(_fit.LAST, arguments)


@pytest.mark.parametrize("command", [["merge", "nowhere"], ["predict", "--run", "nowhere", "a text"]])
def test_of_a_launch_the_first_process_works_alone(command, tmp_path, monkeypatch, capsys):
    command = [*command, "--out", str(tmp_path / "out.jsonl")]
    monkeypatch.setenv("RANK", "1")
    assert cli.main(command) == 2  # a cluster's own RANK is no launch
    assert "no such folder" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert cli.main(command) == 0
    monkeypatch.setenv("RANK", "0")
    assert cli.main(command) == 2
    assert capsys.readouterr().out == ""


def test_a_launch_of_which_not_all_join_names_the_option(monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate, "PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"a launch of 2 processes of which accelerate joins 1.*--use_cpu"):
        processes.join(False)


@pytest.mark.parametrize(("kind", "logits"), [("classification", [0.0, torch.nan]), ("regression", [torch.inf, 0.0])])
def test_a_prediction_is_never_nan(kind, logits):
    made = LabelKind(kind, ["a", "b"] if kind == "classification" else ["score"], None, 16)
    with pytest.raises(ValueError, match=r"run: got the outputs .* for a text, expected finite numbers"):
        made.answer(torch.tensor(logits))
    answer = made.answer(torch.tensor([1.0, -torch.inf]))  # a label that a name of a pack has not
    assert answer == ({"score": 1.0} if kind == "regression" else {"label": "a", "probabilities": {"a": 1.0, "b": 0.0}})


@pytest.mark.skipif(os.name == "nt", reason="no such bit there")
def test_a_folder_that_cannot_be_entered_is_told(tmp_path, monkeypatch):
    from adamix_kernels.commands import _options

    monkeypatch.setattr(_options.os, "access", lambda _path, mode: not mode & os.X_OK)
    with pytest.raises(PermissionError, match="nothing may be written"):
        _options.needs_out(str(tmp_path))


def test_a_run_s_file_of_what_was_there_before_gives_no_labels(tmp_path, capsys, caplog):
    import tiny_text

    encoder = str(tiny_text.write_encoder(tmp_path / "encoder"))

    def saved(name, labels):
        model, _ = load_classifier(resolve_model(encoder), labels)
        adapt(model, AdaMixConfig(num_experts=2, bottleneck=2)).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    def label(folder):
        assert cli.main(["predict", "--run", folder, "good film", "--json"]) == 0
        return list(json.loads(capsys.readouterr().out)["probabilities"])

    filed, bare, out = saved("filed", ["down", "up"]), saved("bare", ["down", "up"]), str(tmp_path / "out")
    write_run(filed, Run(encoder, "data", ["down", "up"], 16))
    assert cli.main(["merge", filed, "--out", out]) == 0
    capsys.readouterr()
    assert label(out) == ["down", "up"]
    assert cli.main(["merge", bare, "--out", out]) == 0
    capsys.readouterr()
    assert not (tmp_path / "out" / "adamix_run.json").exists()
    assert label(out) == ["down", "up"]
    saved("filed", ["x", "y"])  # in the place of the run, by hand
    assert label(filed) == ["x", "y"]
    assert "its adamix_run.json is of what was here before" in caplog.text
