"""What adamix merge leaves where it does not come to its end: yesterday's folder, or none that loads."""

import os

import pytest
import tiny_text

from adamix_kernels import AdaMixConfig, adapt, cli
from adamix_kernels.models import _files, _staging
from adamix_kernels.tasks import Run, load_classifier, resolve_model, write_run

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


def test_another_error_of_a_tokenizer_stays(tmp_path):
    class Words:
        def save_pretrained(self, _place):
            raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        _staging.write_tokenizer(tmp_path, Words())
    assert not list(tmp_path.iterdir())
