"""routed_adapter with gates, dense and two chosen experts a token, beside routing by token at the same shapes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from adamix_kernels import routed_adapter

from .op_cases import Case, Draw, Inputs, ours

# Counted only. leaves: x [B, S, H], down_weight [M, r, H], down_bias [M, r], up_weight [M or 1, H, r], up_bias,
# gates where there are some; extra: the index, or None.
_BATCH, _TOKENS, _HIDDEN, _CHOSEN = 16, 512, 1024, 2
_SIZES = ((4, 8), (4, 16), (8, 8), (8, 16))
_FORMS = ("dense", "top2", "token")


def cases(which: str, device: torch.device) -> Iterator[Case]:
    """Of "count" alone: every size and form with banks of M experts, and of one with a shared bank up."""
    if which != "count":
        return
    moved = _BATCH * _TOKENS * _HIDDEN * 2
    for form in _FORMS:
        for experts, r in _SIZES:
            for shared in (False, True) if (experts, r) == (4, 16) else (False,):
                products = 2.0 * _BATCH * _TOKENS * _HIDDEN * r * {"dense": experts, "top2": _CHOSEN, "token": 1}[form]
                name = f"{_BATCH}x{_TOKENS}x{_HIDDEN} r{r} M{experts} {form}{' shared' if shared else ''}"
                yield Case(
                    op="gated_adapter",
                    shape=name,
                    dtype=torch.bfloat16,
                    make=functools.partial(_inputs, form, experts, r, shared),
                    plain=functools.partial(_call, "reference"),
                    contenders=ours("gated_adapter", device, lambda backend: functools.partial(_call, backend)),
                    traffic={"forward": 2 * moved, "backward": 3 * moved},
                    operations={"forward": 2 * products, "backward": 4 * products},
                )


def _inputs(form: str, experts: int, r: int, shared: bool, draw: Draw) -> Inputs:
    x = draw.normal(_BATCH, _TOKENS, _HIDDEN)
    ups = 1 if shared else experts
    down, up = draw.normal(experts, r, _HIDDEN, scale=_HIDDEN**-0.5), draw.normal(ups, _HIDDEN, r, scale=r**-0.5)
    leaves = [x, down, draw.normal(experts, r), up, draw.normal(ups, _HIDDEN)]
    index = None
    if form == "top2":
        index = draw.normal(_BATCH, _TOKENS, experts).topk(_CHOSEN, -1).indices
    elif form == "token":
        index = draw.index(experts, _BATCH, _TOKENS)
    if form != "token":
        leaves.append(draw.normal(_BATCH, _TOKENS, experts if index is None else _CHOSEN).float().softmax(-1))
    return Inputs(tuple(leaves), (index,), draw.normal(*x.shape))


def _call(backend: str, *given: Any) -> torch.Tensor:
    *leaves, index = given
    x, down, down_bias, up, up_bias, *gates = leaves
    return routed_adapter(
        x, down, down_bias, up, up_bias, index, None if len(up) == 1 else index,
        gates=gates[0] if gates else None, residual=x, backend=backend,
    )  # fmt: skip
