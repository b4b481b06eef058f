"""Random calls of router_gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from adamix_kernels.routing import router_gates

from .case import Case
from .draws import Draw, Sizes

# What is chosen of logits that overflow, or of NaN, tests say.
_VALUES = ("normal", "normal", "zeros")


@st.composite
def router_cases(draw, dtypes, sizes: Sizes) -> Case:
    d = Draw(draw, dtypes)
    batch, tokens = d.size(sizes.batch), d.size(sizes.tokens) + sizes.more_rows
    features, experts = d.size(sizes.features), d.choose((1, 2, 3, 8, 17))
    top_k = d.choose((None, 1, min(2, experts), experts))
    tensors = (
        d.tensor("x", batch, tokens, features, values=_VALUES),
        d.tensor("weight", experts, features, values=_VALUES),
        d.tensor("bias", experts, values=_VALUES) if d.flag() else None,
    )
    d.said.append(f"top_k {top_k}")

    def op(backend, x, weight, bias):
        made = router_gates(x, weight, bias, top_k=top_k, backend=backend)
        return (torch.cat((made.gates, made.logits), -1),)

    def definition(x, weight, bias):
        logits = F.linear(x, weight, bias)
        logits = logits if x.dtype == torch.float64 else logits.float()
        gates = logits.softmax(-1)
        if top_k is not None and top_k < experts:
            first = gates.detach().sort(stable=True, dim=-1, descending=True).indices[..., :top_k]
            gates = gates.gather(-1, first)
            gates = gates / gates.sum(-1, keepdim=True)
        return (torch.cat((gates, logits), -1),)

    wide = torch.float64 if d.dtype == torch.float64 else torch.float32
    kept = experts if top_k is None else top_k
    incoming = d.tensor("incoming", batch, tokens, kept + experts, values=_VALUES, dtype=wide)
    return Case("router", tensors, op, definition, incoming, d.said)
