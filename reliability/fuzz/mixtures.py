"""Random calls of mixture_lora."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from adamix_kernels.ops._dropout import keep_mask
from adamix_kernels.routing import mixture_lora

from ..numerics import plain
from .case import Case
from .draws import FINITE, Draw, Sizes
from .loras import offsets_of

# What is chosen of logits that overflow, or of NaN, tests say.
_VALUES = ("normal", "normal", "zeros")


@st.composite
def mixture_lora_cases(draw, dtypes, sizes: Sizes, whole: bool = False) -> Case:
    """whole: features, columns and ranks that fill pieces of 16 bytes."""
    d = Draw(draw, dtypes)
    batch, tokens = d.size(sizes.batch), d.size(sizes.tokens) + sizes.more_rows
    features, r, per_group = d.size(sizes.features), d.size(sizes.rank), d.size(sizes.features)
    experts, groups = d.choose((2, 3, 4, 8, 9, 17)), d.choose((1, 1, 2))
    banks = d.choose(((experts, experts), (experts, experts), (1, experts), (experts, 1)))
    offsets, width = offsets_of(d, groups, per_group)
    if whole:
        features, r, per_group, width = 8 * features, 4 * r, 8 * per_group, 8 * width
        offsets = tuple(8 * offset for offset in offsets)
    top_k, with_base, dropout_p = d.choose((None, 1, experts - 1)), d.flag(), d.choose((0, 0, 0.3))
    seed, scaling, inplace = d.choose((0, -1, 11)), d.choose((1, 1.7, -0.25, 0)), with_base and d.flag()
    width = width if with_base else max(offsets) + per_group
    layouts = {"layouts": ("contiguous", "misaligned")} if inplace else {}
    tensors = (
        d.tensor("x", batch, tokens, features, values=_VALUES),
        d.tensor("lora_a", banks[0], groups * r, features, values=FINITE),
        d.tensor("lora_b", banks[1], groups * per_group, r, values=FINITE),
        d.tensor("router", experts, features, values=_VALUES, dtype=d.choose((d.dtype, torch.float32))),
        d.tensor("base", batch, tokens, width, **layouts) if with_base else None,
    )
    d.said.append(
        f"top_k {top_k}, groups {groups}, offsets {offsets}, dropout {dropout_p} {seed=} {scaling=} {inplace=}"
    )
    keep = None
    if dropout_p:
        keep = keep_mask(torch.tensor(seed), batch * tokens, features, dropout_p).view(batch, tokens, features)

    def op(backend, x, lora_a, lora_b, router, base):
        options = dict(scaling=scaling, groups=groups, output_offsets=offsets, dropout_p=dropout_p, seed=seed)
        options |= dict(base=base.clone() if inplace else base, inplace=inplace, top_k=top_k)
        made = mixture_lora(x, lora_a, lora_b, router, **options, backend=backend)
        return made.out, torch.cat((made.gates, made.logits), -1)

    def definition(x, lora_a, lora_b, router, base):
        base = x.new_zeros(batch, tokens, width) if base is None else base
        logits = F.linear(x, router.to(x.dtype))
        logits = logits if x.dtype == torch.float64 else logits.float()
        gates, index = logits.softmax(-1), None
        if top_k is not None and top_k < experts:
            index = gates.detach().sort(stable=True, dim=-1, descending=True).indices[..., :top_k]
            gates = gates.gather(-1, index)
            gates = gates / gates.sum(-1, keepdim=True)
        ids = tuple(index if bank > 1 else None for bank in banks)
        out = plain.gated_lora(
            x, lora_a, lora_b, base, gates, ids, scaling, groups, offsets, keep, dropout_p, "outputs"
        )  # fmt: skip
        return out, torch.cat((gates, logits), -1)

    return Case("mixture_lora", tensors, op, definition, d.incoming(batch, tokens, width), d.said)
