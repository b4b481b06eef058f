"""Random calls of mixture_lora."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from adamix_kernels.ops._dropout import keep_mask
from adamix_kernels.routing import mixture_lora

from ..numerics import plain
from .case import Case
from .draws import FINITE, MANY, Draw, Sizes
from .loras import offsets_of

# What is chosen of logits that overflow, or of NaN, tests say.
_VALUES = ("normal", "normal", "zeros")


@st.composite
def mixture_lora_cases(draw, dtypes, sizes: Sizes, whole: bool = False, many: bool = False) -> Case:
    """whole: features, columns and ranks that fill pieces of 16 bytes. many: experts that no single tile holds.

    x and the router are rounded to integers, whose logits are exact in every dtype, so that all choose alike.
    """
    d = Draw(draw, dtypes)
    batch, tokens = d.size(sizes.batch), d.size(sizes.tokens) + sizes.more_rows
    features, r, per_group = d.size(sizes.features), d.size(sizes.rank), d.size(sizes.features)
    experts = d.choose((2, 3, 4, 7, 9))
    if many:
        experts, r = MANY
    banks = d.choose(((experts, experts), (experts, experts), (1, experts), (experts, 1)))
    groups = d.choose((1, 1, 2, 3))
    offsets, width = offsets_of(d, groups, per_group)
    if whole:
        features, r, per_group, width = 8 * features, 4 * r, 8 * per_group, 8 * width
        offsets = tuple(8 * offset for offset in offsets)
    with_base, dropout_p, seed = d.flag(), d.choose((0, 0, 0.3)), d.choose((0, -1, 11))
    scaling, top_k = d.choose((1, 1.7, -0.25, 0)), d.choose((None, 1, min(2, experts - 1), experts))
    inplace = with_base and d.flag()
    width = width if with_base else max(offsets) + per_group
    layouts = {"layouts": ("contiguous", "misaligned")} if inplace else {}
    wide = torch.float64 if d.dtype == torch.float64 else torch.float32
    tensors = (
        d.tensor("x", batch, tokens, features, values=_VALUES),
        d.tensor("lora_a", banks[0], groups * r, features, values=FINITE),
        d.tensor("lora_b", banks[1], groups * per_group, r, values=FINITE),
        d.tensor("router", experts, features, values=_VALUES),
        d.tensor("base", batch, tokens, width, **layouts) if with_base else None,
    )
    d.said.append(
        f"{top_k=}, groups {groups}, offsets {offsets}, dropout {dropout_p} seed {seed}, {scaling=}, {inplace=}"
    )
    dense = top_k in (None, experts)
    keep = None
    if dropout_p:
        keep = keep_mask(torch.tensor(seed), batch * tokens, features, dropout_p).view(batch, tokens, features)

    def op(backend, x, lora_a, lora_b, router, base):
        options = dict(scaling=scaling, groups=groups, output_offsets=offsets, dropout_p=dropout_p, seed=seed)
        options |= dict(base=base.clone() if inplace else base, inplace=inplace, top_k=top_k, backend=backend)
        made = mixture_lora(_rounded(x), lora_a, lora_b, _rounded(router), **options)
        return (torch.cat((made.out.to(made.gates.dtype), made.gates, made.logits), -1),)

    def definition(x, lora_a, lora_b, router, base):
        base = x.new_zeros(batch, tokens, width) if base is None else base
        x = _rounded(x)
        logits = F.linear(x, _rounded(router))
        logits = logits if x.dtype == torch.float64 else logits.float()
        gates, index = logits.softmax(-1), None
        if not dense:
            index = _largest(logits, top_k)
            gates = gates.gather(-1, index)
            gates = gates / gates.sum(-1, keepdim=True)
        indices = [None if bank == 1 else index for bank in banks]
        out = plain.gated_lora(
            x, lora_a, lora_b, base, gates, indices, scaling, groups, offsets, keep, dropout_p, "outputs"
        )
        return (torch.cat((out.to(gates.dtype), gates, logits), -1),)

    incoming = d.tensor(
        "incoming", batch, tokens, width + (experts if dense else top_k) + experts, values=_VALUES, dtype=wide
    )
    unused = torch.full((experts,), batch * tokens == 0)
    if not dense and batch * tokens:
        logits = F.linear(_rounded(tensors[0]).double(), _rounded(tensors[3]).double())
        unused[:] = True
        unused[_largest(logits, top_k).flatten()] = False
    return Case(
        "mixture_lora", tensors, op, definition, incoming, d.said,
        unused=[(n, unused) for n, bank in ((1, banks[0]), (2, banks[1])) if bank > 1],
    )  # fmt: skip


def _largest(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    return logits.detach().sort(stable=True, dim=-1, descending=True).indices[..., :top_k]


def _rounded(t: torch.Tensor) -> torch.Tensor:
    """To integers, with the gradient of no rounding."""
    return t + (t.round() - t).detach()
