"""What is run to verify an op: for each class of shapes, seeded calls that a kernel is likely to get wrong.

Tails in every dimension, one row, experts that nobody uses, ids repeated and out of order, addresses that are no
multiple of 16 bytes, strided inputs, large magnitudes, more experts than a tile holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..functional import (
    adamix_loss,
    consistency_loss,
    linear_adamix_loss,
    merge_experts,
    merge_lora,
    routed_adapter,
    routed_lora,
)
from ..ops.router.api import router_gates
from . import gated_cases, mixture_cases
from .case import Case, enlarged, ids, rounded, with_seed


def cases(op: str, shape: str) -> tuple[Case, ...]:
    """The cases of a class of shapes of an op."""
    return tuple(_CASES[op, shape]())


def _adapter(residual: str = "input", activation: str = "gelu") -> Callable[..., torch.Tensor]:
    def call(backend: str, leaves: Sequence[Any], extra: Sequence[Any]) -> torch.Tensor:
        x, down, down_bias, up, up_bias, other = leaves
        added = {"input": x, "other": other, "none": None}[residual]
        return routed_adapter(
            x, down, down_bias, up, up_bias, *extra, residual=added, activation=activation, backend=backend
        )

    return call


def _adapter_narrow() -> list[Case]:
    sides = (4, 17, 64), (3, 16, 64), (3, 16), (1, 64, 16), (1, 64), None
    tails = (3, 19, 37), (3, 5, 37), (3, 5), (2, 41, 5), None, (3, 19, 41)
    one = (1, 1, 37), *tails[1:5], (1, 1, 41)
    return [
        Case("samples", sides, _adapter(), ids([2, 0, 2, 0], None)),
        Case("strided", sides, _adapter(), ids([0, 2, 2, 2], None), "strided"),
        Case("large values", sides, _adapter(), ids([2, 0, 2, 0], None), scale=64.0),
        Case("tails, tokens, misaligned", tails, _adapter("other"), ids((3, 3, 19), (2, 3, 19)), "misaligned"),
        Case("one row", one, _adapter("other"), ids([1], [1])),
        Case(
            "many experts above", ((3, 21, 64), (1, 16, 64), (1, 16), (17, 64, 16), (17, 64), None), _adapter(),
            ids(None, (17, 3, 21)),
        ),
        Case(
            "a model's width", ((2, 130, 1024), (4, 16, 1024), (4, 16), (4, 1024, 16), (4, 1024), None), _adapter(),
            ids([3, 1], [0, 3]), large=True,
        ),
        Case(
            "many rows, shared above", ((38, 499, 96), (4, 16, 96), (4, 16), (1, 96, 16), (1, 96), None), _adapter(),
            ids((4, 38), None), large=True,
        ),
    ]  # fmt: skip


def _adapter_wide() -> list[Case]:
    banks = (18, 16, 64), (18, 16), (18, 64, 16), (18, 64), None
    tails = (3, 19, 37), (60, 5, 37), None, (60, 37, 5), None, None
    return [
        Case("tokens", ((3, 21, 64), *banks), _adapter(), ids((18, 3, 21), (18, 3, 21))),
        Case("samples", ((5, 17, 64), *banks), _adapter(), ids((18, 5), (18, 5)), "strided"),
        Case("tails, tokens, misaligned", tails, _adapter("none"), ids((60, 3, 19), (60, 3, 19)), "misaligned"),
    ]


def _lora(**options: Any) -> Callable[..., torch.Tensor]:
    def call(backend: str, leaves: Sequence[Any], extra: Sequence[Any]) -> torch.Tensor:
        x, a, b, base = leaves
        seed = {"seed": extra[2].to(x.device)} if len(extra) > 2 else {}
        # What is overwritten may be no leaf.
        base = base + 0 if options.get("inplace") else base
        return routed_lora(x, a, b, extra[0], extra[1], base=base, backend=backend, **seed, **options)

    return call


def _lora_narrow() -> list[Case]:
    sides = (4, 17, 64), (3, 16, 64), (1, 64, 16), (4, 17, 64)
    tails = (3, 19, 37), (3, 10, 37), (2, 22, 5), (3, 19, 37)
    two = dict(groups=2, output_offsets=(0, 20), scaling=0.5)
    one = (1, 1, 37), *tails[1:3], (1, 1, 37)
    samples = ids([2, 0, 2, 0], None)
    return [
        Case("samples", sides, _lora(scaling=0.5), samples),
        Case("strided", sides, _lora(scaling=0.5), ids([0, 2, 2, 2], None), "strided"),
        Case("in place", sides, _lora(scaling=0.5, inplace=True), samples),
        Case("large values", sides, _lora(scaling=2.0), samples, scale=64.0),
        Case("dropout", (*sides[:3], None), _lora(scaling=0.5, dropout_p=0.25), with_seed(samples)),
        Case("tails, tokens, misaligned", tails, _lora(**two), ids((3, 3, 19), (2, 3, 19)), "misaligned"),
        Case("one row", one, _lora(**two), ids([1], [1])),
        Case(
            "many experts above", ((3, 21, 64), (1, 16, 64), (17, 64, 16), (3, 21, 64)), _lora(),
            ids(None, (17, 3, 21)),
        ),
        Case(
            "a model's width", ((2, 130, 1024), (4, 16, 1024), (4, 1024, 16), (2, 130, 1024)), _lora(scaling=2.0),
            ids([3, 1], [0, 3]), large=True,
        ),
        Case(
            "many rows, shared above", ((38, 499, 96), (4, 16, 96), (1, 96, 16), None), _lora(dropout_p=0.25),
            with_seed(ids((4, 38), None)), large=True,
        ),
    ]  # fmt: skip


def _lora_wide() -> list[Case]:
    banks = (18, 16, 64), (18, 64, 16)
    tails = (3, 19, 37), (60, 5, 37), (60, 37, 5), None
    return [
        Case("tokens", ((3, 21, 64), *banks, (3, 21, 64)), _lora(), ids((18, 3, 21), (18, 3, 21))),
        Case("samples", ((5, 17, 64), *banks, (5, 17, 64)), _lora(), ids((18, 5), (18, 5)), "strided"),
        Case("tails, tokens, misaligned", tails, _lora(), ids((60, 3, 19), (60, 3, 19)), "misaligned"),
    ]


def _merge() -> list[Case]:
    def experts(backend: str, leaves: Sequence[Any], extra: Sequence[Any]) -> torch.Tensor:
        return merge_experts(*leaves, backend=backend)

    def lora(**options: Any) -> Callable[..., torch.Tensor]:
        return lambda backend, leaves, extra: merge_lora(*leaves, backend=backend, **options)

    two = dict(scaling=0.5, groups=2, output_offsets=(0, 24))
    return [
        Case("mean", ((4, 64, 16), None), experts),
        Case("mean, tails, misaligned", ((3, 37, 5), None), experts, placed="misaligned"),
        Case("scores", ((3, 37, 5), (3,)), experts),
        Case("scores, strided, large values", ((4, 64, 16), (4,)), experts, placed="strided", scale=64.0),
        Case("LoRA", ((64, 64), (16, 64), (64, 16)), lora(scaling=2.0)),
        Case("LoRA's experts, groups, tails, misaligned", ((41, 37), (3, 10, 37), (3, 34, 5)), lora(**two),
             placed="misaligned"),
        Case("LoRA of a Conv1D", ((37, 41), (10, 37), (34, 5)), lora(**two, fan_in_fan_out=True)),
        Case("a model's width", ((4, 16, 1024), (4,)), experts, large=True),
    ]  # fmt: skip


def _router(top_k: int | None = None, whole: bool = False) -> Callable[..., Any]:
    """whole: of integers, whose logits are exact in every dtype, so that all backends choose alike, ties too."""

    def call(backend: str, leaves: Sequence[Any], extra: Sequence[Any]) -> Any:
        if whole:
            leaves = [t if t is None else (enlarged if n else rounded)(t) for n, t in enumerate(leaves)]
        gates, index, logits = router_gates(*leaves, top_k=top_k, backend=backend)
        both = torch.cat([gates, logits], -1)
        return both if index is None else (both, index.to(gates.dtype))

    return call


def _routers() -> list[Case]:
    return [
        Case("dense, strided", ((4, 17, 64), (8, 64), None), _router(), placed="strided"),
        Case("dense, tails, misaligned", ((3, 19, 37), (5, 37), (5,)), _router(), placed="misaligned"),
        Case("dense, many experts", ((3, 21, 64), (256, 64), None), _router()),
        Case("two of eight", ((4, 17, 64), (8, 64), None), _router(2, whole=True)),
        Case("one of three, tails", ((3, 19, 37), (3, 37), (3,)), _router(1, whole=True)),
        Case("five of many", ((3, 21, 64), (256, 64), (256,)), _router(5, whole=True)),
        Case("one row", ((1, 1, 37), (5, 37), (5,)), _router(3, whole=True)),
        Case("a model's width", ((2, 130, 1024), (8, 1024), None), _router(), large=True),
    ]


def _loss(**options: Any) -> Callable[..., Any]:
    def call(backend: str, leaves: Sequence[Any], extra: Sequence[Any]) -> Any:
        (logits,), (labels, mask) = leaves, extra
        logits = logits + 0 if options.get("inplace") else logits
        return adamix_loss(logits, labels, mask=mask, backend=backend, **options)

    return call


def _labels(classes: int, *rows: int, masked: bool = False) -> Callable[[torch.Generator], tuple[Any, ...]]:
    def extra(generator: torch.Generator) -> tuple[Any, ...]:
        labels = torch.randint(classes, rows, generator=generator)
        labels.view(-1)[1::5] = -100
        return labels, torch.rand(rows, generator=generator) < 0.7 if masked else None

    return extra


def _pair(backend: str, leaves: Sequence[Any], extra: Sequence[Any]) -> torch.Tensor:
    return consistency_loss(*leaves, reduction="none", backend=backend)


def _linear(backend: str, leaves: Sequence[Any], extra: Sequence[Any]) -> Any:
    hidden, weight, bias = leaves
    return linear_adamix_loss(hidden, weight, *extra, bias=bias, backend=backend)


def _losses(few: bool) -> list[Case]:
    tail, aligned = (37, 64) if few else (5003, 8192)
    rows = (9, 7) if few else (2, 3)
    doubled = 2 * rows[0], *rows[1:]
    own = dict(weight=0.5, label_smoothing=0.1)
    made = [
        Case("tails, misaligned, mask", ((*doubled, tail),), _loss(**own), _labels(tail, *rows, masked=True),
             "misaligned"),
        Case("aligned", ((*doubled, aligned),), _loss(), _labels(aligned, *rows)),
        Case("in place, full KL", ((*doubled, aligned),), _loss(inplace=True, detach_target=False),
             _labels(aligned, *rows)),
        Case("strided, full KL", ((*doubled, tail),), _loss(**own, detach_target=False), _labels(tail, *rows),
             "strided"),
        Case("large values", ((*doubled, aligned),), _loss(), _labels(aligned, *rows), scale=100.0),
        Case("one row", ((1, tail), (1, tail)), _pair),
        Case("every row", ((*rows, tail), (*rows, tail)), _pair),
        Case("from hidden states", ((6, 5, 40), (tail, 40), (tail,)), _linear,
             lambda generator: _labels(tail, 3, 5)(generator)[:1]),
    ]  # fmt: skip
    if few:
        made.append(Case("two classes", ((130, 2),), _loss(**own), _labels(2, 65, masked=True)))
    return made


_CASES: dict[tuple[str, str], Callable[[], Sequence[Case]]] = {
    ("routed_adapter", "narrow"): _adapter_narrow,
    ("routed_adapter", "wide"): _adapter_wide,
    ("routed_lora", "narrow"): _lora_narrow,
    ("routed_lora", "wide"): _lora_wide,
    ("gated_adapter", "narrow"): gated_cases.adapter_narrow,
    ("gated_adapter", "wide"): gated_cases.adapter_wide,
    ("gated_lora", "narrow"): gated_cases.lora_narrow,
    ("gated_lora", "wide"): gated_cases.lora_wide,
    ("router", "any"): _routers,
    ("mixture_lora", "narrow"): mixture_cases.narrow,
    ("mixture_lora", "wide"): mixture_cases.wide,
    ("merge", "any"): _merge,
    ("consistency", "few"): lambda: _losses(few=True),
    ("consistency", "many"): lambda: _losses(few=False),
}
