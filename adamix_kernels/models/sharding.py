"""Parameters sharded over processes (FSDP2): their whole values, and new ones put into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole value of a tensor; itself when it is not sharded. Every process must call it, in the same order."""
    sharded: Any = tensor
    value: torch.Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return value


@torch.no_grad()
def put(target: torch.Tensor, value: torch.Tensor) -> None:
    """target <- value, cast to target's dtype; each process fills its part of a sharded target from the same value."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(device=target.device, dtype=target.dtype)
        sharded: Any = target
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
    target.copy_(value)


def plain_class(model: nn.Module) -> type:
    """type(model), without the class that fully_shard puts in front of it, or torch.compile around it."""
    bases = type(getattr(model, "_orig_mod", model)).__mro__
    if not any(base.__name__ == "FSDPModule" for base in bases):
        return bases[0]
    return next(c for c in bases if not any(base.__name__ == "FSDPModule" for base in c.__mro__))
