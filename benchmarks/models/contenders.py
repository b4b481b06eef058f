"""The training steps that are compared: AdaMix on a doubled batch, one adapter, the published way, PEFT LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from adamix_kernels import AdaMixConfig, adamix_loss, adapt, double_batch, linear_adamix_loss
from adamix_kernels.tasks.encoders import load_classifier, resolve_model

from .built import LORA_MODELS, RANDOM, random_batches, random_model
from .names import ADAMIX, LORA, ONE_EXPERT, ORIGINAL, PLAIN, TITLES
from .original import OriginalAdapter, OriginalLoRA, original_lm_loss, original_loss
from .peers import PlainAdapter, PlainLoRA, peft_lora

BACKENDS = {ADAMIX: "reference", ONE_EXPERT: "reference", PLAIN: "torch", ORIGINAL: "torch", LORA: "peft"}
# LoRA's alpha, as in the reference project's GPT-2 runs.
ALPHA = 32.0
__all__ = ["ADAMIX", "BACKENDS", "LORA", "ONE_EXPERT", "ORIGINAL", "PLAIN", "TITLES", "Contender", "Workload", "build"]
Inputs = dict[str, torch.Tensor]
Loss = Callable[[Inputs, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """What is trained and on what: batch B and tokens S before doubling, M experts of width (or rank) bottleneck.

    model: a folder, a hub id or a name of step_models.RANDOM. GPT-2 takes LoRA on q and v and the language-model
    loss, everything else adapters and a classifier's loss.
    """

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

    @property
    def is_lora(self) -> bool:
        return self.model in LORA_MODELS

    def batches(self, vocab_size: int, count: int) -> list[tuple[Inputs, torch.Tensor]]:
        """`count` batches of random token ids and labels, no padding."""
        return random_batches(self.model, vocab_size, self.batch, self.tokens, self.labels, self.seed, count)


@dataclass
class Contender:
    """A model in training mode, its loss on (inputs, labels) of the batch before doubling, its optimizer."""

    name: str
    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer

    def step(self, inputs: Inputs, labels: torch.Tensor) -> None:
        """Forward, loss, backward, AdamW step, zero_grad."""
        self.loss(inputs, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def load_base(workload: Workload) -> nn.Module:
    """The model before adaptation, on the CPU: a random one, or an encoder with a fresh classification head."""
    torch.manual_seed(workload.seed)
    if workload.model in RANDOM:
        return random_model(workload.model, workload.labels)
    return load_classifier(resolve_model(workload.model), [str(i) for i in range(workload.labels)], "model")[0]


def build(
    name: str, base: nn.Module, workload: Workload, *, backend: str = "auto", capturable: bool = False
) -> Contender:  # fmt: skip
    """The contender `name` on a copy of `base`.

    backend: of the AdaMix ops, adapters and loss. capturable: the optimizer may be captured in a CUDA graph.

    Raises ImportError for PEFT LoRA where peft is not installed.
    """
    torch.manual_seed(workload.seed)
    model = _adapted(base, workload, workload.experts if name == ADAMIX else 1, backend)
    if name not in (ADAMIX, ONE_EXPERT):
        model = _peer(name, copy.deepcopy(base), model, workload)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, capturable=capturable)
    return Contender(name, model, loss_of(name, model, workload, backend), optimizer)


def loss_of(name: str, model: nn.Module, workload: Workload, backend: str = "auto") -> Loss:
    """(inputs, labels) -> the scalar that `name` trains `model` with."""
    if name == ORIGINAL:
        chosen = original_lm_loss if workload.is_lora else original_loss
        return lambda inputs, labels: chosen(model, inputs, labels)
    if workload.is_lora:
        return lambda inputs, labels: doubled_lm_loss(model, inputs, labels, backend)
    return lambda inputs, labels: doubled_loss(model, inputs, labels, backend)


def doubled_loss(model: nn.Module, inputs: Inputs, labels: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """adamix_loss of a classifier on the doubled batch."""
    return adamix_loss(model(**double_batch(inputs)).logits, labels, backend=backend).loss


def doubled_lm_loss(model: nn.Module, inputs: Inputs, labels: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """linear_adamix_loss of a language model on the doubled batch: position s predicts label s + 1."""
    outputs = model(**double_batch(inputs), logits_to_keep=1, output_hidden_states=True, use_cache=False)
    head = model.get_output_embeddings().weight
    hidden = outputs.hidden_states[-1][:, :-1]
    return linear_adamix_loss(hidden, head, labels[:, 1:], backend=backend).loss


def trainable_outside(adapted: nn.Module) -> list[str]:
    """Names of the trainable parameters that are no experts: a fresh head."""
    inside = tuple(f"{path}." for path in adapted.adamix.paths)
    return [n for n, p in adapted.named_parameters() if p.requires_grad and not n.startswith(inside)]


def _adapted(base: nn.Module, workload: Workload, experts: int, backend: str) -> nn.Module:
    common = dict(num_experts=experts, share="up")
    if workload.is_lora:
        config = AdaMixConfig(method="lora", r=workload.bottleneck, alpha=ALPHA, dropout=0.0, **common)
    else:
        config = AdaMixConfig(bottleneck=workload.bottleneck, activation="gelu", **common)
    return adapt(copy.deepcopy(base), config, backend=backend)


def _peer(name: str, model: nn.Module, adapted: nn.Module, workload: Workload) -> nn.Module:
    """`name` on `model`, with adapters where `adapted` has them and the same other parameters trainable."""
    others = trainable_outside(adapted)
    if name == LORA:
        model = peft_lora(model, workload.bottleneck, lora=workload.is_lora)
        _unfreeze(model.get_base_model(), others)
        return model
    model.requires_grad_(False)
    _unfreeze(model, others)
    for path in adapted.adamix.paths:
        model.set_submodule(path, _layer(name, model.get_submodule(path), workload))
    return model


def _layer(name: str, base: nn.Module, workload: Workload) -> nn.Module:
    """One adapted place of a peer, on the device of `base`."""
    device, r = base.weight.device, workload.bottleneck
    if workload.is_lora:
        hidden = base.weight.shape[0]
        if name == PLAIN:
            return PlainLoRA(base, hidden, r, ALPHA / r).to(device)
        return OriginalLoRA(base, hidden, r, ALPHA / r, num_a=workload.experts, num_b=1).to(device)
    if name == PLAIN:
        return PlainAdapter(base, base.out_features, r).to(device)
    return OriginalAdapter(base, base.out_features, r, num_down=workload.experts, num_up=1).to(device)


def _unfreeze(model: nn.Module, names: list[str]) -> None:
    for name in names:
        model.get_parameter(name).requires_grad_(True)
