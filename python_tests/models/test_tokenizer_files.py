"""A tokenizer's files: whole whatever a save was cut off by, and never a tokenizer that knows no word."""

import json
import os
import subprocess
import sys

import pytest
import tiny_text

from adamix_kernels import AdaMixConfig, adapt, load
from adamix_kernels.models import _files, _staging
from adamix_kernels.models.trainer_checkpoints import _full_disk_told
from adamix_kernels.tasks import load_classifier, resolve_model
from adamix_kernels.tasks._pretrained import tokenizer_of

TEXT = "good film was"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_text.write_encoder(tmp_path_factory.mktemp("words") / "encoder")


def test_a_save_that_is_cut_off_leaves_the_base_s_tokenizer(encoder, tmp_path, monkeypatch):
    model, tokenizer = load_classifier(resolve_model(str(encoder)), ["a", "b"])
    wanted = tokenizer(TEXT)["input_ids"]
    assert tokenizer.unk_token_id not in wanted
    adapt(model, AdaMixConfig(num_experts=2, bottleneck=2)).save_pretrained(tmp_path)
    replace, left = os.replace, 0

    def cut_off(source, target):
        nonlocal left
        if left == 0:
            raise OSError("no space left")
        left -= 1
        replace(source, target)

    for pieces in (0, 1):
        left = pieces
        monkeypatch.setattr(_files.os, "replace", cut_off)
        with pytest.raises(OSError, match="no space"):
            _staging.write_tokenizer(tmp_path, tokenizer)
        monkeypatch.undo()
        assert (tmp_path / "tokenizer.json").exists() == bool(pieces)
        assert not (tmp_path / "tokenizer_config.json").exists()
        assert load(tmp_path)[1](TEXT)["input_ids"] == wanted
    assert not list(tmp_path.glob(".adamix*"))
    _staging.write_tokenizer(tmp_path, tokenizer)
    assert (tmp_path / "tokenizer_config.json").exists()
    assert load(tmp_path)[1](TEXT)["input_ids"] == wanted


def test_a_configuration_alone_is_refused(encoder, tmp_path):
    model, tokenizer = load_classifier(resolve_model(str(encoder)), ["a", "b"])
    adapt(model, AdaMixConfig(num_experts=2, bottleneck=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json without its words, expected vocab\.txt or tokenizer\."
    ):
        load(tmp_path)


def test_bytes_need_no_words(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert tokenizer_of(str(tmp_path), True)("ab")["input_ids"] == [100, 101, 1]


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{}"), ("tokenizer.json", "{cut"), ("config.json", "[]")]
)
def test_a_damaged_file_is_a_value_error(name, text, encoder, tmp_path):
    tiny_text.write_encoder(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="model: cannot load"):
        load_classifier(resolve_model(str(tmp_path)), ["a", "b"])


@pytest.mark.parametrize("weights", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_weights_that_are_no_safetensors_are_named(weights, tmp_path):
    path = tiny_text.write_encoder(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8] if weights is None else weights)
    with pytest.raises(ValueError, match="got weights that safetensors cannot read"):
        load_classifier(resolve_model(str(tmp_path)), ["a", "b"])


def test_what_killed_processes_left_is_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for process in (gone.pid, os.getpid()):
        (tmp_path / f".adamix.{process}.7.tmp").mkdir()
        (tmp_path / f".adamix.{process}.7.tmp" / "tokenizer.json").touch()
    (tmp_path / f".adamix.{gone.pid}.8.tmp").touch()
    _files.remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".adamix.{os.getpid()}.7.tmp"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("values", [10, 100_000])
def test_a_full_disk_is_an_os_error(values):
    import torch

    with pytest.raises(OSError, match="is the disk full"), _full_disk_told("folder"):
        torch.save({"values": torch.zeros(values)}, "/dev/full")
    with pytest.raises(RuntimeError, match="another"), _full_disk_told("folder"):
        raise RuntimeError("another")
