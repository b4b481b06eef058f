"""A router and the LoRAs it weighs as one op: all experts (LoRAMoE), two of them (MoLA)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from adamix_kernels.routing import mixture_lora

from .. import sizes
from ..sizes import GateSize
from .cases import Case, Draw, Inputs, of, ours

SCALING = 2.0


def cases(which: str, device: torch.device) -> Iterator[Case]:
    """sizes.MIXTURE_LORA; the backward is gated LoRA's and PyTorch's matrix products, and not counted."""
    for size in sizes.MIXTURE_LORA[which]:
        rows, dtype = size.batch * size.tokens, getattr(torch, size.dtype)
        narrow = size.rank * size.slots * (size.features + size.width) + size.experts * size.features
        yield Case(
            op="mixture_lora",
            shape=size.words,
            dtype=dtype,
            make=functools.partial(_inputs, size),
            plain=functools.partial(_plain, size),
            contenders=[
                *ours("mixture_lora", device, functools.partial(_ours, size)),
                of("softmax_einsum", functools.partial(_plain, size)),
            ],
            # x, base and out; what is narrow is small beside them.
            traffic={"forward": float(rows * (size.features + 2 * size.width) * dtype.itemsize)},
            operations={"forward": 2.0 * rows * narrow},
        )


def _inputs(size: GateSize, draw: Draw) -> Inputs:
    lead = size.batch, size.tokens
    x, base = draw.normal(*lead, size.features), draw.normal(*lead, size.width)
    a = draw.normal(size.experts, size.rank, size.features, scale=size.features**-0.5)
    b = draw.normal(size.experts, size.width, size.rank, scale=size.rank**-0.5)
    return Inputs((x, a, b, draw.normal(size.experts, size.features, scale=0.02).float(), base))


def _ours(size: GateSize, backend: str):
    def call(x, a, b, router, base):
        router = router if x.dtype == torch.float64 else router.float()
        top_k = None if size.slots == size.experts else size.slots
        return mixture_lora(x, a, b, router, top_k=top_k, base=base, scaling=SCALING, backend=backend).out

    return call


def _plain(size: GateSize, x, a, b, router, base):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gates = F.linear(x, router.to(x.dtype)).softmax(-1, dtype=wide)
    if size.slots != size.experts:
        kept, index = gates.topk(size.slots, -1)
        gates = torch.zeros_like(gates).scatter(-1, index, kept / kept.sum(-1, keepdim=True))
    t = torch.einsum("bsk,mrk->bsmr", x, a) * gates.to(x.dtype).unsqueeze(-1)
    return base + SCALING * torch.einsum("bsmr,mnr->bsn", t, b)
