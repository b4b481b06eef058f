"""routed_adapter with gates: all experts, two of them, weights mixed; and one expert a token without any."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from adamix_kernels import routed_adapter

from .. import sizes
from ..sizes import GateSize
from .cases import Case, Draw, Inputs, ours
from .gated_lora import drawn

# Counted only. leaves: x [B, S, H], down_weight [M, r, H], down_bias [M, r], up_weight [M or 1, H, r], up_bias,
# gates where there are some; extra: the index, None where dense.


def cases(which: str, device: torch.device) -> Iterator[Case]:
    for size in sizes.GATED_ADAPTER[which]:
        dtype = getattr(torch, size.dtype)
        tokens = size.batch * size.tokens
        moved = float(tokens * size.features * dtype.itemsize)
        products = 4.0 * tokens * size.features * size.rank * (size.slots or 1)
        call = functools.partial(_call, size)
        yield Case(
            op="gated_adapter" if size.slots else "routed_adapter_by_token",
            shape=size.words,
            dtype=dtype,
            make=functools.partial(_inputs, size),
            plain=functools.partial(call, "reference"),
            contenders=ours(
                "gated_adapter" if size.slots else "routed_adapter",
                device,
                lambda b, call=call: functools.partial(call, b),
            ),
            traffic={"forward": 2 * moved, "backward": 3 * moved},
            operations={"forward": products, "backward": 2 * products},
        )


def _inputs(size: GateSize, draw: Draw) -> Inputs:
    lead, ups = (size.batch, size.tokens), 1 if size.shared else size.experts
    x = draw.normal(*lead, size.features)
    down = draw.normal(size.experts, size.rank, size.features, scale=size.features**-0.5)
    up = draw.normal(ups, size.features, size.rank, scale=size.rank**-0.5)
    biases = draw.normal(size.experts, size.rank), draw.normal(ups, size.features)
    index, gates = drawn(size, draw)
    return Inputs((x, down, biases[0], up, biases[1], *gates), (index,), draw.normal(*x.shape))


def _call(size: GateSize, backend: str, *given: Any) -> torch.Tensor:
    x, down, down_bias, up, up_bias, *gates, index = given
    options = dict(gates=gates[0], mix=size.mix) if gates else {}
    return routed_adapter(
        x, down, down_bias, up, up_bias, index, None if size.shared else index, residual=x, backend=backend, **options
    )
