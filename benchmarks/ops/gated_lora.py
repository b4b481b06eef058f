"""routed_lora with gates: all experts (LoRAMoE), two of them (MoLA), weights mixed (SMEAR); and without any."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from adamix_kernels import routed_lora

from .. import sizes
from ..sizes import GateSize
from .cases import Case, Draw, Inputs, of, ours

SCALING = 2.0
# leaves: x [B, S, K], lora_a [M, r, K], lora_b [M, N, r], base [B, S, N], gates; extra: index, None where dense.
# Without gates each token has one expert.


def cases(which: str, device: torch.device) -> Iterator[Case]:
    for size in sizes.GATED_LORA[which]:
        tokens, dtype = size.batch * size.tokens, getattr(torch, size.dtype)
        products = 2.0 * tokens * size.rank * (size.slots or 1) * (size.features + size.width)
        # x, base and out; x, dy and dx. Gates and narrow values are the kernels' own matter.
        forward = float(tokens * (size.features + 2 * size.width) * dtype.itemsize)
        backward = float(tokens * (2 * size.features + size.width) * dtype.itemsize)
        yield Case(
            op="gated_lora" if size.slots else "routed_lora_by_token",
            shape=size.words,
            dtype=dtype,
            make=functools.partial(_inputs, size),
            plain=functools.partial(_loop, size),
            contenders=[
                *ours("gated_lora" if size.slots else "routed_lora", device, functools.partial(_ours, size)),
                of("python_loop", functools.partial(_loop, size)),
            ],
            traffic={"forward": forward, "backward": backward, "both": forward + backward},
            operations={"forward": products, "backward": 2 * products, "both": 3 * products},
        )


def _inputs(size: GateSize, draw: Draw) -> Inputs:
    lead = size.batch, size.tokens
    x, base = draw.normal(*lead, size.features), draw.normal(*lead, size.width)
    a = draw.normal(size.experts, size.rank, size.features, scale=size.features**-0.5)
    b = draw.normal(size.experts, size.width, size.rank, scale=size.rank**-0.5)
    index, gates = drawn(size, draw)
    return Inputs((x, a, b, base, *gates), (index,), draw.normal(*base.shape))


def drawn(size: GateSize, draw: Draw) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The index, None where gates are dense, else of experts that differ in a row; and the gates, if there are some."""
    lead = size.batch, size.tokens
    if not size.slots:
        return draw.index(size.experts, *lead), []
    dense = size.slots == size.experts
    index = None if dense else draw.normal(*lead, size.experts).float().topk(size.slots, -1).indices
    return index, [draw.normal(*lead, size.slots).float().softmax(-1)]


def _ours(size: GateSize, backend: str):
    def call(x, a, b, base, *rest):
        *gates, index = rest
        options = dict(gates=gates[0], mix=size.mix) if gates else {}
        return routed_lora(x, a, b, index, index, base=base, scaling=SCALING, backend=backend, **options)

    return call


def _loop(size: GateSize, x, a, b, base, *rest):
    """One expert after the other, each on all tokens, as the trainers of such mixtures do."""
    *gates, index = rest
    t = [F.linear(x, a[m]) for m in range(size.experts)]
    weights = []
    for m in range(size.experts):
        if index is None:
            weights.append(gates[0][..., m])
        else:
            named = (index == m) if index.dim() == 3 else (index == m).unsqueeze(-1)
            weights.append((named * (gates[0] if gates else 1.0)).sum(-1))
    if size.mix == "weights":
        z = sum(w.to(x.dtype).unsqueeze(-1) * t_m for w, t_m in zip(weights, t))
        t = [z] * size.experts
    parts = (w.to(x.dtype).unsqueeze(-1) * F.linear(t_m, b[m]) for m, (w, t_m) in enumerate(zip(weights, t)))
    return base + SCALING * sum(parts)
