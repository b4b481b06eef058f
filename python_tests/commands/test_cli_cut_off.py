"""What adamix merge leaves where it does not come to its end: yesterday's folder, or none that loads."""

import os
import shutil

import pytest
import tiny_text

from adamix_kernels import AdaMixConfig, adapt, cli
from adamix_kernels.models import _files, _staging
from adamix_kernels.tasks import Run, load_classifier, read_run, resolve_model, write_run

FULL = "No space left on device (os error 28)"  # in tokenizers' words


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on one data set, whose texts were cut elsewhere."""
    folder = tmp_path_factory.mktemp("runs")
    encoder = str(tiny_text.write_encoder(folder / "encoder"))
    data = str(tiny_text.write_data(folder / "data"))
    for name, tokens in (("one", 6), ("two", 9)):
        model, tokenizer = load_classifier(resolve_model(encoder), ["down", "up"])
        tokenizer.model_max_length = tokens
        adapt(model, AdaMixConfig(num_experts=2, bottleneck=2)).save_pretrained(folder / name)
        _staging.write_tokenizer(folder / name, tokenizer)
        write_run(folder / name, Run(encoder, data, ["down", "up"], tokens))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ends_at(monkeypatch, name, error):
    """os.replace, or the tokenizer's own writer, ends with `error`, before the file `name` has its place."""
    replace = os.replace

    def cut(source, target):
        if os.path.basename(target) == name and ".adamix" not in os.path.dirname(target):
            raise error
        replace(source, target)

    monkeypatch.setattr(_files.os, "replace", cut)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "adamix_run.json", "adamix_checkpoint.json"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["key", "full"])
def test_a_cut_off_merge_is_no_checkpoint(name, error, runs, tmp_path, monkeypatch, capsys):
    ends_at(monkeypatch, name, error)
    code = cli.main(["merge", str(runs / "one"), "--out", str(tmp_path / "out")])
    monkeypatch.undo()
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert not (tmp_path / "out" / "adamix_checkpoint.json").exists()
    assert cli.main(["predict", "--run", str(tmp_path / "out"), "good film"]) == 2
    assert cli.main(["merge", str(runs / "one"), "--out", str(tmp_path / "out")]) == 0
    assert cli.main(["predict", "--run", str(tmp_path / "out"), "good film"]) == 0
    capsys.readouterr()


def test_a_merge_on_a_full_disk_leaves_yesterday_s(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert cli.main(["merge", str(runs / "one"), "--out", str(out)]) == 0
    before = contents(out)

    def full(self, *_args, **_kwargs):
        raise Exception(FULL)

    import transformers

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    capsys.readouterr()
    assert cli.main(["merge", str(runs / "two"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"adamix merge: [Errno 28] {FULL}: '{out}'"
    monkeypatch.undo()
    assert contents(out) == before
    write = _staging.write_tokenizer

    def then_full(place, tokenizer):
        write(place, tokenizer)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adamix_kernels.commands.merge.write_tokenizer", then_full)
    assert cli.main(["merge", str(runs / "two"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"adamix merge: [Errno 28] No space left on device: '{out}'"
    assert contents(out) == before


@pytest.mark.parametrize(
    ("labels", "told"),
    [(["down", "up"], "on "), (["no", "yes"], "for ['down', 'up'], expected another folder, or")],
)
def test_another_run_s_merged_module_is_not_written_over(labels, told, runs, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    assert cli.main(["merge", str(runs / "one"), "--out", str(out)]) == 0
    before = contents(out)
    encoder = str(runs / "encoder")
    model, _ = load_classifier(resolve_model(encoder), labels)
    adapt(model, AdaMixConfig(num_experts=2, bottleneck=2)).save_pretrained(other)
    write_run(other, Run(encoder, str(tmp_path / "elsewhere"), labels, 6))
    capsys.readouterr()
    assert cli.main(["merge", str(other), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert f"out: {out} holds what was merged of another run, {told}" in err
    assert contents(out) == before


def test_a_run_whose_data_is_called_otherwise_by_now_is_merged_again(runs, tmp_path, capsys, monkeypatch):
    run, out = shutil.copytree(runs / "one", tmp_path / "one"), tmp_path / "out"
    assert cli.main(["merge", str(runs / "one"), "--out", str(out)]) == 0
    write_run(run, Run(str(runs / "encoder"), str(tmp_path / "renamed"), ["down", "up"], 6))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "too small"))
    assert cli.main(["merge", str(run), "--out", str(out)]) == 0
    assert read_run(out).data == str(tmp_path / "renamed")
    assert not list(out.glob(".adamix*"))
    capsys.readouterr()


def test_an_export_into_a_run_s_folder_is_refused(runs, tmp_path, capsys):
    out = shutil.copytree(runs / "two", tmp_path / "two")
    before = contents(out)
    assert cli.main(["export", str(runs / "one"), "--format", "adapterhub", "--out", str(out)]) == 2
    assert f"got '{out}', which holds an AdaMix checkpoint, expected another folder" in capsys.readouterr().err
    assert contents(out) == before
    merged, other = str(tmp_path / "merged"), str(tmp_path / "other")
    for name, folder in (("one", merged), ("two", other)):
        assert cli.main(["merge", str(runs / name), "--out", folder]) == 0
    assert cli.main(["export", other, "--format", "adapterhub", "--out", merged]) == 2
    assert "holds an AdaMix checkpoint" in capsys.readouterr().err
    assert cli.main(["export", merged, "--format", "adapterhub", "--out", merged]) == 0  # beside what it is of
    assert cli.main(["predict", "--run", merged, "good film"]) == 0
    capsys.readouterr()


def test_a_run_at_another_depth_asks_nobody_for_the_last_names(runs, tmp_path, capsys, monkeypatch):
    from adamix_kernels.models import hub

    monkeypatch.setattr(hub, "_ask", lambda *_: pytest.fail("the Hub is asked"))
    folder = tmp_path / "a" / "b" / "c"
    shutil.copytree(runs / "one", folder)
    assert cli.main(["eval", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "model: got " in err
    assert f"as the base of '{folder}', but no such folder, expected where it is now: --model" in err
    model = ["--model", str(runs / "encoder")]
    assert cli.main(["eval", str(folder), *model]) == 2
    assert "what the run was trained on: no such folder or file, expected --data" in capsys.readouterr().err
    assert cli.main(["merge", str(folder), *model, "--out", str(tmp_path / "merged")]) == 0
    found = read_run(tmp_path / "merged")
    assert (found.model, found.data) == (str(runs / "encoder"), read_run(folder).data)
    assert cli.main(["eval", str(folder), *model, "--data", str(runs / "data")]) == 0
    capsys.readouterr()


def test_another_error_of_a_tokenizer_stays(tmp_path):
    class Words:
        def save_pretrained(self, _place):
            raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        _staging.write_tokenizer(tmp_path, Words())
    assert not list(tmp_path.iterdir())
