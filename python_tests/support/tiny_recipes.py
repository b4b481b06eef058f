"""What the recipes' tests run on: tiny model folders and data in every layout, all made here."""

import json

import tiny_text
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from adamix_kernels.recipes.config import from_dict

SETTINGS = {
    "name": "tiny",
    "kind": "classification",
    "model": "m",
    "data": "d",
    "metrics": ["accuracy"],
    "max_tokens": 16,
    "training": {
        "learning_rate": 1e-2, "num_train_epochs": 1, "per_device_train_batch_size": 6,
        "warmup_ratio": 0.06, "weight_decay": 0.1, "use_cpu": True,
    },
    "adamix": {"num_experts": 2, "bottleneck": 4},
}  # fmt: skip
WORDS = ("name", "area", "food", ":", "|", ".", "the", "a", "is", "in", "place", "blue", "red", "north", "south", "and")
SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")


def write_causal(folder):
    """A 2-layer GPT-2 of width 16 with a word-level tokenizer."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=len(SPECIAL) + len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=128,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


TABLES = [("blue", "north"), ("red", "south"), ("blue", "south"), ("red", "north")]


def write_e2e(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "valid", "test"):
        lines = [f"name : {n} | area : {a}||the {n} place is in the {a} ." for n, a in TABLES]
        lines += [f"name : {n} | area : {a}||a {n} place {end}" for n, a in TABLES for end in ("",)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_webnlg(folder):
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (name, area) in enumerate(TABLES, start=1):
        triples = [
            {"subject": name, "property": "isIn", "object": area},
            {"subject": name, "property": "serves", "object": "food"},
        ]
        texts = [("good", f"the {name} place is in the {area} ."), ("toFix", "wrong"), ("good", f"a {name} place .")]
        lex = [{"comment": c, "lang": "", "lex": t, "xml_id": f"Id{i}"} for i, (c, t) in enumerate(texts)]
        category = "City" if number < 4 else "Food"
        entries.append({str(number): {"category": category, "lexicalisations": lex, "modifiedtripleset": triples}})
    for split in ("train", "dev", "test"):  # as published, a category of the test part is none of training
        some = entries[:3] if split == "train" else entries
        (folder / f"{split}.json").write_text(json.dumps({"entries": some}), encoding="utf-8")
    return folder


def write_dart(folder):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"tripleset": [[n, "IS_IN", a]], "annotations": [{"source": "x", "text": f"the {n} place is in the {a} ."}]}
        for n, a in TABLES
    ]
    for split in ("train", "dev", "test"):
        (folder / f"dart-v1.1.1-full-{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def tiny_recipe(folder, **changes):
    """A classification recipe on a tiny BERT and twelve sentences, one epoch."""
    places = {
        "model": str(tiny_text.write_encoder(folder / "encoder")),
        "data": str(tiny_text.write_data(folder / "data")),
    }
    return from_dict({**SETTINGS, **places, **changes})
