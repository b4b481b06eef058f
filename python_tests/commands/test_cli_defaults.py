"""`adamix train` with a model and a file, and no other option, learns: three tiny encoders, three kinds of labels."""

import csv
import json
import random

import pytest
import tiny_text
import torch
import transformers

from adamix_kernels import cli
from adamix_kernels.commands import _defaults

SIZES = {"vocab_size": len(tiny_text.VOCABULARY), "max_position_embeddings": 32, "pad_token_id": 0}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# A head on a pooler, on the first token, and on a layer before the classifier.
ENCODERS = {
    "bert": transformers.BertConfig(**SIZES, **BERT),
    "electra": transformers.ElectraConfig(**SIZES, **BERT, embedding_size=32),
    "distilbert": transformers.DistilBertConfig(**SIZES, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
}


def write_encoder(folder, config):
    tiny_text.write_encoder(folder)  # its tokenizer
    torch.manual_seed(3)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def write(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def words(draw, *first):
    return " ".join([*first, *draw.choices(tiny_text.WORDS[4:], k=4)])


def opinions(path):
    """Two classes, one three times as frequent."""
    draw = random.Random(0)
    return write(path, ("text", "label"), [
        (words(draw, *(("bad", "poor") if i % 4 == 0 else ("good", "fine"))), "no" if i % 4 == 0 else "yes")
        for i in range(80)
    ])  # fmt: skip


def topics(path):
    """Three classes by the first words."""
    draw = random.Random(1)
    kinds = (("film", "film", "art"), ("meal", "meal", "food"), ("story", "story", "book"))
    rows = [(words(draw, *kinds[i % 3][:2]), kinds[i % 3][2]) for i in range(90)]
    return write(path, ("sentence", "category"), rows)


def answers(path):
    """Pairs: the second text decides."""
    draw = random.Random(2)
    rows = [(words(draw), words(draw, *["good" if i % 2 else "bad"] * 3), i % 2) for i in range(80)]
    return write(path, ("premise", "hypothesis", "label"), rows)


@pytest.mark.parametrize(("encoder", "data"), [("bert", opinions), ("electra", topics), ("distilbert", answers)])
def test_defaults_learn(encoder, data, tmp_path, capsys):
    model, file = write_encoder(tmp_path / encoder, ENCODERS[encoder]), data(tmp_path / "data.csv")
    assert cli.main(["train", "--model", model, "--data", file, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "adamix_report.json").read_text())
    score, majority = report["scores"]["accuracy"], report["baselines"]["majority class"]["accuracy"]
    assert score > majority + 5, capsys.readouterr().out


def test_epochs_by_rows():
    assert _defaults.epochs(480, 16) == 20
    assert _defaults.epochs(67_349, 16) == _defaults.FEWEST_EPOCHS
    assert _defaults.epochs(20, 16) == _defaults.MOST_EPOCHS
    assert _defaults.epochs(1, 16) == _defaults.MOST_EPOCHS


def test_rates_by_width_task_and_method():
    small, wide = transformers.BertConfig(hidden_size=384), transformers.BertConfig(hidden_size=1024)
    base = transformers.GPT2Config()
    assert _defaults.learning_rate(small, "classification", "adapter") == 3e-3
    assert _defaults.learning_rate(wide, "regression", "adapter") == 5e-4
    assert _defaults.learning_rate(small, "classification", "lora") < 3e-3
    assert _defaults.learning_rate(base, "generation", "lora") == 2e-4
