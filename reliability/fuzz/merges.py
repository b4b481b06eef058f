"""Random calls of merge_experts, of its form for many banks, and of merge_lora."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from adamix_kernels.functional import merge_experts, merge_lora
from adamix_kernels.ops.merge.api import merge_banks

from ..numerics import plain
from .case import Case
from .draws import ALL_FLOATS, FINITE, HALVES_AND_FLOAT, Draw, Sizes
from .loras import SCALINGS, offsets_of

# Scores far apart leave one expert; all of them infinite leave none, and NaN.
SCORES = ("normal", "normal", "zeros", "huge", "tiny", "one huge", "infinity", "nan")


@st.composite
def merge_experts_cases(draw, dtypes, sizes: Sizes) -> Case:
    d = Draw(draw, dtypes)
    experts, shape = d.integer(1, 5), [d.size(sizes.features) for _ in range(d.integer(0, 3))]
    bank = d.tensor("bank", experts, *shape)
    scores = None
    if d.flag():
        scores = d.tensor("scores", experts, values=SCORES, dtype=d.choose(ALL_FLOATS))

    def op(backend, bank, scores):
        return (merge_experts(bank, scores, backend=backend),)

    incoming = d.incoming(*shape)
    return Case("merge_experts", (bank, scores), op, _mean, incoming, d.said, wide=True)


@st.composite
def merge_banks_cases(draw, dtypes, sizes: Sizes) -> Case:
    """A list of banks in one call, as the merge of a whole model makes it; it has no gradient."""
    d = Draw(draw, dtypes)
    # What the maths of one bank is done in may depend on the others' scores.
    scores_dtype = d.choose(HALVES_AND_FLOAT) if d.dtype != torch.float64 else torch.float64
    banks, scores = [], []
    for n in range(d.integer(1, 4)):
        experts, shape = d.integer(1, 5), [d.size(sizes.features) for _ in range(d.integer(0, 2))]
        banks.append(d.tensor(f"banks[{n}]", experts, *shape))
        scores.append(d.tensor(f"scores[{n}]", experts, values=SCORES, dtype=scores_dtype) if d.flag() else None)
    count = len(banks)

    def op(backend, *given):
        return merge_banks(given[:count], given[count:], backend=backend)

    def definition(*given):
        return [_mean(*pair)[0] for pair in zip(given[:count], given[count:], strict=True)]

    return Case("merge_banks", (*banks, *scores), op, definition, None, d.said, wide=True)


@st.composite
def merge_lora_cases(draw, dtypes, sizes: Sizes, whole: bool = False) -> Case:
    """whole: plain factors of the weight's dtype, of features and ranks that fill pieces of 16 bytes."""
    d = Draw(draw, dtypes)
    features, r = d.size(sizes.features), d.size(sizes.rank)
    groups, per_group = d.choose((1, 1, 2, 3)), d.size(sizes.features)
    offsets, width = offsets_of(d, groups, per_group)
    fan, scaling, factors = d.flag(), d.choose(SCALINGS), d.choose((d.dtype,) if whole else ALL_FLOATS)
    ma, mb = (d.choose(((), (1,)) if whole else ((), (1,), (3,))) for _ in range(2))
    if whole:
        features, r, width = 8 * features, 4 * r, -(-width // 8) * 8
    shape = (features, width) if fan else (width, features)
    tensors = (
        d.tensor("weight", *shape),
        d.tensor("lora_a", *ma, groups * r, features, dtype=factors, values=FINITE),
        d.tensor("lora_b", *mb, groups * per_group, r, dtype=factors, values=FINITE),
    )
    d.said.append(f"groups {groups}, offsets {offsets}, scaling {scaling}, {fan=}, {factors}")

    def op(backend, *given):
        options = dict(scaling=scaling, groups=groups, output_offsets=offsets, fan_in_fan_out=fan)
        return (merge_lora(*given, **options, backend=backend),)

    def definition(weight, lora_a, lora_b):
        a, b = (t if t.dim() == 3 else t.unsqueeze(0) for t in (lora_a, lora_b))
        rows = plain.merged_lora(weight.t() if fan else weight, a, b, scaling, groups, offsets)
        return (rows.t() if fan else rows,)

    return Case(
        "merge_lora", tensors, op, definition, d.incoming(*shape), d.said, wide=True
    )  # fmt: skip


def _mean(bank, scores):
    return (plain.mean_of_experts(bank, scores),)
