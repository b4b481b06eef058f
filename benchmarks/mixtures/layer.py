"""A layer of eight LoRAs with gates, and the ways to compute it: ours, the usual loop, torch's and PEFT's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from adamix_kernels import routed_lora
from adamix_kernels.routing import ArrowRouter, Gates, dense_gates

from ..ops.check import MULTIPLE, MULTIPLE_OF_PEERS, disagreement

EXPERTS, RANK, SCALING = 8, 8, 2.0
# Not installed, or a version whose layers are made otherwise: the other ways go on.
_NOT_THIS_PEFT = (ImportError, AttributeError, KeyError, TypeError, ValueError)
ARROW = "arrow top-2"
# What a layer is called -> experts a token, None: all of them. Arrow's gates are computed from x, others are given.
KINDS = {"dense": None, "top-2": 2, ARROW: 2}

_GIVEN = ("loop", "einsum", "peft x-lora", "grouped_mm")
PEERS = {"dense": _GIVEN, "top-2": _GIVEN, ARROW: ("peft arrow",)}


class Layer:
    """One mixture: x [B, S, K], a frozen base [K, K], banks [M, r, K] and [M, K, r], gates by `kind` of KINDS."""

    def __init__(
        self, batch: int, tokens: int, width: int, kind: str, *, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32, seed: int = 0,
    ):  # fmt: skip
        draw = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=draw, device=device).mul_(scale).to(dtype)

        self.top_k = KINDS[kind]
        self.x = normal(batch, tokens, width).requires_grad_()
        self.base = nn.Linear(width, width, device=device, dtype=dtype).requires_grad_(False)
        self.a = nn.Parameter(normal(EXPERTS, RANK, width, scale=width**-0.5))
        self.b = nn.Parameter(normal(EXPERTS, width, RANK, scale=RANK**-0.5))
        # The loop's and PEFT's: an expert's own parameters, as their trainers hold them.
        self.each = [(nn.Parameter(a.clone()), nn.Parameter(b.clone())) for a, b in zip(self.a.data, self.b.data)]
        self.router: ArrowRouter | None = None
        self._gates, self._index = torch.empty(0), None
        if kind == ARROW:
            self.router = ArrowRouter(width, EXPERTS, self.top_k, dtype=dtype).to(device)
            self.router.refresh(self.a, self.b)
            return
        scores = normal(batch, tokens, EXPERTS).float()
        if self.top_k is None:
            self._gates = scores.softmax(-1).requires_grad_()
        else:
            best, self._index = scores.topk(self.top_k)
            self._gates = best.softmax(-1).requires_grad_()

    def gates(self) -> Gates:
        """Given, or softmax over the two largest |x . v_e|."""
        return Gates(self._gates, self._index) if self.router is None else self.router.gates(self.x, None, None)

    def dense(self) -> torch.Tensor:
        return dense_gates(self.gates(), EXPERTS)

    def inputs(self) -> list[torch.Tensor]:
        """What every way differentiates by."""
        return [self.x] if self.router is not None else [self.x, self._gates]

    def leaves(self) -> list[torch.Tensor]:
        return [*self.inputs(), self.a, self.b, *(factor for pair in self.each for factor in pair)]

    def formula(self, dtype: torch.dtype, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Output and gradients by inputs(), in `dtype`; the experts are those that the layer's own dtype chooses."""
        x, *given = (t.detach().to(dtype).requires_grad_() for t in self.inputs())
        index = self.gates().chosen
        if self.router is not None:
            likeness = F.linear(x, self.router.directions.to(dtype)).abs()
            dense = dense_gates(Gates(likeness.gather(-1, index).softmax(-1), index), EXPERTS)
        else:
            dense = dense_gates(Gates(given[0], index), EXPERTS)
        out = F.linear(x, self.base.weight.to(dtype), self.base.bias.to(dtype))
        for e in range(EXPERTS):
            a, b = self.a[e].detach().to(dtype), self.b[e].detach().to(dtype)
            out = out + SCALING * dense[..., e : e + 1].to(dtype) * (x @ a.T @ b.T)
        return (out.detach(), *torch.autograd.grad(out, [x, *given], grad.to(dtype)))


Way = Callable[[Layer], torch.Tensor]


def ours(backend: str | None = None) -> Way:
    def call(layer: Layer) -> torch.Tensor:
        gates, index = layer.gates()
        return routed_lora(
            layer.x, layer.a, layer.b, index, index, base=layer.base(layer.x), gates=gates, scaling=SCALING,
            inplace=True, backend=backend or "auto",
        )  # fmt: skip

    return call


def python_loop(layer: Layer) -> torch.Tensor:
    """Each expert's tokens looked up, computed and added to the rows: the trainers of MoE-PEFT and MoLA."""
    flat = layer.x.flatten(0, 1)
    out = layer.base(flat)
    found = layer.gates()
    gates = found.gates.flatten(0, 1).to(flat.dtype)
    for e, (a, b) in enumerate(layer.each):
        if found.chosen is None:
            out = out + F.linear(F.linear(flat, a), b) * (SCALING * gates[:, e : e + 1])
            continue
        rows, slot = torch.where(found.chosen.flatten(0, 1) == e)
        delta = F.linear(F.linear(flat[rows], a), b) * (SCALING * gates[rows, slot].unsqueeze(-1))
        out = out.index_add(0, rows, delta)
    return out.view(layer.x.shape)


