"""A tiny random BERT folder with a WordPiece vocabulary, and a tiny data folder."""

import json

import torch
import transformers

WORDS = ("good", "bad", "fine", "poor", "the", "film", "meal", "was", "a", "an", "story", "very", "not")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)


def write_encoder(folder):
    """A 2-layer BERT of width 16 with its tokenizer, as save_pretrained would leave them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    options = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
    return folder


def write_data(folder, train=12, dev=6):
    """Rows whose label is the first word: learnable, with labels as names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("dev", dev)):
        lines = ["sentence\tlabel"]
        for i in range(rows):
            word, label = (("good", "up"), ("bad", "down"))[i % 2]
            lines.append(f"{word} {' '.join(WORDS[4 : 6 + i % 5])}\t{label}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
