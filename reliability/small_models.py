"""Small random Hugging Face models, adapted, with every expert different."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import transformers
from torch import nn

from adamix_kernels import AdaMixConfig, adapt

VOCAB, HIDDEN, LAYERS = 32, 16, 2
KINDS: dict[str, dict[str, Any]] = {
    "BERT, adapters": {"method": "adapter", "bottleneck": 3, "num_experts": 3},
    "GPT-2, LoRA": {"method": "lora", "r": 2, "num_experts": 3, "share": None},
}


def base(kind: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    if kind.startswith("GPT-2"):
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=2, n_positions=16, resid_pdrop=dropout,
            embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def adapted(kind: str, seed: int = 0, dropout: float = 0.0, **options: Any) -> nn.Module:
    config = {**KINDS[kind], **options}
    if config["method"] == "lora":
        config["dropout"] = dropout
    return filled(adapt(base(kind, dropout), AdaMixConfig(**config)), seed)


@torch.no_grad()
def filled(model: nn.Module, seed: int) -> nn.Module:
    """Every trained parameter random, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(kind: str, rows: int = 4, tokens: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    labels = ids.clone() if kind.startswith("GPT-2") else torch.randint(2, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def digest(model: nn.Module) -> str:
    """Of the bits of everything that is trained."""
    state = hashlib.sha256()
    for name, value in sorted(trained(model).items()):
        state.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def picture(model: nn.Module) -> tuple:
    """What makes two adapted models the same model."""
    state = model.adamix
    values = tuple((n, str(v.dtype), v.numpy().tobytes()) for n, v in model.state_dict().items())
    flags = tuple((name, p.requires_grad) for name, p in model.named_parameters())
    kinds = tuple((name, type(module).__name__) for name, module in model.named_modules())
    of_forwards = ("notes", "samples")
    router = {name: value for name, value in vars(state.router).items() if name not in of_forwards}
    return values, flags, kinds, repr(state.config), state.merged, repr(router)
