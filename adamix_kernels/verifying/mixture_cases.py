"""What is run to verify the mixture: dense and chosen, banks of one, groups, dropout, tiles and more than one holds.

Where experts are chosen, x and the router are made integers, whose logits are exact in every dtype: all backends choose
alike, ties too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ops.mixture_lora.api import mixture_lora
from .case import Case, enlarged, ids, rounded, with_seed


def _mixture(
    top_k: int | None = None, seeded: bool = False, single: bool = False, **options: Any
) -> Callable[..., Any]:
    """single: the router is float32 beside 16-bit banks, as a model's is."""

    def call(backend: str, leaves: Sequence[Any], extra: Sequence[Any]) -> Any:
        x, a, b, router, base = leaves
        own: dict[str, Any] = {"seed": extra[0].to(x.device)} if seeded else {}
        if top_k is not None:
            x, router = rounded(x), enlarged(router)
        router = router.float() if single and x.element_size() == 2 else router
        # What is overwritten may be no leaf.
        base = base + 0 if options.get("inplace") else base
        out, gates, index, logits = mixture_lora(
            x, a, b, router, top_k=top_k, base=base, backend=backend, **own, **options
        )
        both = torch.cat([out, gates.to(out.dtype), logits.to(out.dtype)], -1)
        return both if index is None else (both, index.to(gates.dtype))

    return call


def narrow() -> list[Case]:
    base = (4, 17, 64)
    banks = (4, 16, 64), (4, 64, 16), (4, 64)
    tails = (3, 19, 37), (3, 10, 37), (3, 22, 5), (3, 37)
    hydra = (3, 21, 64), (1, 16, 64), (6, 64, 16), (6, 64), (3, 21, 64)
    two: dict[str, Any] = dict(groups=2, output_offsets=(0, 20))
    return [
        Case("dense, strided", (base, *banks, base), _mixture(scaling=0.5), placed="strided"),
        Case("two of four", (base, *banks, base), _mixture(2, scaling=0.5)),
        Case("in place", (base, *banks, base), _mixture(3, single=True, scaling=0.5, inplace=True)),
        Case("dropout", (base, *banks, None), _mixture(2, True, True, scaling=0.5, dropout_p=0.25), with_seed(ids())),
        Case("dense, tails, misaligned", (*tails, (3, 19, 45)), _mixture(**two, scaling=2.0), placed="misaligned"),
        Case("one of three, tails", (*tails, (3, 19, 45)), _mixture(1, **two)),
        Case("one below", hydra, _mixture(single=True)),
        Case("one below, three of six", hydra, _mixture(3)),
        Case("one above", ((3, 21, 64), (6, 16, 64), (1, 64, 16), (6, 64), None), _mixture(2)),
        Case("one row", ((1, 1, 37), *tails[1:], (1, 1, 45)), _mixture(2, **two)),
        Case("a model's width", ((2, 130, 1024), (8, 8, 1024), (8, 1024, 8), (8, 1024), (2, 130, 1024)),
             _mixture(2, single=True, scaling=2.0), large=True),
        Case("three of twelve", ((2, 9, 64), (12, 8, 64), (12, 64, 8), (12, 64), (2, 9, 64)), _mixture(3, single=True)),
    ]  # fmt: skip


def wide() -> list[Case]:
    banks = (18, 16, 64), (18, 64, 16), (18, 64)
    tails = (3, 19, 37), (60, 5, 37), (60, 37, 5), (60, 37)
    return [
        Case("two of many, strided", ((3, 21, 64), *banks, (3, 21, 64)), _mixture(2), placed="strided"),
        Case("dense", ((3, 21, 64), *banks, (3, 21, 64)), _mixture()),
        Case("tails, misaligned", (*tails, None), _mixture(3), placed="misaligned"),
    ]
