"""The training steps that are compared: AdaMix on a doubled batch, one adapter, the published way, PEFT LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from adamix_kernels import AdaMixConfig, adamix_loss, adapt, double_batch
from adamix_kernels.tasks.encoders import load_classifier, resolve_model

from .original import OriginalAdapter, original_loss
from .peers import PlainAdapter, peft_lora

ADAMIX = "adamix"
ONE_EXPERT = "one_expert"
PLAIN = "plain_adapter"
ORIGINAL = "original"
LORA = "peft_lora"
TITLES = {
    ADAMIX: "AdaMix, doubled batch",
    ONE_EXPERT: "AdaMix with M = 1, same tokens",
    PLAIN: "one plain adapter (nn.Linear), same tokens",
    ORIGINAL: "the published way: two passes, module list, .item()",
    LORA: "PEFT LoRA on query and value, same tokens",
}
BACKENDS = {ADAMIX: "reference", ONE_EXPERT: "reference", PLAIN: "torch", ORIGINAL: "torch", LORA: "peft"}
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """What is trained and on what: batch B and tokens S before doubling, M experts of width bottleneck."""

    model: str = "all-MiniLM-L6-v2"
    batch: int = 32
    tokens: int = 64
    experts: int = 4
    bottleneck: int = 48
    labels: int = 2
    seed: int = 0

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.tokens} M{self.experts} r{self.bottleneck} {self.model}"

    def batches(self, vocab_size: int, count: int) -> list[tuple[Inputs, torch.Tensor]]:
        """`count` batches of random token ids and labels, no padding."""
        generator = torch.Generator().manual_seed(self.seed)
        made = []
        for _ in range(count):
            ids = torch.randint(0, vocab_size, (self.batch, self.tokens), generator=generator)
            labels = torch.randint(0, self.labels, (self.batch,), generator=generator)
            made.append(({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels))
        return made


@dataclass
class Contender:
    """A model in training mode, its loss on (inputs, labels) of the batch before doubling, its optimizer."""

    name: str
    model: nn.Module
    loss: Callable[[Inputs, torch.Tensor], torch.Tensor]
    optimizer: torch.optim.Optimizer

    def step(self, inputs: Inputs, labels: torch.Tensor) -> None:
        """Forward, loss, backward, AdamW step, zero_grad."""
        self.loss(inputs, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def load_base(workload: Workload) -> nn.Module:
    """The encoder with a fresh classification head; "tiny" is a random BERT of two layers, for smoke runs."""
    torch.manual_seed(workload.seed)
    if workload.model != "tiny":
        return load_classifier(resolve_model(workload.model), [str(i) for i in range(workload.labels)])[0]
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=workload.labels))


def build(name: str, base: nn.Module, workload: Workload) -> Contender:
    """The contender `name` on a copy of `base`; ImportError for PEFT LoRA where peft is not installed."""
    torch.manual_seed(workload.seed)
    model = _adapted(base, workload, workload.experts if name == ADAMIX else 1)
    if name not in (ADAMIX, ONE_EXPERT):
        model = _peer(name, copy.deepcopy(base), model, workload)
    model.train()
    loss = original_loss if name == ORIGINAL else doubled_loss
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Contender(
        name, model, lambda inputs, labels: loss(model, inputs, labels), torch.optim.AdamW(trainable, lr=1e-4)
    )


def _adapted(base: nn.Module, workload: Workload, experts: int) -> nn.Module:
    config = AdaMixConfig(num_experts=experts, bottleneck=workload.bottleneck, share="up", activation="gelu")
    return adapt(copy.deepcopy(base), config)


def doubled_loss(model: nn.Module, inputs: Inputs, labels: torch.Tensor) -> torch.Tensor:
    return adamix_loss(model(**double_batch(inputs)).logits, labels).loss


def _peer(name: str, model: nn.Module, adapted: nn.Module, workload: Workload) -> nn.Module:
    """`name` on `model`, with adapters where `adapted` has them and the same other parameters trainable."""
    others = trainable_outside(adapted)
    if name == LORA:
        model = peft_lora(model, workload.bottleneck)
        _unfreeze(model.get_base_model(), others)
        return model
    model.requires_grad_(False)
    _unfreeze(model, others)
    for path in adapted.adamix.paths:
        base = model.get_submodule(path)
        hidden = base.out_features
        if name == PLAIN:
            adapter = PlainAdapter(base, hidden, workload.bottleneck)
        else:
            adapter = OriginalAdapter(base, hidden, workload.bottleneck, num_down=workload.experts, num_up=1)
        model.set_submodule(path, adapter)
    return model


def trainable_outside(adapted: nn.Module) -> list[str]:
    inside = tuple(f"{path}." for path in adapted.adamix.paths)
    return [n for n, p in adapted.named_parameters() if p.requires_grad and not n.startswith(inside)]


def _unfreeze(model: nn.Module, names: list[str]) -> None:
    for name in names:
        model.get_parameter(name).requires_grad_(True)
