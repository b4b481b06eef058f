"""What is measured: for every public op, inputs at a scale, the op on a backend, and its definition in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from adamix_kernels import functional as ak
from adamix_kernels.ops._dropout import keep_mask

from . import plain

Tensors = tuple[torch.Tensor, ...]
# Draws are cut here, so that 1e4 of them still fit into float16.
_WIDEST = 4.0
_SEED = 11


@dataclass(frozen=True)
class Case:
    """One way of calling a public op.

    draw(scale, dtype, generator): the differentiable tensors, in dtype, whose activations or logits are of `scale`;
        the generator is float64's, so that every dtype gets the same numbers, rounded.
    forward: names of the outputs; leaves: names of the tensors, None for one without a gradient.
    op(backend, *tensors), definition(exact, *tensors): the outputs, the first one differentiable.
    incoming: the gradient that comes in, by its scale; None for a scalar's, which is `loss_scale`.
    only: the backends that serve it, None for all.
    """

    op_name: str
    variant: str
    draw: Callable[[float, torch.dtype, torch.Generator], Tensors]
    forward: tuple[str, ...]
    leaves: tuple[str | None, ...]
    op: Callable[..., Tensors]
    definition: Callable[..., Tensors]
    incoming: float | None = None
    loss_scale: float = 1.0
    only: tuple[str, ...] | None = None

    @property
    def names(self) -> list[tuple[str, str]]:
        """(direction, name) of every output, then of every gradient."""
        gradients = [("backward", name) for name in self.leaves if name is not None]
        return [*(("forward", name) for name in self.forward), *gradients]

    def served_by(self, backend: str) -> bool:
        return self.only is None or backend in self.only


def cases() -> Iterator[Case]:
    yield from _adapters()
    yield from _loras()
    yield from _merges()
    yield from _consistencies()
    yield from _doubled()
    yield from _linear()


def _randn(generator, *shape, scale=1.0):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).clamp_(-_WIDEST, _WIDEST) * scale


def _rounded(dtype, *tensors):
    return tuple(t.to(dtype) for t in tensors)


def _index(kind, experts, batch, tokens):
    """Expert ids that leave none of them out: a fixed pattern."""
    if kind is None:
        return None
    ids = torch.arange(batch * tokens if kind == "token" else batch) * 7 % experts
    return ids.view(batch, tokens) if kind == "token" else ids


def _adapters():
    batch, tokens, hidden, rank = 4, 32, 48, 8

    def case(variant, activation="gelu", down="sample", up=None, residual=True, bias=0.0):
        experts = [1 if kind is None else 3 for kind in (down, up)]
        i, j = (_index(kind, m, batch, tokens) for kind, m in zip((down, up), experts))

        def draw(scale, dtype, generator):
            n = lambda *shape, scale=1.0: _randn(generator, *shape, scale=scale)  # noqa: E731
            return _rounded(
                dtype, n(batch, tokens, hidden, scale=scale),
                n(experts[0], rank, hidden, scale=0.5 / hidden**0.5), n(experts[0], rank, scale=0.1) + bias,
                n(experts[1], hidden, rank, scale=0.5 / rank**0.5), n(experts[1], hidden, scale=0.1 * scale),
            )  # fmt: skip

        def op(backend, x, *banks):
            added = x if residual else None
            return (ak.routed_adapter(x, *banks, i, j, residual=added, activation=activation, backend=backend),)

        def definition(exact, x, *banks):
            return (plain.adapter(x, *banks, i, j, x if residual else None, activation, exact),)

        leaves = ("x", "down_weight", "down_bias", "up_weight", "up_bias")
        return Case("routed_adapter", variant, draw, ("out",), leaves, op, definition, incoming=1 / 16)

    for activation in plain.ACTIVATIONS:
        yield case(str(activation), activation)
    yield case("per token, no residual", down="token", up="token", residual=False)
    yield case("GELU's tail", bias=-5.0, residual=False)
    yield case("tanh GELU's tail", "gelu_tanh", bias=-5.0, residual=False)


def _loras():
    batch, tokens, features, rank, width = 4, 32, 48, 4, 16

    def case(variant, a="sample", b=None, groups=1, dropout_p=0.0):
        experts = [1 if kind is None else 3 for kind in (a, b)]
        i, j = (_index(kind, m, batch, tokens) for kind, m in zip((a, b), experts))
        offsets = tuple(2 * g * width for g in range(groups))
        columns = (2 * groups - 1) * width
        keep = None
        if dropout_p:
            keep = keep_mask(torch.tensor(_SEED), batch * tokens, features, dropout_p).view(batch, tokens, features)

        def draw(scale, dtype, generator):
            n = lambda *shape, scale=1.0: _randn(generator, *shape, scale=scale)  # noqa: E731
            return _rounded(
                dtype, n(batch, tokens, features, scale=scale),
                n(experts[0], groups * rank, features, scale=0.5 / features**0.5),
                n(experts[1], groups * width, rank, scale=0.5 / rank**0.5), n(batch, tokens, columns, scale=scale / 2),
            )  # fmt: skip

        def op(backend, x, lora_a, lora_b, base):
            options = dict(scaling=1.7, groups=groups, output_offsets=offsets, dropout_p=dropout_p, seed=_SEED)
            return (ak.routed_lora(x, lora_a, lora_b, i, j, base=base, **options, backend=backend),)

        def definition(exact, x, lora_a, lora_b, base):
            return (plain.lora(x, lora_a, lora_b, base, i, j, 1.7, groups, offsets, keep, dropout_p),)

        leaves = ("x", "lora_a", "lora_b", "base")
        return Case("routed_lora", variant, draw, ("out",), leaves, op, definition, incoming=1 / 16)

    yield case("per sample")
    yield case("per token, two groups", "token", "token", groups=2)
    yield case("dropout 0.25", dropout_p=0.25)


def _merges():
    shape = 4, 24, 40

    def experts(variant, with_scores, spread=1.0, swept="bank"):
        def draw(scale, dtype, generator):
            sizes = (1.0, scale) if swept == "scores" else (scale, 1.0)
            common = _randn(generator, *shape[1:]) * (1 - spread)
            bank = (common + _randn(generator, *shape, scale=spread)).mul_(sizes[0])
            return _rounded(dtype, bank, _randn(generator, shape[0], scale=sizes[1]))

        def op(backend, bank, scores):
            return (ak.merge_experts(bank, scores if with_scores else None, backend=backend),)

        def definition(exact, bank, scores):
            return (plain.mean_of_experts(bank, scores if with_scores else None),)

        leaves = ("bank", "scores" if with_scores else None)
        return Case("merge_experts", variant, draw, ("out",), leaves, op, definition, incoming=1 / 1024)

    yield experts("uniform", False)
    yield experts("scored", True)
    yield experts("the scores swept", True, swept="scores")
    yield experts("experts nearly equal", True, spread=1e-2)

    def lora(variant, groups, banked):
        rows, features, rank, width = 64, 48, 4, 16
        offsets = tuple(2 * g * width for g in range(groups))
        experts = 3 if banked else 1

        def draw(scale, dtype, generator):
            n = lambda *shape, scale=1.0: _randn(generator, *shape, scale=scale)  # noqa: E731
            return _rounded(
                dtype, n(rows, features, scale=scale), n(experts, groups * rank, features, scale=0.3),
                n(experts, groups * width, rank, scale=0.3 * scale),
            )  # fmt: skip

        def op(backend, *tensors):
            options = dict(scaling=0.5, groups=groups, output_offsets=offsets)
            return (ak.merge_lora(*tensors, **options, backend=backend),)

        def definition(exact, *tensors):
            return (plain.merged_lora(*tensors, 0.5, groups, offsets),)

        leaves = ("weight", "lora_a", "lora_b")
        return Case("merge_lora", variant, draw, ("out",), leaves, op, definition, incoming=1 / 64)

    yield lora("one expert", 1, False)
    yield lora("banks, two groups", 2, True)


def _pair(kind, generator, rows, classes, scale, dtype):
    """The logits of both passes [2 * rows, V], in dtype."""
    a = _randn(generator, rows, classes)
    b = _randn(generator, rows, classes)
    if kind == "apart":
        return (torch.cat([a, b]) * scale).to(dtype)
    if kind == "near":
        # p and q a few roundings of a logit apart.
        return torch.cat([a, a * (1 + 4 * torch.finfo(dtype).eps * b)]).mul_(scale).to(dtype)
    if kind == "shifted":
        # Differences of `scale` between logits of ordinary size: what is left after rounding to dtype.
        return torch.cat([a, a + b * scale]).clamp_(-6e4, 6e4).to(dtype)
    # Two values alone: ties at the maximum.
    return (torch.cat([a, b]).sign() * scale).to(dtype)


KINDS = {
    "apart": "independent logits",
    "near": "p near q",
    "shifted": "logits of 1 and a difference swept",
    "two": "every logit one of two",
}


def _consistencies():
    rows, classes = 16, 37

    def case(kind, detach=True, reduction="batchmean", loss_scale=1.0):
        def draw(scale, dtype, generator):
            return _pair(kind, generator, rows, classes, scale, dtype).chunk(2)

        def op(backend, a, b):
            options = dict(detach_target=detach, reduction=reduction, backend=backend)
            return (ak.consistency_loss(a, b, **options),)

        def definition(exact, a, b):
            losses = plain.symmetric_kl(a, b, detach, exact)
            return (losses if reduction == "none" else losses.mean(),)

        variant = KINDS[kind] + ("" if detach else ", full gradient") + (", per row" if reduction == "none" else "")
        leaves, incoming = ("logits_a", "logits_b"), 1.0 if reduction == "none" else None
        return Case("consistency_loss", variant, draw, ("loss",), leaves, op, definition, incoming, loss_scale)

    for kind in KINDS:
        yield case(kind)
        yield case(kind, detach=False, loss_scale=48.0)
    yield case("near", reduction="none")


def _doubled():
    rows, classes = 16, 37
    labels = torch.arange(rows) * 5 % classes
    labels[3] = -100

    def case(kind, smoothing=0.0, detach=True, loss_scale=1.0, classes=classes):
        ids = labels.clamp(max=classes - 1)

        def draw(scale, dtype, generator):
            return (_pair(kind, generator, rows, classes, scale, dtype),)

        def op(backend, logits):
            options = dict(weight=1.5, label_smoothing=smoothing, detach_target=detach)
            return tuple(ak.adamix_loss(logits, ids, **options, backend=backend))

        def definition(exact, logits):
            return plain.losses(logits, ids, 1.5, smoothing, detach, exact)

        words = [KINDS[kind], f"{classes} classes", *(["smoothing"] if smoothing else [])]
        outputs = ("loss", "cross_entropy", "consistency")
        return Case("adamix_loss", ", ".join(words), draw, outputs, ("logits",), op, definition, None, loss_scale)

    for kind in KINDS:
        yield case(kind)
    yield case("apart", smoothing=0.1, loss_scale=48.0)
    yield case("near", smoothing=0.1, detach=False)
    yield case("apart", classes=2)

    def draw(scale, dtype, generator):
        return _rounded(dtype, _randn(generator, 2 * rows, scale=scale / 64))

    def targets(predictions):
        return torch.linspace(-1, 1, rows, dtype=torch.float32).to(predictions.dtype)

    yield Case(
        "adamix_loss", "regression", draw, ("loss", "cross_entropy", "consistency"), ("logits",),
        lambda backend, x: tuple(ak.adamix_loss(x, targets(x), weight=1.5, backend=backend)),
        lambda exact, x: plain.regression(x, targets(x), 1.5), only=("reference",),
    )  # fmt: skip


def _linear():
    rows, classes, width = 16, 37, 24
    labels = (torch.arange(rows) * 5 % classes).view(2, rows // 2)

    def case(variant, smoothing=0.0, near=False, loss_scale=1.0):
        def draw(scale, dtype, generator):
            n = lambda *shape, scale=1.0: _randn(generator, *shape, scale=scale)  # noqa: E731
            hidden = n(4, rows // 2, width, scale=scale)
            if near:
                hidden[2:] = hidden[:2] * (1 + 4 * torch.finfo(dtype).eps * n(2, rows // 2, width))
            return _rounded(dtype, hidden, n(classes, width, scale=0.5 / width**0.5), n(classes, scale=0.1 * scale))

        def op(backend, hidden, head, bias):
            options = dict(weight=1.5, label_smoothing=smoothing, chunk_rows=8, bias=bias)
            return tuple(ak.linear_adamix_loss(hidden, head, labels, **options, backend=backend))

        def definition(exact, hidden, head, bias):
            logits = torch.nn.functional.linear(hidden, head, bias).flatten(0, 1)
            return plain.losses(logits, labels.flatten(), 1.5, smoothing, True, exact)

        leaves, outputs = ("hidden", "lm_head_weight", "bias"), ("loss", "cross_entropy", "consistency")
        return Case("linear_adamix_loss", variant, draw, outputs, leaves, op, definition, None, loss_scale)

    yield case("independent passes")
    yield case("p near q", near=True)
    yield case("smoothing", smoothing=0.1, loss_scale=3.0)
