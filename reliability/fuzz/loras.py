"""Random calls of routed_lora."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from adamix_kernels.functional import routed_lora
from adamix_kernels.ops._dropout import keep_mask

from ..numerics import plain
from .adapters import by_token, unused_experts
from .case import Case
from .draws import FINITE, VALUES, Draw, Sizes

SCALINGS = (1, 1.7, -0.25, 0, 0.0, 1e-6, 32)


@st.composite
def routed_lora_cases(
    draw, dtypes, sizes: Sizes, whole: bool = False, one_up: bool = False, square: bool = False
) -> Case:
    """whole: features, columns and ranks that fill pieces of 16 bytes. one_up: one expert above, one wide group.
    square: as many columns as features, in steps of 64."""
    d = Draw(draw, dtypes)
    batch, tokens = d.size(sizes.batch), d.size(sizes.tokens) + sizes.more_rows
    features, r = d.size(sizes.features), d.size(sizes.rank)
    rows = batch * tokens
    ma, mb = (d.integer(1, 4) for _ in range(2))
    groups, per_group = d.choose((1, 1, 2, 3)), d.size(sizes.features)
    if one_up:
        mb, groups, features, per_group = 1, 1, 9 + features, 9 + per_group
    offsets, width = ((0,), per_group) if one_up else offsets_of(d, groups, per_group)
    if whole:
        features, r, per_group, width = 8 * features, 4 * r, 8 * per_group, 8 * width
        offsets = tuple(8 * offset for offset in offsets)
    if square:
        features, r = 64 * d.integer(4, 6), 4 * d.integer(1, 4)
        groups, offsets, per_group, width = 1, (0,), features, features
    with_base, dropout_p = d.flag(), d.choose((0, 0.0, 0.3, 0.99))
    seed, scaling = d.choose((0, -1, 2**63 - 1, 11)), d.choose(SCALINGS)
    if d.dtype == torch.float16:
        scaling = scaling and max(scaling, 1e-2, key=abs)  # below 6e-5 its rounding is no longer relative
    inplace = with_base and d.flag()
    width = width if with_base else max(offsets) + per_group
    base_layouts = ("contiguous", "misaligned") if inplace else None
    tensors = (
        d.tensor("x", batch, tokens, features, values=VALUES if r else FINITE),
        d.tensor("lora_a", ma, groups * r, features, values=FINITE),
        d.tensor("lora_b", mb, groups * per_group, r, values=FINITE),
        d.tensor("base", batch, tokens, width, **({"layouts": base_layouts} if base_layouts else {}))
        if with_base
        else None,
    )
    i, j = d.index("a_index", ma, batch, tokens), d.index("b_index", mb, batch, tokens)
    d.said.append(f"groups {groups}, offsets {offsets}, dropout {dropout_p} seed {seed}, scaling {scaling}, {inplace=}")
    keep = None
    if dropout_p:
        keep = keep_mask(torch.tensor(seed), rows, features, dropout_p).view(batch, tokens, features)

    def op(backend, x, lora_a, lora_b, base):
        options = dict(scaling=scaling, groups=groups, output_offsets=offsets, dropout_p=dropout_p, seed=seed)
        target = base.clone() if inplace else base
        return (
            routed_lora(x, lora_a, lora_b, i, j, base=target, inplace=inplace, **options, backend=backend),
        )  # fmt: skip

    def definition(x, lora_a, lora_b, base):
        base = x.new_zeros(batch, tokens, width) if base is None else base
        return (plain.lora(x, lora_a, lora_b, base, i, j, scaling, groups, offsets, keep, dropout_p),)

    return Case(
        "routed_lora", tensors, op, definition, d.incoming(batch, tokens, width), d.said,
        integers=tuple(t for t in (i, j) if t is not None),
        unused=[(1, unused_experts(i, ma, rows)), (2, unused_experts(j, mb, rows))],
        summed_together=(*((1,) if by_token(i) else ()), *((2,) if by_token(j) else ())),
    )  # fmt: skip


def offsets_of(d: Draw, groups: int, per_group: int) -> tuple[tuple[int, ...], int]:
    """First columns of the groups, in any order, with and without gaps, and the width of the output."""
    gap = d.integer(0, 2)
    offsets = [gap + g * (per_group + gap) for g in range(groups)]
    if d.flag():
        offsets.reverse()
    return tuple(offsets), max(offsets) + per_group + d.integer(0, 2)
