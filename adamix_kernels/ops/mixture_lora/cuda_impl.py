"""C++/CUDA backend of the mixture: csrc/mixture. One launch forward where a tile of 16-byte pieces holds the router's
columns too (16 bits, at most 16 experts, 256 columns); else the library makes the router's and gated LoRA's.
"""

from __future__ import annotations

from typing import Any

import torch

from ..._extension import grouped_most as most
from ..._extension import unsupported
from .signatures import Forward

__all__ = ["forward", "most", "unsupported"]

_ops = torch.ops.adamix_cuda


def forward(*arguments: Any, inplace: bool = False) -> tuple[torch.Tensor, ...]:
    base = Forward(*arguments).base
    if inplace and base is not None:
        return base, *_ops.mixture_lora_forward_(*arguments)
    made: tuple[torch.Tensor, ...] = _ops.mixture_lora_forward(*arguments)
    return made
