"""What a name of a pack brings beside its tensors, its run file and the tokenizer, whatever becomes of the name."""

import json
import os
import pickle
import shutil
import threading

import pytest
import tiny
import tiny_packs as tp

from adamix_kernels import add_expert, load_pack, pack, remove_expert, replace_expert, save_pack, unpack
from adamix_kernels.models import _files
from adamix_kernels.models._files import sealed
from adamix_kernels.tasks import Run, read_run, write_run
from adamix_kernels.tasks.run_file import run_of

WORDS = {"tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}', "vocab.txt": b"[PAD]\n[UNK]\n"}


@pytest.fixture
def given(tmp_path):
    """Folders of six names: those of runs cut their texts at 6, 7, ... tokens; "bare" has no run file."""
    found = {}
    for number, name in enumerate(("a", "b", "c", "d", "bare")):
        found[name] = tp.saved(tmp_path / "runs" / name, tiny.tiny_bert, number, labels=["no", "yes"], bottleneck=4)
        for file, content in WORDS.items():
            (found[name] / file).write_bytes(content)
        if name != "bare":
            write_run(found[name], Run("hub/model", str(tmp_path), ["no", "yes"], 6 + number))
    return found


def tokens(model):
    runs = {name: entry.run for name, entry in model.adamix.pack.entries.items()}
    return {name: None if run is None else run_of(run, name).max_tokens for name, run in runs.items()}


def test_runs_come_and_go_with_their_names(given, tmp_path):
    model = pack(tiny.tiny_bert(), {name: given[name] for name in ("a", "b", "bare")}, capacity=4)
    add_expert(model, "late", given["c"])
    replace_expert(model, "a", given["d"])
    remove_expert(model, "b")
    want = {"a": 9, "bare": None, "late": 8}
    assert tokens(model) == want
    folder = save_pack(model, tmp_path / "elsewhere" / "pack")
    assert {name: (folder / name).read_bytes() for name in WORDS} == WORDS
    again = load_pack(tiny.tiny_bert(), folder)
    assert tokens(again) == want
    assert again.adamix.pack.entries["a"].run["data"] == str(tmp_path)  # found from another depth
    save_pack(replace_expert(again, "a", given["bare"]), folder)
    assert tokens(load_pack(tiny.tiny_bert(), folder, names=["a", "late"])) == {"a": None, "late": 8}


def test_a_name_alone_has_its_run_and_tokenizer(given, tmp_path):
    model = pack(tiny.tiny_bert(), {"a": given["a"], "bare": given["bare"]})
    folder = unpack(model, "a", tmp_path / "alone")
    assert read_run(folder) == read_run(given["a"])
    assert {name: (folder / name).read_bytes() for name in WORDS} == WORDS
    unpack(model, "bare", folder)
    assert not (folder / "adamix_run.json").exists()
    assert tokens(pack(tiny.tiny_bert(), {"back": folder})) == {"back": None}


def older(folder):
    """A pack as earlier releases wrote it, without runs in its JSON."""
    path = folder / "adamix_pack.json"
    values = json.loads(path.read_text())
    values.pop("sha256")
    for header in values["names"].values():
        header.pop("run")
    path.write_text(json.dumps(sealed(values)))
    return folder


def test_packs_of_older_releases_have_a_file_a_name(given, tmp_path):
    folder = save_pack(pack(tiny.tiny_bert(), {"a": given["a"], "b": given["b"]}), tmp_path / "pack")
    older(folder)
    (folder / "names" / "b").mkdir(parents=True)
    write_run(folder / "names" / "b", Run("m", "d", ["no", "yes"], 30))
    model = load_pack(tiny.tiny_bert(), folder)
    assert tokens(model) == {"a": None, "b": 30}
    save_pack(remove_expert(model, "a"), folder)
    assert not (folder / "names").exists()
    assert tokens(load_pack(tiny.tiny_bert(), folder)) == {"b": 30}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_cut_off_save_leaves_yesterday_s(error, given, tmp_path, monkeypatch):
    folder = save_pack(pack(tiny.tiny_bert(), {"a": given["a"]}), tmp_path / "pack")
    before = (folder / "adamix_pack.json").read_bytes()
    model = replace_expert(load_pack(tiny.tiny_bert(), folder), "a", given["d"])
    replace = _files.os.replace

    def cut(source, target):
        if target == folder / "adamix_pack.json":
            raise error
        replace(source, target)

    monkeypatch.setattr(_files.os, "replace", cut)
    with pytest.raises(error):
        save_pack(model, folder)
    monkeypatch.undo()
    assert (folder / "adamix_pack.json").read_bytes() == before
    assert tokens(load_pack(tiny.tiny_bert(), folder)) == {"a": 6}
    assert not list(folder.glob(".adamix*"))


def test_a_damaged_run_file_is_told_and_stops_no_weights(given, tmp_path, caplog):
    for number, content in enumerate(("{cut", '{"version": 4}')):
        (given["b"] / "adamix_run.json").write_text(content)
        assert tokens(pack(tiny.tiny_bert(), {"a": given["a"], "b": given["b"]})) == {"a": 6, "b": None}
        assert caplog.text.count("not a run file of this release") == number + 1
    folder = older(save_pack(pack(tiny.tiny_bert(), {"a": given["a"]}), tmp_path / "pack"))
    (folder / "names" / "a").mkdir(parents=True)
    (folder / "names" / "a" / "adamix_run.json").write_text("{cut")
    assert tokens(load_pack(tiny.tiny_bert(), folder)) == {"a": None}
    assert "names/a/adamix_run.json: not a run file" in caplog.text


def test_runs_in_a_folder_called_names_are_no_pack_s(given, tmp_path):
    model = pack(tiny.tiny_bert(), {"a": given["a"]})
    for name in ("a", "b"):  # with its checkpoint beside it, and of a name that the pack has not
        shutil.copytree(given["b"], tmp_path / "pack" / "names" / name)
    (tmp_path / "pack" / "names" / "b" / "adamix_checkpoint.json").unlink()
    older(save_pack(model, tmp_path / "pack"))
    save_pack(model, tmp_path / "pack")
    for name in ("a", "b"):
        assert read_run(tmp_path / "pack" / "names" / name).max_tokens == 7


def test_a_leftover_under_this_process_s_own_number_is_no_hindrance(given, tmp_path):
    folder = tmp_path / "pack"
    left = folder / f".adamix.{os.getpid()}.{threading.get_ident()}.tmp"
    left.mkdir(parents=True)
    (left / "vocab.txt").write_text("old")
    save_pack(pack(tiny.tiny_bert(), {"a": given["a"]}), folder)
    assert (folder / "vocab.txt").read_bytes() == WORDS["vocab.txt"]
    assert not list(folder.glob(".adamix*"))


def test_a_pack_that_an_earlier_version_pickled_is_saved(given, tmp_path):
    model = pack(tiny.tiny_bert(), {"a": given["a"]}, capacity=2)
    for newer in ("tied", "tokenizer"):
        del model.adamix.pack.__dict__[newer]
    again = add_expert(pickle.loads(pickle.dumps(model)), "b", given["b"])
    assert tokens(load_pack(tiny.tiny_bert(), save_pack(again, tmp_path / "pack"))) == {"a": 6, "b": 7}