def einsum(layer: Layer) -> torch.Tensor:
    """Every expert's output of every token [tokens, M, N], then the weighted sum: PEFT's Arrow."""
    flat = layer.x.flatten(0, 1)
    each = torch.einsum("ter,eor->teo", torch.einsum("tf,erf->ter", flat, layer.a), layer.b) * SCALING
    gates = layer.dense().flatten(0, 1).to(flat.dtype)
    return layer.base(layer.x) + torch.einsum("te,teo->to", gates, each).view(layer.x.shape)


def grouped_mm(layer: Layer) -> torch.Tensor:
    """Rows sorted by expert, two grouped products, added back: what torch has for it. Nothing waits for a GPU."""
    flat = layer.x.flatten(0, 1)
    gates, chosen = layer.gates()
    every = torch.arange(EXPERTS, device=flat.device)
    index = every.expand(flat.shape[0], -1) if chosen is None else chosen.flatten(0, 1)
    experts, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, every, right=True, out_int32=True)
    rows = order // index.shape[-1]
    narrow = torch._grouped_mm(flat[rows], layer.a.mT, offs=ends)
    wide = torch._grouped_mm(narrow, layer.b.mT, offs=ends)
    wide = wide * (SCALING * gates.flatten()[order].unsqueeze(-1).to(wide.dtype))
    return layer.base(layer.x) + torch.zeros_like(flat).index_add(0, rows, wide).view(layer.x.shape)


def peft_xlora(layer: Layer) -> Way:
    """PEFT's own X-LoRA layer. Raises ImportError without it."""
    import peft
    from peft.tuners.xlora.layer import XLoraLinearLayer

    target, model = _peft_layer(layer)
    model.base_model.set_adapter(_names())
    _take(target, layer)
    mixed: Any = XLoraLinearLayer(SimpleNamespace(disabled=False), target, target.forward, 0, peft.XLoraConfig())
    return lambda one: mixed.forward(one.x, scalings=one.dense().to(one.x.dtype).unsqueeze(2))


def peft_arrow(layer: Layer) -> Way:
    """PEFT's own Arrow layer, with the layer's directions (its own come of 15 power iterations). Raises ImportError."""
    import peft
    from peft.tuners.lora import ArrowConfig

    target, model = _peft_layer(layer)
    arrow = ArrowConfig(top_k=layer.top_k, router_temperature=1.0)
    arrow.task_adapter_names, arrow.gks_adapter_names = _names(), []
    model.add_adapter("arrow_router", peft.LoraConfig(r=RANK, target_modules=["0"], arrow_config=arrow))
    model.set_adapter("arrow_router")
    _take(target, layer)
    routing = target.lora_arrow["arrow_router"]
    routing.register_buffer("prototypes", layer.router.directions, persistent=False)
    routing._protos_ready = True
    return lambda one: target(one.x)


def _names() -> list[str]:
    return [f"task_{e}" for e in range(EXPERTS)]


def _peft_layer(layer: Layer) -> tuple[Any, Any]:
    import peft

    first, *others = _names()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALING, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(layer.base), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    return model.base_model.model[0], model


def _take(target: Any, layer: Layer) -> None:
    for name, (a, b) in zip(_names(), layer.each):
        target.lora_A[name].weight, target.lora_B[name].weight = a, b


def ways(layer: Layer, backends: Sequence[str] = ()) -> dict[str, Way]:
    """Every way that can be had here, ours first: "adamix", or one for each of `backends`."""
    found: dict[str, Way] = {name: ours(name) for name in backends} or {"adamix": ours()}
    if layer.router is not None:
        with contextlib.suppress(*_NOT_THIS_PEFT):
            found["peft arrow"] = peft_arrow(layer)
        return found
    found |= {"loop": python_loop, "einsum": einsum}
    with contextlib.suppress(*_NOT_THIS_PEFT):
        found["peft x-lora"] = peft_xlora(layer)
    with contextlib.suppress(RuntimeError, AttributeError):  # a CPU, or a torch, without it
        grouped_mm(layer)
        found["grouped_mm"] = grouped_mm
    return found


def wrong(way: Way, layer: Layer, *, peer: bool = True) -> str | None:
    """What is wrong with a way's output and gradients, against the formula in float64; None for nothing."""
    grad = torch.randn_like(layer.x)
    out = way(layer)
    found = (out.detach(), *torch.autograd.grad(out, layer.inputs(), grad, allow_unused=True))
    exact, own = layer.formula(torch.float64, grad), layer.formula(layer.x.dtype, grad)
    for what, result, truth, same in zip(("output", "gradient of x", "gradient of gates"), found, exact, own):
        multiple = MULTIPLE_OF_PEERS if peer else MULTIPLE
        problem = "none" if result is None else disagreement(result, truth, same, multiple)
        if problem is not None:
            return f"{what}: {problem}"
    return None
