"""Random calls of routed_adapter."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from adamix_kernels.functional import routed_adapter

from ..numerics import plain
from .case import Case
from .draws import FINITE, VALUES, Draw, Sizes


@st.composite
def routed_adapter_cases(
    draw, dtypes, sizes: Sizes, whole: bool = False, one_up: bool = False, many: bool = False
) -> Case:
    """whole: features in whole pieces of 64, ranks of 4, and samples of a tile's rows, which mostly have one expert
    each. one_up: one expert above. many: ranks, in whole pieces, and samples of half a long tile's rows at least."""
    d = Draw(draw, dtypes)
    batch, tokens = d.size(sizes.batch), d.size(sizes.tokens) + sizes.more_rows
    hidden, r = d.size(sizes.features), d.size(sizes.rank)
    if whole:
        batch, tokens, hidden, r = max(1, batch), tokens + 24, 64 * d.integer(4, 6), 4 * d.integer(1, 4)
        d.mostly_aligned()
    if many:
        batch, tokens, hidden, r = max(1, batch), tokens + 32, 128, 8 * d.integer(3, 8)
    rows = batch * tokens
    md, mu = (d.integer(1, 4) for _ in range(2))
    mu = 1 if one_up else mu
    residual = d.choose(("none", "input", "other"))
    out = hidden if whole or many or residual == "input" else d.choose((hidden, d.size(sizes.features)))
    activation = d.choose(tuple(plain.ACTIVATIONS))
    # Padding may make NaN of a row's infinity, which only ReLU, and no rank at all, turn into a finite number.
    x = d.tensor("x", batch, tokens, hidden, values=VALUES if r and activation != "relu" else FINITE)
    tensors = (
        x,
        d.tensor("down_weight", md, r, hidden, values=FINITE),
        d.tensor("down_bias", md, r, values=FINITE) if d.flag() else None,
        d.tensor("up_weight", mu, out, r, values=FINITE),
        d.tensor("up_bias", mu, out, values=FINITE) if d.flag() else None,
        d.tensor("residual", batch, tokens, out) if residual == "other" else None,
    )
    kinds = ("sample", "sample", "sample", "token") if whole else ("sample", "token")
    i, j = d.index("down_index", md, batch, tokens, kinds), d.index("up_index", mu, batch, tokens, kinds)
    d.said.append(f"activation {activation}, residual {residual}")

    def op(backend, x, down_weight, down_bias, up_weight, up_bias, other):
        added = x if residual == "input" else other
        banks = down_weight, down_bias, up_weight, up_bias
        return (routed_adapter(x, *banks, i, j, residual=added, activation=activation, backend=backend),)

    def definition(x, down_weight, down_bias, up_weight, up_bias, other):
        down_bias = x.new_zeros(md, r) if down_bias is None else down_bias
        up_bias = x.new_zeros(mu, out) if up_bias is None else up_bias
        added = x if residual == "input" else other
        exact = x.dtype == torch.float64 != d.dtype
        return (plain.adapter(x, down_weight, down_bias, up_weight, up_bias, i, j, added, activation, exact),)

    return Case(
        "routed_adapter", tensors, op, definition, d.incoming(batch, tokens, out), d.said,
        integers=tuple(t for t in (i, j) if t is not None),
        unused=[
            (position, unused_experts(index, experts, rows))
            for position, index, experts in ((1, i, md), (2, i, md), (3, j, mu), (4, j, mu))
            if tensors[position] is not None
        ],
        summed_together=(*((1,) if by_token(i) else ()), *((3,) if by_token(j) else ())),
    )  # fmt: skip


def by_token(index: torch.Tensor | None) -> bool:
    return index is not None and index.dim() == 2


def unused_experts(index: torch.Tensor | None, experts: int, rows: int) -> torch.Tensor:
    """Which experts no row takes: bool [experts]."""
    unused = torch.ones(experts, dtype=torch.bool)
    if rows:
        unused[torch.zeros(1, dtype=torch.int64) if index is None else index.long().reshape(-1)] = False
    return unused
