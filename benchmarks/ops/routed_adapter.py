"""routed_adapter against gathered weights and bmm, grouped GEMMs, a loop over experts and the published loop."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from adamix_kernels import routed_adapter

from .. import sizes
from ..sizes import AdapterSize
from .cases import Case, Contender, Draw, Inputs, absent, compiled, of, ours

# leaves: x [B, S, H], down_weight [M, r, H], down_bias [M, r], up_weight [1, H, r], up_bias [1, H]; extra: index, and
# the experts of each pass as Python ints where the routing is one expert a pass.


def cases(which: str, device: torch.device) -> Iterator[Case]:
    """The cases of sizes.ADAPTER[which]."""
    for size in sizes.ADAPTER[which]:
        moved = size.batch * size.tokens * size.hidden * getattr(torch, size.dtype).itemsize
        products = 2.0 * size.batch * size.tokens * size.hidden * size.rank
        yield Case(
            op="routed_adapter",
            shape=size.words,
            dtype=getattr(torch, size.dtype),
            make=functools.partial(_inputs, size),
            plain=_by_token if size.routing == "token" else _gathered,
            contenders=_contenders(size, device, smoke=which == "smoke"),
            # x and out; x, dy and dx. The banks and [tokens, r] are small beside them.
            traffic={"forward": 2 * moved, "backward": 3 * moved, "both": 5 * moved},
            operations={"forward": 2 * products, "backward": 4 * products, "both": 6 * products},
        )


def _inputs(size: AdapterSize, draw: Draw) -> Inputs:
    x = draw.normal(size.batch, size.tokens, size.hidden)
    down = draw.normal(size.experts, size.rank, size.hidden, scale=size.hidden**-0.5)
    up = draw.normal(1, size.hidden, size.rank, scale=size.rank**-0.5)
    index = draw.routing(size.routing, size.experts, size.batch, size.tokens)
    chosen = index.tolist() if size.routing == "batch" else None
    biases = draw.normal(size.experts, size.rank), draw.normal(1, size.hidden)
    return Inputs((x, down, biases[0], up, biases[1]), (index, chosen), draw.normal(*x.shape))


def _contenders(size: AdapterSize, device: torch.device, *, smoke: bool) -> list[Contender]:
    made = ours("routed_adapter", device, _ours)
    if size.routing == "token":
        made += [
            of("masked_experts", _by_token),
            compiled("compile_masked_experts", _by_token, smoke=smoke),
            of("expert_loop", _expert_loop, graph=False),
            of("grouped_mm", _grouped_mm),
        ]
        return made
    made += [
        of("gathered_bmm", _gathered),
        compiled("compile_gathered_bmm", _gathered, smoke=smoke),
        of("grouped_mm", _grouped_mm),
        of("expert_loop", _expert_loop, graph=False),
    ]
    if size.routing == "batch":
        made.append(of("original", _published, graph=False))
    else:
        made.append(absent("original", "the published way draws one expert for a whole pass"))
    return made


def _ours(backend: str):
    def call(x, down, down_bias, up, up_bias, index, chosen):
        return routed_adapter(x, down, down_bias, up, up_bias, index, None, residual=x, backend=backend)

    return call


def _gathered(x, down, down_bias, up, up_bias, index, chosen):
    h = F.gelu(torch.baddbmm(down_bias[index][:, None], x, down[index].mT))
    return x + F.linear(h, up[0], up_bias[0])


def _by_token(x, down, down_bias, up, up_bias, index, chosen):
    pre = 0
    for m in range(down.shape[0]):
        mine = (index == m)[..., None]
        pre = pre + torch.where(mine, F.linear(x, down[m], down_bias[m]), 0)
    return x + F.linear(F.gelu(pre), up[0], up_bias[0])


def _expert_loop(x, down, down_bias, up, up_bias, index, chosen):
    """Two GEMMs for each expert, on the samples (or tokens) that it serves."""
    rows = x.flatten(0, index.dim() - 1)
    out = rows
    for m in range(down.shape[0]):
        mine = (index.flatten() == m).nonzero()[:, 0]
        h = F.gelu(F.linear(rows[mine], down[m], down_bias[m]))
        out = out.index_add(0, mine, F.linear(h, up[0], up_bias[0]))
    return out.view(x.shape)


def _grouped_mm(x, down, down_bias, up, up_bias, index, chosen):
    """Samples (or tokens) sorted by expert, one grouped GEMM down."""
    rows = x.flatten(0, index.dim() - 1)
    order = index.flatten().argsort(stable=True)
    back = order.argsort()
    tokens = rows[order].view(-1, x.shape[-1])
    each = tokens.shape[0] // order.shape[0]
    experts = index.flatten()[order].repeat_interleave(each, output_size=tokens.shape[0])
    ends = torch.searchsorted(experts, torch.arange(down.shape[0], device=x.device), right=True).to(torch.int32)
    pre = F.grouped_mm(tokens, down.mT, offs=ends) + down_bias[experts]
    h = F.gelu(pre).view(order.shape[0], each, -1)[back].view(*x.shape[:2], -1)
    return x + F.linear(h, up[0], up_bias[0])


def _published(x, down, down_bias, up, up_bias, index, chosen):
    """One call of a drawn nn.Linear a side and pass, the draw read with .item(); see benchmarks/models/original.py."""
    passes = []
    for one, expert in zip(x, chosen, strict=True):
        torch.randint(low=0, high=down.shape[0], size=(1,)).item()
        h = F.gelu(F.linear(one, down[expert], down_bias[expert]))
        torch.randint(low=0, high=1, size=(1,)).item()
        passes.append(F.linear(h, up[0], up_bias[0]) + one)
    return torch.stack(passes)
