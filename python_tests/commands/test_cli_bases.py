"""The base of a run that was moved or came from the Hub, wherever the run goes then."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_text

from adamix_kernels import AdaMixConfig, adapt, cli, load, pack, save_pack, unpack
from adamix_kernels.models.run_values import run_folder
from adamix_kernels.tasks import Run, _bases, load_base, load_classifier, read_run, resolve_model, write_run


@pytest.fixture
def moved(tmp_path):
    """(the base, a run of it that stands where its way to the base leads nowhere)."""
    encoder = tiny_text.write_encoder(tmp_path / "encoder")
    model, tokenizer = load_classifier(resolve_model(str(encoder)), ["down", "up"])
    run = tmp_path / "run"
    adapt(model, AdaMixConfig(num_experts=2, bottleneck=2)).save_pretrained(run)
    tokenizer.save_pretrained(run)
    write_run(run, Run(str(encoder), "data", ["down", "up"], 16))
    return encoder, shutil.move(run, tmp_path / "far" / "away" / "run")


def test_a_repository_s_base_is_asked_of_the_hub(moved, tmp_path, monkeypatch, capsys):
    encoder, run = moved
    asked = []

    def resolved(name):
        asked.append(name)
        return resolve_model(str(encoder) if name == "encoder" else name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(run))
    monkeypatch.setattr(_bases, "resolve_model", resolved)
    load_base("user/repo")
    assert cli.main(["merge", "user/repo", "--out", str(tmp_path / "merged")]) == 0
    assert cli.main(["pack", "a=user/repo", "--out", str(tmp_path / "pack")]) == 0
    assert cli.main(["predict", "--run", "user/repo", "good film"]) == 0
    assert asked == ["encoder"] * 4
    assert cli.main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 2  # a folder's is not
    assert "but no such folder, expected where it is now" in capsys.readouterr().err


def test_what_was_put_onto_its_base_again_is_found_with_it(moved, tmp_path):
    encoder, run = moved
    model = pack(load_base(run, model=str(encoder))[0], {"a": run})
    folder = unpack(model, "a", tmp_path / "alone")
    assert read_run(folder).model == str(encoder)
    load(folder)
    packed = save_pack(model, tmp_path / "pack")
    assert json.loads((packed / "adamix_pack.json").read_text())["names"]["a"]["run"]["model_path"] == "../encoder"
    assert cli.main(["merge", str(run), "--model", str(encoder), "--out", str(tmp_path / "merged")]) == 0
    assert read_run(tmp_path / "merged").model == str(encoder)
    load(tmp_path / "merged")


def test_a_run_file_of_a_base_that_is_gone_does_not_hide_the_checkpoint_s(moved, tmp_path):
    encoder, run = moved
    folder = unpack(pack(load_base(run, model=str(encoder))[0], {"a": run}), "a", tmp_path / "alone")
    write_run(folder, Run(str(tmp_path / "gone" / "encoder"), "data", ["down", "up"], 16))
    assert not (folder / json.loads((folder / "adamix_run.json").read_text())["model_path"]).exists()
    load(folder)


def test_a_checkpoint_by_whatever_way_is_of_the_run_around_it(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "checkpoint-5").mkdir(parents=True)
    write_run(run, Run("hub/model", "data", ["down", "up"], 16))
    (tmp_path / "best").symlink_to(run / "checkpoint-5")
    assert run_folder(tmp_path / "best") == run
    monkeypatch.chdir(run / "checkpoint-5")
    assert run_folder(Path()) == run
    assert run_folder(tmp_path) is None
