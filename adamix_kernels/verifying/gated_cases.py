"""What is run to verify the gated ops: every form of gates and indices, both mixes, banks of one, scales.

Gates are leaves, in the dtype of the case, or float32 where `wide_gates` says so. Nobody chooses the last expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..functional import routed_adapter, routed_lora
from .case import Case, ids, with_seed


def _adapter(
    residual: str = "input", activation: str = "gelu", wide_gates: bool = False, **options: Any
) -> Callable[..., torch.Tensor]:
    def call(backend: str, leaves: Sequence[Any], extra: Sequence[Any]) -> torch.Tensor:
        x, down, down_bias, up, up_bias, gates, other = leaves
        added = {"input": x, "other": other, "none": None}[residual]
        return routed_adapter(
            x, down, down_bias, up, up_bias, extra[0], extra[1], residual=added, activation=activation,
            gates=_widened(gates, wide_gates), backend=backend, **options,
        )  # fmt: skip

    return call


def _lora(scales: bool = False, wide_gates: bool = False, **options: Any) -> Callable[..., torch.Tensor]:
    def call(backend: str, leaves: Sequence[Any], extra: Sequence[Any]) -> torch.Tensor:
        x, a, b, gates, base = leaves
        own: dict[str, Any] = {"seed": extra[2].to(x.device)} if len(extra) > 2 else {}
        # What is overwritten may be no leaf.
        base = base + 0 if options.get("inplace") else base
        if scales:
            own["scaling"] = torch.linspace(0.5, 2, max(len(a), len(b)), device=x.device)
        return routed_lora(
            x, a, b, extra[0], extra[1], base=base, gates=_widened(gates, wide_gates), backend=backend, **own,
            **options,
        )  # fmt: skip

    return call


def _widened(gates: torch.Tensor, wide: bool) -> torch.Tensor:
    return gates.float() if wide and gates.dtype != torch.float64 else gates


_DENSE = ids(None, None)


def adapter_narrow() -> list[Case]:
    sides = (4, 17, 64), (4, 16, 64), (4, 16), (4, 64, 16), (4, 64)
    tails = (3, 19, 37), (3, 5, 37), (3, 5), (3, 41, 5), None
    one_up = (3, 21, 64), (6, 16, 64), (6, 16), (1, 64, 16), (1, 64)
    one_down = (3, 21, 64), (1, 16, 64), None, (6, 64, 16), (6, 64)
    each = (3, 3, 19, 2)
    return [
        Case("dense", (*sides, (4, 17, 4), None), _adapter(), _DENSE),
        Case("dense by sample, weights, strided", (*sides, (4, 4), None), _adapter(mix="weights", wide_gates=True),
             _DENSE, "strided"),
        Case("two of four, large values", (*sides, (4, 17, 2), None), _adapter(wide_gates=True),
             ids((4, 4, 17, 2), (4, 4, 17, 2)), scale=64.0),
        Case("chosen, tails, misaligned", (*tails, (3, 19, 2), (3, 19, 41)), _adapter("other"), ids(each, each),
             "misaligned"),
        Case("chosen by sample, tails", (*tails, (3, 2), (3, 19, 41)), _adapter("other", "relu"),
             ids([[1, 1], [0, 1], [1, 0]], [[0, 1], [1, 1], [0, 0]])),
        Case("one above", (*one_up, (3, 21, 6), None), _adapter("none", "silu"), _DENSE),
        Case("one above, weights", (*one_up, (3, 21, 3), None), _adapter(mix="weights"), ids((6, 3, 21, 3), None)),
        Case("one below", (*one_down, (3, 21, 3), None), _adapter(), ids(None, (6, 3, 21, 3))),
        Case("one below, weights", (*one_down, (3, 6), None), _adapter(mix="weights"), _DENSE),
        Case("one row", ((1, 1, 37), *tails[1:], (1, 1, 3), (1, 1, 41)), _adapter("other"), _DENSE),
        Case("a model's width", ((2, 130, 1024), (8, 8, 1024), (8, 8), (8, 1024, 8), (8, 1024), (2, 130, 2), None),
             _adapter(wide_gates=True), ids((8, 2, 130, 2), (8, 2, 130, 2)), large=True),
    ]  # fmt: skip


def adapter_wide() -> list[Case]:
    banks = (18, 16, 64), (18, 16), (18, 64, 16), (18, 64)
    tails = (3, 19, 37), (60, 5, 37), None, (60, 37, 5), None
    two, three = (18, 3, 21, 2), (60, 3, 19, 3)
    return [
        Case("two of many", ((3, 21, 64), *banks, (3, 21, 2), None), _adapter(wide_gates=True), ids(two, two)),
        Case("two of many, weights", ((3, 21, 64), *banks, (3, 21, 2), None), _adapter(mix="weights"), ids(two, two)),
        Case("dense", ((3, 21, 64), *banks, (3, 21, 18), None), _adapter(), _DENSE),
        Case("by sample, strided", ((5, 17, 64), *banks, (5, 2), None), _adapter(), ids((18, 5, 2), (18, 5, 2)),
             "strided"),
        Case("tails, misaligned", (*tails, (3, 19, 3), None), _adapter("none"), ids(three, three), "misaligned"),
    ]  # fmt: skip


def lora_narrow() -> list[Case]:
    banks = (4, 16, 64), (4, 64, 16)
    base = (4, 17, 64)
    tails = (3, 19, 37), (3, 10, 37), (3, 22, 5)
    hydra = (3, 21, 64), (1, 16, 64), (6, 64, 16)
    two: dict[str, Any] = dict(groups=2, output_offsets=(0, 20))
    each = (3, 3, 19, 2)
    return [
        Case("dense", (base, *banks, (4, 17, 4), base), _lora(scaling=0.5), _DENSE),
        Case("dense by sample, weights, strided", (base, *banks, (4, 4), base),
             _lora(scaling=0.5, mix="weights", wide_gates=True), _DENSE, "strided"),
        Case("in place", (base, *banks, (4, 17, 2), base), _lora(scaling=0.5, inplace=True),
             ids((4, 4, 17, 2), (4, 4, 17, 2))),
        Case("scales, large values", (base, *banks, (4, 17, 2), base), _lora(scales=True, wide_gates=True),
             ids((4, 4, 17, 2), (4, 4, 17, 2)), scale=64.0),
        Case("dropout", (base, *banks, (4, 17, 4), None), _lora(scaling=0.5, dropout_p=0.25), with_seed(_DENSE)),
        Case("chosen, tails, misaligned", (*tails, (3, 19, 2), (3, 19, 45)), _lora(**two, scaling=2.0), ids(each, each),
             "misaligned"),
        Case("chosen by sample, tails, weights", (*tails, (3, 2), (3, 19, 45)), _lora(**two, mix="weights"),
             ids([[1, 1], [0, 1], [1, 0]], [[0, 1], [1, 1], [0, 0]])),
        Case("one below", (*hydra, (3, 21, 6), (3, 21, 64)), _lora(scales=True), _DENSE),
        Case("one below, chosen, weights", (*hydra, (3, 21, 3), (3, 21, 64)), _lora(scales=True, mix="weights"),
             ids(None, (6, 3, 21, 3))),
        Case("one above", ((3, 21, 64), (6, 16, 64), (1, 64, 16), (3, 6), None), _lora(scales=True), _DENSE),
        Case("one row", ((1, 1, 37), *tails[1:], (1, 1, 3), (1, 1, 45)), _lora(**two), _DENSE),
        Case("a model's width", ((2, 130, 1024), (8, 8, 1024), (8, 1024, 8), (2, 130, 2), (2, 130, 1024)),
             _lora(scaling=2.0, wide_gates=True), ids((8, 2, 130, 2), (8, 2, 130, 2)), large=True),
    ]  # fmt: skip


def lora_wide() -> list[Case]:
    banks = (18, 16, 64), (18, 64, 16)
    two, three = (18, 3, 21, 2), (60, 3, 19, 3)
    tails = (3, 19, 37), (60, 5, 37), (60, 37, 5)
    return [
        Case("two of many", ((3, 21, 64), *banks, (3, 21, 2), (3, 21, 64)), _lora(wide_gates=True), ids(two, two)),
        Case("two of many, weights", ((3, 21, 64), *banks, (3, 21, 2), None), _lora(mix="weights"), ids(two, two)),
        Case("dense", ((3, 21, 64), *banks, (3, 21, 18), (3, 21, 64)), _lora(scales=True), _DENSE),
        Case("by sample, strided", ((5, 17, 64), *banks, (5, 2), (5, 17, 64)), _lora(), ids((18, 5, 2), (18, 5, 2)),
             "strided"),
        Case("tails, misaligned", (*tails, (3, 19, 3), None), _lora(scales=True), ids(three, three), "misaligned"),
    ]  # fmt: skip
