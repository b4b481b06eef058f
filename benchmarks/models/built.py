"""The models that training steps are measured on: published sizes with random weights, and tiny ones for tests."""

from __future__ import annotations

import torch
from torch import nn

_TINY = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
_LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
# What AdaMix adapts in a model, and so what its peers are.
LORA_MODELS = ("gpt2-medium", "tiny-gpt2")
RANDOM = ("tiny", "bert-base", "roberta-large", *LORA_MODELS)


def random_model(name: str, labels: int) -> nn.Module:
    """A model of RANDOM with freshly drawn weights, in float32 on the CPU: a classifier, or GPT-2 with its LM head."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    if name == "tiny":
        return BertForSequenceClassification(BertConfig(**_TINY, num_labels=labels))
    if name == "bert-base":
        return BertForSequenceClassification(BertConfig(num_labels=labels))
    if name == "roberta-large":
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, **_LARGE, num_labels=labels)
        return RobertaForSequenceClassification(config)
    if name == "tiny-gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4))
    if name == "gpt2-medium":
        return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    raise ValueError(f"model: got {name!r}, expected one of {', '.join(RANDOM)}")


def random_batches(model: str, vocab: int, batch: int, tokens: int, labels: int, seed: int, count: int):
    """`count` pairs (inputs, labels) of random token ids without padding; a language model's labels are its tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, vocab, (batch, tokens), generator=generator)
        if model in LORA_MODELS:
            made.append(({"input_ids": ids}, ids))
            continue
        classes = torch.randint(0, labels, (batch,), generator=generator)
        made.append(({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, classes))
    return made
