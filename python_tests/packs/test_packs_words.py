"""A pack's one tokenizer: all its files, one vocabulary, and none of an earlier one."""

import json
import threading

import pytest
import tiny
import tiny_packs as tp
import tiny_text

from adamix_kernels import add_expert, load_pack, pack, replace_expert, save_pack, unpack
from adamix_kernels.packs import words as packs_words
from adamix_kernels.packs.words import tokenizer_files

WORDS = [*tiny_text.VOCABULARY]
BERT = {"tokenizer_config.json": json.dumps({"tokenizer_class": "BertTokenizer"})}


def words(*swapped):
    found = [*WORDS]
    for word in swapped:
        one, other = found.index(word), found.index("film")
        found[one], found[other] = found[other], found[one]
    return {**BERT, "vocab.txt": "\n".join(found)}


@pytest.fixture
def given(tmp_path):
    found = {}
    for number, (name, files) in enumerate({"a": words(), "b": words("good"), "bare": {}}.items()):
        found[name] = tp.saved(tmp_path / "runs" / name, tiny.tiny_bert, number, labels=["no", "yes"], bottleneck=4)
        for file, content in files.items():
            (found[name] / file).write_text(content)
    return found


def test_two_vocabularies_are_no_pack(given):
    model = tiny.tiny_bert()
    before = tp.state_of(model)
    with pytest.raises(ValueError, match=r"^b: folder: got a tokenizer in which \d+ is '\w+', expected '\w+'"):
        pack(model, {"a": given["a"], "b": given["b"]})
    tp.same_state(tp.state_of(model), before)
    pack(model, {"a": given["a"]}, capacity=2)
    with pytest.raises(ValueError, match=r"^b: folder: got a tokenizer in which"):
        add_expert(model, "b", given["b"])
    replace_expert(model, "a", given["b"])  # the only name
    assert model.adamix.pack.tokenizer == tokenizer_files(given["b"])


def test_a_tokenizer_without_its_words_is_told_and_is_no_other_vocabulary(given, caplog):
    (given["b"] / "vocab.txt").unlink()
    pack(tiny.tiny_bert(), {"a": given["a"], "b": given["b"]})
    assert "b is another file than the pack's, and does not load: got tokenizer_config.json without" in caplog.text


def test_vocabularies_are_compared_while_forwards_go_on(given, monkeypatch):
    model = pack(tiny.tiny_bert(), {"a": given["a"]}, capacity=2)
    (given["b"] / "vocab.txt").write_text("\n".join([*WORDS, "more"]))
    loaded, free = packs_words._loaded, []

    def takes_the_lock():
        with model.adamix.pack.lock:
            pass

    def seen(*files):
        thread = threading.Thread(target=takes_the_lock)
        thread.start()
        thread.join(0.2)
        free.append(not thread.is_alive())
        return loaded(*files)

    monkeypatch.setattr(packs_words, "_loaded", seen)
    add_expert(model, "b", given["b"])
    assert free == [True, True]


def test_a_later_name_s_tokenizer_is_not_that_of_a_first_without_one(given, tmp_path):
    model = pack(tiny.tiny_bert(), {"bare": given["bare"], "b": given["b"]}, capacity=3)
    add_expert(model, "a", given["a"])
    assert model.adamix.pack.tokenizer == {}
    assert not list(save_pack(model, tmp_path / "pack").glob("vocab*"))


def test_files_that_the_tokenizer_s_class_names_are_its(tmp_path):
    names = ("vocab.txt", "word_shape.json", "word_pronunciation.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RoCBertTokenizer"}))
    for name in (*names, "notes.json"):
        (tmp_path / name).write_text("{}")
    assert set(tokenizer_files(tmp_path)) == {"tokenizer_config.json", *names}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NoSuch"}))
    assert set(tokenizer_files(tmp_path)) == {"tokenizer_config.json", "vocab.txt"}


def test_an_earlier_pack_s_tokenizer_goes_with_it(given, tmp_path):
    of_a, bare = (pack(tiny.tiny_bert(), {"a": given[name]}) for name in ("a", "bare"))
    folder = save_pack(of_a, tmp_path / "pack")
    (folder / "tokenizer.json").write_text("another's, which would win over vocab.txt")
    (folder / "notes.txt").write_text("mine")
    save_pack(of_a, folder)
    assert not (folder / "tokenizer.json").exists()
    save_pack(bare, folder)
    assert load_pack(tiny.tiny_bert(), folder).adamix.pack.tokenizer == {}
    assert (folder / "notes.txt").exists()
    (folder / "tokenizer_config.json").write_text("put there since")
    save_pack(bare, folder)
    assert (folder / "tokenizer_config.json").exists()


def test_an_earlier_checkpoint_s_tokenizer_goes_with_it(given, tmp_path):
    model, folder = pack(tiny.tiny_bert(), {"a": given["a"]}), tmp_path / "alone"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("in a folder of somebody else's")
    unpack(model, "a", folder)
    assert (folder / "tokenizer.json").exists()
    unpack(model, "a", folder)
    assert not (folder / "tokenizer.json").exists()
    assert tokenizer_files(folder) == tokenizer_files(given["a"])
