"""PEFT's gated LoRA layers through routed_lora: X-LoRA's scalings and Arrow's coefficients as gates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..functional import routed_lora
from ..modules._banks import as_batch
from ..modules.lora import may_overwrite
from ..routing import Gates
from ..routing.gates import choose

_ARROW = "ArrowLinearVariant"


class _Expert(NamedTuple):
    """One adapter of a layer, and which column of the gates is its own."""

    lora_a: torch.Tensor  # [r, K]
    lora_b: torch.Tensor  # [N, r]
    scaling: float
    column: int


class XLoraForward:
    """The forward of one lora.Linear of an X-LoRA model. own: PEFT's, which serves what is not a plain mixture."""

    def __init__(self, module: Any, own: Any, backend: str):
        self.module, self.own, self.backend = module, own, backend

    def __call__(
        self, x: torch.Tensor, *args: Any, scalings: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:  # fmt: skip
        layer = self.own.__self__
        plain = scalings is not None and x.dim() == 3 and not layer.adapters_disabled and not self.module.merged
        used = _experts(self.module, self.module.active_adapters) if plain else None
        if not used:
            own: torch.Tensor = self.own(x, *args, scalings=scalings, **kwargs)
            return own
        result: torch.Tensor = self.module.base_layer(x, *args, **kwargs)
        gates = layer.get_maybe_topk_scalings(scalings)[..., [one.column for one in used]]
        factor = float(layer.config.global_scaling_weight)
        used = [one._replace(scaling=one.scaling * factor) for one in used]
        return _added(self.module, x, result, used, Gates(gates, None), self.backend).to(x.dtype)


def arrow_output(module: Any, x: torch.Tensor, args: Any, rest: Any, backend: str) -> torch.Tensor | None:
    """The output of a lora.Linear whose one active adapter is Arrow's router; None where PEFT's own forward must."""
    active = module.active_adapters
    if len(active) != 1 or active[0] not in module.lora_A:
        return None
    name = active[0]
    variant = module.lora_variant.get(name)
    if variant is None or getattr(variant, "__name__", type(variant).__name__) != _ARROW or x.dim() < 2:
        return None
    dropout = module.lora_dropout[name]
    arrow = module.lora_arrow[name]
    used = _experts(module, arrow.task_adapter_names, dropped=False)
    if not used or (isinstance(dropout, nn.Dropout) and dropout.training and dropout.p):
        return None
    arrow.gen_know_sub(module.lora_A, module.lora_B)
    arrow.build_prototypes(module.lora_A, module.lora_B)
    result: torch.Tensor = module.base_layer(x, *args, **rest)
    rows = arrow._cast_input_dtype(x, used[0].lora_a.dtype)
    likeness = F.linear(as_batch(rows), arrow.prototypes).abs()
    found = choose(likeness / arrow.temperature, int(arrow.top_k))
    return _added(module, rows, result, used, found, backend).to(result.dtype)


def _experts(module: Any, names: Any, dropped: bool = True) -> list[_Expert] | None:
    """The adapters of `names` that the layer has; None where one of them is no plain LoRA, or drops units now."""
    used: list[_Expert] = []
    for column, name in enumerate(names):
        if name not in module.lora_A:
            continue
        down, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        if name in module.lora_variant or type(down) is not nn.Linear or type(up) is not nn.Linear:
            return None
        drops = dropped and not isinstance(dropout, nn.Identity) and dropout.training and getattr(dropout, "p", 1) > 0
        if up.bias is not None or drops:
            return None
        used.append(_Expert(down.weight, up.weight, float(module.scaling[name]), column))
    if len({(one.lora_a.dtype, one.lora_a.device) for one in used}) > 1:
        return None
    return used


def _added(
    module: Any, x: torch.Tensor, result: torch.Tensor, used: list[_Expert], found: Gates, backend: str
) -> torch.Tensor:  # fmt: skip
    """result + sum_k g_k s_k B_k A_k x, in one call; adapters of lower rank are filled up with zeros."""
    rank = max(one.lora_a.shape[0] for one in used)
    downs = [F.pad(one.lora_a, (0, 0, 0, rank - one.lora_a.shape[0])) for one in used]
    ups = [F.pad(one.lora_b, (0, rank - one.lora_b.shape[1])) for one in used]
    scalings = [one.scaling for one in used]
    same = len(set(scalings)) == 1
    rows, added = as_batch(x.to(downs[0].dtype)), as_batch(result)
    gates = found.gates.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    if not same:
        factors = torch.tensor(scalings, dtype=gates.dtype, device=gates.device)
        gates = gates * (factors if found.chosen is None else factors[found.chosen])
    index = found.chosen if len(used) > 1 else None
    scaling = scalings[0] if same else 1.0
    out = add_update(module, rows, added, torch.stack(downs), torch.stack(ups), index, scaling, backend, gates)
    return out.view(result.shape)


def add_update(
    module: Any,
    rows: torch.Tensor,
    added: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    index: torch.Tensor | None,
    scaling: float,
    backend: str,
    gates: torch.Tensor | None = None,
) -> torch.Tensor:
    """routed_lora on `added`, in place where nobody looks at it again; where their dtypes differ, a sum."""
    same = rows.dtype == added.dtype
    out = routed_lora(
        rows, lora_a, lora_b, index, index, base=added if same else None, scaling=scaling, gates=gates,
        inplace=same and may_overwrite(module.base_layer, rows, added), backend=backend,
    )  # fmt: skip
    return out if same else added + out
