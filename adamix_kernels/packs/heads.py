"""Modules trained whole (the task head), one a name: their linear layers and norms as banks, chosen by sample."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..models.quantised import dynamic_linear
from ..models.tying import tied_outside
from ..routing import Router


class PackedLinear(nn.Module):
    """out = x W[i]^T + b[i] + pad[i], i the name of the sample.

    Parameters: weight [M, N, K], bias [M, N] or None. Buffer pad [M, N]: 0 on the columns that a name has, -inf on
    those that only others have, so that their probability is exactly 0.
    """

    def __init__(self, like: nn.Linear, capacity: int, rows: int, router: Router):
        super().__init__()
        at: dict[str, Any] = {"device": like.weight.device, "dtype": like.weight.dtype}
        self.in_features, self.out_features, self.router = like.in_features, rows, router
        self.weight = nn.Parameter(torch.zeros(capacity, rows, like.in_features, **at), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if like.bias is not None:
            self.bias = nn.Parameter(torch.zeros(capacity, rows, **at), requires_grad=False)
        self.register_buffer("pad", torch.zeros(capacity, rows, **at), persistent=False)
        self.pad: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, ..., K] -> [B, ..., N]."""
        index = _names(self.router, x, self.weight.shape[0], self.training)
        rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        if index is None:
            out = F.linear(rows, self.weight[0], None if self.bias is None else self.bias[0]) + self.pad[0]
        else:
            out = rows @ self.weight[index].mT
            if self.bias is not None:
                out = out + self.bias[index].unsqueeze(1)
            out = out + self.pad[index].unsqueeze(1)
        return out.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def plan(self, slot: int, tensors: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See slots.plan. No tensors: an empty slot."""
        rows = tensors["weight"].shape[0] if tensors else self.out_features
        more = self.out_features - rows
        made = [
            (self.pad[slot], self.pad.new_zeros(self.out_features).index_fill_(0, _tail(self.pad, rows), -torch.inf))
        ]
        for name, bank in (("weight", self.weight), ("bias", self.bias)):
            if bank is not None:
                value = tensors.get(name)
                value = torch.zeros_like(bank[slot]) if value is None else value
                made.append((bank[slot], F.pad(value, (0, 0) * (value.dim() - 1) + (0, more * bool(tensors))).to(bank)))
        return made

    def read(self, slot: int) -> dict[str, torch.Tensor]:
        rows = int((self.pad[slot] == 0).sum())
        found = {"weight": self.weight, **({} if self.bias is None else {"bias": self.bias})}
        return {name: bank[slot, :rows].detach().clone() for name, bank in found.items()}

    def check(self, where: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError, naming `where`, for tensors that no slot holds."""
        wanted = {"weight", *(() if self.bias is None else ("bias",))}
        if set(tensors) != wanted:
            raise ValueError(f"{where}: got {sorted(tensors)}, expected {sorted(wanted)}")
        rows = tensors["weight"].shape[0]
        if tensors["weight"].dim() != 2 or tensors["weight"].shape[1] != self.in_features or rows < 1:
            shape = tuple(tensors["weight"].shape)
            raise ValueError(f"{where}.weight: got shape {shape}, expected [labels, {self.in_features}]")
        if rows > self.out_features:
            raise ValueError(
                f"{where}: got {rows} labels, expected at most {self.out_features}, what the pack has room for: "
                f"pack(..., max_labels={rows})"
            )
        if self.bias is not None and tensors["bias"].shape != (rows,):
            raise ValueError(f"{where}.bias: got shape {tuple(tensors['bias'].shape)}, expected {(rows,)}")
        _check_finite(where, tensors)

    def extra_repr(self) -> str:
        return f"names={self.weight.shape[0]}, in_features={self.in_features}, out_features={self.out_features}"


class PackedNorm(nn.Module):
    """out = norm(x) * w[i] + b[i], i the name of the sample. Parameters: weight and bias [M, H], or None."""

    def __init__(self, like: nn.LayerNorm, capacity: int, router: Router):
        super().__init__()
        self.shape, self.eps, self.router = tuple(like.normalized_shape), like.eps, router
        for name in ("weight", "bias"):
            value = getattr(like, name)
            bank = None if value is None else nn.Parameter(value.new_zeros(capacity, *value.shape), requires_grad=False)
            self.register_parameter(name, bank)
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.layer_norm(x, self.shape, None, None, self.eps)
        banks = [bank for bank in (self.weight, self.bias) if bank is not None]
        if not banks:
            return out
        index = _names(self.router, x, banks[0].shape[0], self.training)
        chosen = [bank[:1] if index is None else bank[index] for bank in banks]
        middle = [1] * (x.dim() - 1 - len(self.shape))
        chosen = [value.view(value.shape[0], *middle, *self.shape) for value in chosen]
        out = out * chosen[0] if self.weight is not None else out
        return out + chosen[-1] if self.bias is not None else out

    @torch.no_grad()
    def plan(self, slot: int, tensors: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        banks = dict(self.named_parameters())
        return [(b[slot], tensors[n].to(b) if tensors else torch.zeros_like(b[slot])) for n, b in banks.items()]

    def read(self, slot: int) -> dict[str, torch.Tensor]:
        return {name: bank[slot].detach().clone() for name, bank in self.named_parameters()}

    def check(self, where: str, tensors: Mapping[str, torch.Tensor]) -> None:
        wanted = {name: tuple(bank.shape[1:]) for name, bank in self.named_parameters()}
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        if shapes != wanted:
            raise ValueError(f"{where}: got shapes {shapes}, expected {wanted}")
        _check_finite(where, tensors)


Packed = PackedLinear | PackedNorm


def packed_head(
    path: str, head: nn.Module, capacity: int, rows: Mapping[str, int], router: Router
) -> nn.Module:  # fmt: skip
    """A copy of `head` with every parameter as a bank of `capacity` empty slots; what has no parameters stays.

    Args:
        rows: columns of the linear layers, by their name in the head ("" is the head itself), where they are more than
            the head's own.

    Raises ValueError for a layer whose parameters are no linear layer's and no LayerNorm's.
    """
    done = head if _leaf(head) else copy.deepcopy(head)
    for name, module in list(done.named_modules()):
        if not list(module.parameters(recurse=False)) and not dynamic_linear(module):
            continue
        where = f"{path}.{name}" if name else path
        new: nn.Module
        if type(module) is nn.Linear:
            new = PackedLinear(module, capacity, max(module.out_features, rows.get(name, 0)), router)
        elif type(module) is nn.LayerNorm:
            new = PackedNorm(module, capacity, router)
        else:
            raise ValueError(
                f"{where}: got a {type(module).__name__} among the modules trained whole, expected linear layers and "
                "LayerNorms, which are what a pack keeps one a name of"
            )
        if not name:
            return new.train(head.training)
        parent, _, last = name.rpartition(".")
        setattr(done.get_submodule(parent), last, new)
    return done.requires_grad_(False)


def check_untied(model: nn.Module, path: str) -> None:
    """Raises ValueError where a parameter of the module at `path` is another module's, too: one training changes both,
    and a pack has one a name at `path` alone. model: the bare base, or a pack."""
    pack = getattr(getattr(model, "adamix", None), "pack", None)
    tied = getattr(pack, "tied", {}).get(path) or tied_outside(model, path)
    if tied and not isinstance(model.get_submodule(path), nn.Embedding):  # which packed_head refuses
        raise ValueError(
            f"{path}: got a module trained whole that is tied to {tied[0]}, expected one of its own weights, which a "
            f"pack has one a name of: adapt it with LoRA instead (target_modules=[..., {path!r}], modules_to_save=[]), "
            "or serve the folder alone (load_adamix)"
        )


def packed_parts(head: nn.Module) -> dict[str, Packed]:
    """The banks of a packed head by their name in it; "" is the head itself."""
    return {name: module for name, module in head.named_modules() if isinstance(module, (PackedLinear, PackedNorm))}


def tensors_of(part: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of one part of a head."""
    prefix = f"{part}." if part else ""
    rest = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: value for key, value in rest.items() if "." not in key}


def check_head(path: str, head: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where a name's head, given by its tensors, is not one of the packed `head`."""
    parts = packed_parts(head)
    known = {
        f"{part}.{name}" if part else name for part, module in parts.items() for name, _ in module.named_parameters()
    }
    more = sorted(set(tensors) - known)
    if more:
        raise ValueError(f"{path}: got {more[0]!r} in the folder, expected {', '.join(sorted(known))}, as in the model")
    for part, module in parts.items():
        module.check(f"{path}.{part}" if part else path, tensors_of(part, tensors))


def plan_head(
    head: nn.Module, slot: int, tensors: Mapping[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """See slots.plan."""
    parts = packed_parts(head)
    return [pair for part, module in parts.items() for pair in module.plan(slot, tensors_of(part, tensors))]


def read_head(head: nn.Module, slot: int) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}" if part else name: value
        for part, module in packed_parts(head).items()
        for name, value in module.read(slot).items()
    }


def widen(model: nn.Module, packed: Mapping[str, nn.Module]) -> None:
    """Makes a classifier's num_labels that of its widest name, which its own loss reads."""
    owner: Any = model
    labels = getattr(owner, "num_labels", None)
    banks = [module for head in packed.values() for module in packed_parts(head).values()]
    last = [bank.out_features for bank in banks if isinstance(bank, PackedLinear)][-1:]
    if labels is not None and last and last[0] > labels:
        owner.num_labels = owner.config.num_labels = last[0]


def _leaf(head: nn.Module) -> bool:
    return not list(head.children())


def _tail(like: torch.Tensor, start: int) -> torch.Tensor:
    return torch.arange(start, like.shape[-1], device=like.device)


def _names(router: Router, x: torch.Tensor, names: int, training: bool) -> torch.Tensor | None:
    given = router.experts
    if getattr(router, "exact", False) and given is not None and given.dim() == 1 and given.shape[0] != x.shape[0]:
        raise ValueError(f"use_experts: got {given.shape[0]} names for a batch of {x.shape[0]}, expected one a sample")
    tokens = x.shape[1] if x.dim() > 2 else 1
    return router.draw(names, x.shape[0], tokens, x.device, training)


def _check_finite(where: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{where}.{name}: got values that are not finite, expected finite numbers")
