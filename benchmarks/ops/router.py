"""A linear router's gates, dense and of the largest, against softmax, topk and a division in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from adamix_kernels.routing import router_gates

from .. import sizes
from ..sizes import RouterSize
from .cases import Case, Draw, Inputs, of, ours


def cases(which: str, device: torch.device) -> Iterator[Case]:
    """sizes.ROUTER; the backward is PyTorch's matrix products, and not counted."""
    for size in sizes.ROUTER[which]:
        rows, dtype = size.batch * size.tokens, getattr(torch, size.dtype)
        yield Case(
            op="router",
            shape=size.words,
            dtype=dtype,
            make=functools.partial(_inputs, size),
            plain=functools.partial(_plain, size),
            contenders=[
                *ours("router", device, functools.partial(_ours, size)),
                of("softmax_topk", functools.partial(_plain, size)),
            ],
            # x; what a row gives is small beside it.
            traffic={"forward": float(rows * size.features * dtype.itemsize)},
            operations={"forward": 2.0 * rows * size.features * size.experts},
        )


def _inputs(size: RouterSize, draw: Draw) -> Inputs:
    x = draw.normal(size.batch, size.tokens, size.features)
    return Inputs((x, draw.normal(size.experts, size.features, scale=0.02).float()))


def _ours(size: RouterSize, backend: str):
    def call(x, weight):
        gates, _, logits = router_gates(x, weight.to(_weight_dtype(x)), top_k=size.slots, backend=backend)
        return gates, logits

    return call


def _plain(size: RouterSize, x, weight):
    logits = F.linear(x, weight.to(x.dtype))
    wide = _weight_dtype(x)
    if size.slots == size.experts:
        return logits.softmax(-1, dtype=wide), logits.to(wide)
    return logits.topk(size.slots, -1).values.softmax(-1, dtype=wide), logits.to(wide)


def _weight_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
