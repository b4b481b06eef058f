"""routed_lora against gathered weights and bmm, grouped GEMMs and PEFT; with the frozen layer in the same call; and a
pack's many adapters in one batch.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from adamix_kernels import routed_lora

from .. import sizes
from ..sizes import LoraSize, PackSize
from .cases import Bound, Case, Contender, Draw, Inputs, absent, compiled, of, ours

SCALING = 2.0
# leaves: x [B, S, K], lora_a [M, g*r, K], lora_b [1, g*Ng, r], base [B, S, N]; extra: index. In "frozen_linear" the
# one leaf is x, and lora_a, lora_b and the frozen weight [N, K] are extra.


def cases(which: str, device: torch.device) -> Iterator[Case]:
    """The update on a given base output (sizes.LORA), by a pack's adapters (sizes.LORA_PACK), and together with its
    frozen layer (sizes.LORA_LINEAR)."""
    smoke = which == "smoke"
    for size in sizes.LORA[which]:
        tokens, itemsize = size.batch * size.tokens, getattr(torch, size.dtype).itemsize
        products = 2.0 * tokens * size.rank * size.groups * (size.features + size.per_group)
        # x, base and out; x, dy and dx (the base's gradient is dy itself).
        forward = tokens * (size.features + 2 * size.width) * itemsize
        backward = tokens * (2 * size.features + size.groups * size.per_group) * itemsize
        yield Case(
            op="routed_lora",
            shape=size.words,
            dtype=getattr(torch, size.dtype),
            make=functools.partial(_inputs, size),
            plain=_gathered(size),
            contenders=_contenders(size, device, smoke=smoke),
            traffic={"forward": forward, "backward": backward, "both": forward + backward},
            operations={"forward": products, "backward": 2 * products, "both": 3 * products},
        )
    for size in sizes.LORA_LINEAR[which]:
        tokens, itemsize = size.batch * size.tokens, getattr(torch, size.dtype).itemsize
        moved = float(tokens * (size.features + size.width) * itemsize)
        update = size.rank * size.groups * (size.features + size.per_group)
        products = 2.0 * tokens * (size.features * size.width + update)
        yield Case(
            op="frozen_linear",
            shape=size.words,
            dtype=getattr(torch, size.dtype),
            make=functools.partial(_linear_inputs, size),
            plain=_linear(_gathered(size)),
            contenders=_linear_contenders(size, device, smoke=smoke),
            traffic={"forward": moved, "backward": moved, "both": 2 * moved},
            operations={"forward": products, "backward": products, "both": 2 * products},
        )
    yield from _packs(which, device)


def _packs(which: str, device: torch.device) -> Iterator[Case]:
    for size in sizes.LORA_PACK[which]:
        rows, itemsize = size.batch * size.tokens, getattr(torch, size.dtype).itemsize
        products = 2.0 * rows * size.rank * (size.features + size.width)
        # Of so many adapters the factors weigh, too: read in both directions, their gradients written in one.
        factors = size.experts * size.rank * (size.features + size.width) * itemsize
        forward = float(rows * (size.features + 2 * size.width) * itemsize + factors)
        backward = float(rows * (2 * size.features + size.width) * itemsize + 2 * factors)
        yield Case(
            op="routed_lora_pack",
            shape=size.words,
            dtype=getattr(torch, size.dtype),
            make=functools.partial(_pack_inputs, size),
            plain=_one_by_one,
            contenders=[*ours("routed_lora", device, _pack_call), of("python_loop", _one_by_one)],
            traffic={"forward": forward, "backward": backward, "both": forward + backward},
            operations={"forward": products, "backward": 2 * products, "both": 3 * products},
        )


def _pack_inputs(size: PackSize, draw: Draw) -> Inputs:
    x = draw.normal(size.batch, size.tokens, size.features)
    a = draw.normal(size.experts, size.rank, size.features, scale=size.features**-0.5)
    b = draw.normal(size.experts, size.width, size.rank, scale=size.rank**-0.5)
    base = draw.normal(size.batch, size.tokens, size.width)
    index = draw.routing(size.routing, size.experts, size.batch, size.tokens)
    return Inputs((x, a, b, base), (index,), draw.normal(*base.shape))


def _pack_call(backend: str):
    def call(x, a, b, base, index):
        return routed_lora(x, a, b, index, index, base=base, scaling=SCALING, backend=backend)

    return call


def _one_by_one(x, a, b, base, index):
    """One adapter after the other on all rows, of which its own are taken."""
    mine = index if index.dim() == 2 else index[:, None]
    for m in range(a.shape[0]):
        base = base + SCALING * (mine == m)[..., None] * F.linear(F.linear(x, a[m]), b[m])
    return base


def _inputs(size: LoraSize, draw: Draw) -> Inputs:
    x = draw.normal(size.batch, size.tokens, size.features)
    a, b = _factors(size, draw)
    base = draw.normal(size.batch, size.tokens, size.width)
    index = draw.routing(size.routing, size.experts, size.batch, size.tokens)
    return Inputs((x, a, b, base), (index,), draw.normal(*base.shape))


def _linear_inputs(size: LoraSize, draw: Draw) -> Inputs:
    x = draw.normal(size.batch, size.tokens, size.features)
    weight = draw.normal(size.width, size.features, scale=size.features**-0.5)
    index = draw.routing(size.routing, size.experts, size.batch, size.tokens)
    return Inputs((x,), (*_factors(size, draw), weight, index), draw.normal(*x.shape[:2], size.width))


def _factors(size: LoraSize, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    a = draw.normal(size.experts, size.groups * size.rank, size.features, scale=size.features**-0.5)
    return a, draw.normal(1, size.groups * size.per_group, size.rank, scale=size.rank**-0.5)


def _contenders(size: LoraSize, device: torch.device, *, smoke: bool) -> list[Contender]:
    made = ours("routed_lora", device, functools.partial(_ours, size))
    gathered = _gathered(size)
    made += [of("gathered_bmm", gathered), compiled("compile_gathered_bmm", gathered, smoke=smoke)]
    made.append(of("grouped_mm", _grouped_mm(size)))
    if size.groups == 1:
        made.append(Contender("peft_lora", lambda: _peft(size), narrow=_one_expert, plain=_single))
    else:
        made.append(absent("peft_lora", "PEFT adapts all columns of a fused qkv layer, not q and v alone"))
    if size.routing == "batch":
        made.append(of("original", _published(size), graph=False))
    else:
        made.append(absent("original", "the published way draws one expert for a whole pass"))
    return made


def _linear_contenders(size: LoraSize, device: torch.device, *, smoke: bool) -> list[Contender]:
    made = [
        Contender(c.name, functools.partial(_open_linear, c), exacting=c.exacting)
        for c in ours("routed_lora", device, functools.partial(_ours, size))
    ]
    gathered = _linear(_gathered(size))
    made += [of("gathered_bmm", gathered), compiled("compile_gathered_bmm", gathered, smoke=smoke)]
    return made


def _ours(size: LoraSize, backend: str):
    def call(x, a, b, base, index):
        return routed_lora(
            x, a, b, index, None, base=base, scaling=SCALING, groups=size.groups, output_offsets=size.offsets,
            backend=backend,
        )  # fmt: skip

    return call


def _add_groups(size: LoraSize, base: torch.Tensor, t: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """base + SCALING t_g B_g^T on the columns of each group."""
    update = [SCALING * F.linear(t_g, b_g) for t_g, b_g in zip(t.chunk(size.groups, 2), b[0].chunk(size.groups, 0))]
    if size.groups == 1:
        return base + update[0]
    q, k, v = base.chunk(3, -1)
    return torch.cat([q + update[0], k, v + update[1]], -1)


def _gathered(size: LoraSize):
    def call(x, a, b, base, index):
        if index.dim() == 1:
            return _add_groups(size, base, torch.bmm(x, a[index].mT), b)
        t = sum(torch.where((index == m)[..., None], F.linear(x, a[m]), 0) for m in range(a.shape[0]))
        return _add_groups(size, base, t, b)

    return call


def _grouped_mm(size: LoraSize):
    def call(x, a, b, base, index):
        order = index.argsort(stable=True)
        ends = torch.searchsorted(index[order], torch.arange(a.shape[0], device=x.device), right=True) * x.shape[1]
        t = F.grouped_mm(x[order].flatten(0, 1), a.mT, offs=ends.to(torch.int32))
        return _add_groups(size, base, t.view(*x.shape[:2], -1)[order.argsort()], b)

    return call


def _published(size: LoraSize):
    """One pass after the other, each with an expert drawn on the CPU and read with .item()."""

    def call(x, a, b, base, index):
        passes = []
        for k in range(x.shape[0]):
            torch.randint(low=0, high=a.shape[0], size=(1,)).item()
            passes.append(_add_groups(size, base[k : k + 1], F.linear(x[k : k + 1], a[index[k]]), b))
        return torch.cat(passes)

    return call


def _one_expert(inputs: Inputs) -> Inputs:
    x, a, b, base = inputs.leaves
    return Inputs((x, a[0].detach().clone(), b[0].detach().clone(), base), (), inputs.grad)


def _single(x, a, b, base):
    return base + SCALING * F.linear(F.linear(x, a), b)


def _peft(size: LoraSize):
    """PEFT's LoRA layer, its base layer replaced by the given output: only the update is timed."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.config import LoraConfig

    config = LoraConfig(r=size.rank, lora_alpha=SCALING * size.rank, lora_dropout=0.0)

    def build(inputs: Inputs) -> Bound:
        x, a, b, base = inputs.leaves
        layer = nn.Linear(size.features, size.width, bias=False, device=x.device, dtype=x.dtype)
        layer = _peft_layer(Linear, layer, size, config)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(a), nn.Parameter(b)
        layer.get_base_layer().forward = types.MethodType(lambda self, x: base, layer.get_base_layer())
        layer.train()
        factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return Bound(lambda: layer(x), (x, *factors, base))

    return build


def _peft_layer(kind, layer: nn.Module, size: LoraSize, config) -> nn.Module:
    """The constructor took a configuration instead of single arguments in later versions."""
    try:
        return kind(layer, "default", config=config, r=size.rank, lora_alpha=config.lora_alpha)
    except TypeError:
        return kind(layer, "default", r=size.rank, lora_alpha=config.lora_alpha, lora_dropout=0.0)


def _linear(update):
    def call(x, a, b, weight, index):
        return update(x, a, b, F.linear(x, weight), index)

    return call


def _open_linear(contender: Contender):
    binder = contender.open()

    def build(inputs: Inputs) -> Bound:
        (x,), (a, b, weight, index) = inputs.leaves, inputs.extra
        return Bound(lambda: binder(Inputs((x, a, b, F.linear(x, weight)), (index,))).call(), inputs.leaves)

    return build
