"""Whole training steps whose host time is measured: what our calls add to a model's own.

The models have the layers of BERT-base and of GPT-2 medium, and random weights so small that a CPU computes nothing to
speak of: what is left is the host's work. "The rest" is the same model without adapted layers, its embeddings' output
requiring a gradient, so that its forward and backward are those between adapted layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Of a batch before it is doubled.
BATCH, TOKENS, HIDDEN, HEADS, RANK, CLASSES = 2, 8, 32, 2, 8, 3
# name -> how many adapted layers it has.
STEPS = {"BERT-base, 12 adapters": 12, "GPT-2 medium, 24 LoRA of q and v": 24}


@dataclass(frozen=True)
class Step:
    """adapted() and rest(): forward and backward of one doubled batch; layers: how many of them are adapted."""

    name: str
    layers: int
    adapted: Callable[[], object]
    rest: Callable[[], object]


def steps(backend: str, only: str = "") -> Iterator[Step]:
    """Every step whose name holds `only`, on `backend`, which host_cases.prepare got ready."""
    for name, layers in STEPS.items():
        if only not in name:
            continue
        build = _bert if name.startswith("BERT") else _gpt2
        yield Step(name, layers, _adapted(build, layers, backend), _rest(build, layers))


def _bert(layers: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=HIDDEN, num_attention_heads=HEADS, intermediate_size=2 * HIDDEN, vocab_size=64)
    model: nn.Module = BertForSequenceClassification(
        BertConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=TOKENS, num_labels=CLASSES)
    )
    return model


def _gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=HIDDEN, n_head=HEADS, n_layer=layers, n_positions=TOKENS, vocab_size=64)
    # As recommended for its consistency weight: without dropout.
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))
    return model


def _batch() -> dict[str, Any]:
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _options(build: Callable[[int], nn.Module]) -> dict[str, Any]:
    return {} if build is _bert else {"use_cache": False}


def _adapted(build: Callable[[int], nn.Module], layers: int, backend: str) -> Callable[[], object]:
    from adamix_kernels import adamix_loss
    from adamix_kernels.models.config import AdaMixConfig
    from adamix_kernels.models.doubling import double_batch
    from adamix_kernels.models.inject import adapt

    torch.manual_seed(0)
    lora = build is _gpt2
    config = AdaMixConfig(method="lora" if lora else "adapter", r=RANK, bottleneck=RANK, dropout=0.0)
    model = adapt(build(layers), config, backend=backend).train()
    batch, options = _batch(), _options(build)
    labels = torch.zeros(BATCH, *(TOKENS - 1,) * lora, dtype=torch.int64)

    def step() -> None:
        logits = model(**double_batch(batch, BATCH), **options).logits
        logits = logits[:, :-1] if lora else logits
        adamix_loss(logits, labels, backend=backend).loss.backward()
        # As zero_grad() leaves it.
        for p in trained:
            p.grad = None

    trained = [p for p in model.parameters() if p.requires_grad]
    return step


def _rest(build: Callable[[int], nn.Module], layers: int) -> Callable[[], object]:
    torch.manual_seed(0)
    model = build(layers).train().requires_grad_(False)
    head = getattr(model, "classifier", None)
    if head is not None:
        head.requires_grad_(True)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.register_forward_hook(lambda _module, _args, out: out.requires_grad_())
    batch, options = {name: torch.cat([t, t]) for name, t in _batch().items()}, _options(build)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient: list[torch.Tensor] = []

    def step() -> None:
        logits = model(**batch, **options).logits
        if not gradient:
            gradient.append(torch.ones_like(logits))
        logits.backward(gradient[0])
        for p in trained:
            p.grad = None

    return step
