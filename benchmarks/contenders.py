"""The training steps that are compared: AdaMix on a doubled batch, one adapter, the published way, PEFT LoRA."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from adamix_kernels import adamix_loss
from adamix_kernels.models import AdaMixConfig, adapt, double_batch, use_experts
from adamix_kernels.tasks.encoders import load_classifier, resolve_model

from .original import OriginalAdapter, original_loss
from .peers import PlainAdapter, peft_lora

logger = logging.getLogger(__name__)

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
    loss = original_loss if name == ORIGINAL else _doubled_loss
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Contender(
        name, model, lambda inputs, labels: loss(model, inputs, labels), torch.optim.AdamW(trainable, lr=1e-4)
    )


def _adapted(base: nn.Module, workload: Workload, experts: int) -> nn.Module:
    config = AdaMixConfig(
        method="adapter", num_experts=experts, bottleneck=workload.bottleneck, share="up", activation="gelu"
    )
    return adapt(copy.deepcopy(base), config)


def _doubled_loss(model: nn.Module, inputs: Inputs, labels: torch.Tensor) -> torch.Tensor:
    return adamix_loss(model(**double_batch(inputs)).logits, labels).loss


def _peer(name: str, model: nn.Module, adapted: nn.Module, workload: Workload) -> nn.Module:
    """`name` on `model`, with adapters where `adapted` has them and the same other parameters trainable."""
    places = adapted.adamix.layers
    others = _trainable_outside(adapted)
    if name == LORA:
        model = peft_lora(model, workload.bottleneck)
        _unfreeze(model.get_base_model(), others)
        return model
    model.requires_grad_(False)
    _unfreeze(model, others)
    for path in places:
        base = model.get_submodule(path)
        hidden = base.out_features
        if name == PLAIN:
            adapter = PlainAdapter(base, hidden, workload.bottleneck)
        else:
            adapter = OriginalAdapter(base, hidden, workload.bottleneck, num_down=workload.experts, num_up=1)
        model.set_submodule(path, adapter)
    return model


def _trainable_outside(adapted: nn.Module) -> list[str]:
    inside = tuple(f"{path}." for path in adapted.adamix.layers)
    return [n for n, p in adapted.named_parameters() if p.requires_grad and not n.startswith(inside)]


def _unfreeze(model: nn.Module, names: list[str]) -> None:
    for name in names:
        model.get_parameter(name).requires_grad_(True)


def agreement_problem(base: nn.Module, workload: Workload) -> str | None:
    """What is wrong, or None: the AdaMix step with fixed experts against the published way with the same ones.

    Loss and every gradient, dropout off, float32, on at most 4 x 16 tokens. The published way in float64
    is the truth; the AdaMix step may err at most 4 times what the published way errs in float32.
    """
    small = Workload(**{**vars(workload), "batch": min(4, workload.batch), "tokens": min(16, workload.tokens)})
    base = copy.deepcopy(base)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours = build(ADAMIX, base, small).model
    published = build(ORIGINAL, base, small).model
    _copy_experts(ours, published)
    truth = copy.deepcopy(published).double()
    (inputs, labels), = small.batches(base.config.vocab_size, 1)  # fmt: skip
    last = small.experts - 1
    for pair in ((0, last), (last // 2, last // 2), (last, 0)):
        right = _published_gradients(truth, inputs, labels, pair, ours)
        allowed = 4 * max(_error(_published_gradients(published, inputs, labels, pair, ours), right), 2.0**-23)
        error = _error(_our_gradients(ours, inputs, labels, pair), right)
        logger.info("experts %s: error %.2e, allowed %.2e", pair, error, allowed)
        if not error <= allowed:
            return f"with experts {pair} the loss or a gradient errs by {error:.2e} of its size, allowed {allowed:.2e}"
    return None


def _copy_experts(ours: nn.Module, published: nn.Module) -> None:
    with torch.no_grad():
        for path, layer in ours.adamix.layers.items():
            for side in ("down", "up"):
                for m, expert in enumerate(getattr(published.get_submodule(path), side).experts):
                    expert.weight.copy_(getattr(layer.adapter, f"{side}_weight")[m])
                    expert.bias.copy_(getattr(layer.adapter, f"{side}_bias")[m])


def _our_gradients(model: nn.Module, inputs: Inputs, labels: torch.Tensor, pair: tuple[int, int]) -> Inputs:
    model.zero_grad()
    rows = labels.shape[0]
    with use_experts(model, torch.tensor(pair).repeat_interleave(rows)):
        loss = _doubled_loss(model, inputs, labels)
        loss.backward()
    found = {name: model.get_parameter(name).grad for name in _trainable_outside(model)}
    for path, layer in model.adamix.layers.items():
        for bank in ("down_weight", "down_bias", "up_weight", "up_bias"):
            found[f"{path}.{bank}"] = getattr(layer.adapter, bank).grad
    return {"loss": loss.detach(), **found}


def _published_gradients(
    model: nn.Module, inputs: Inputs, labels: torch.Tensor, pair: tuple[int, int], ours: nn.Module
) -> Inputs:
    """Under the names of `_our_gradients`: experts stacked, zeros for one that was not used."""
    model.zero_grad()
    loss = original_loss(model, inputs, labels, pair)
    loss.backward()
    found = {name: model.get_parameter(name).grad for name in _trainable_outside(ours)}
    for path in ours.adamix.layers:
        for side in ("down", "up"):
            for kind in ("weight", "bias"):
                bank = [getattr(e, kind) for e in getattr(model.get_submodule(path), side).experts]
                found[f"{path}.{side}_{kind}"] = torch.stack(
                    [torch.zeros_like(p) if p.grad is None else p.grad for p in bank]
                )
    return {"loss": loss.detach(), **found}


def _error(found: Inputs, right: Inputs) -> float:
    """Largest error of any tensor, relative to that tensor's largest entry; inf where one is missing."""
    errors = []
    for name, truth in right.items():
        value = found[name]
        if value is None or not value.isfinite().all():
            return float("inf")
        scale = truth.abs().max().clamp_min(torch.finfo(truth.dtype).tiny)
        errors.append(((value.double() - truth).abs().max() / scale).item())
    return max(errors)
