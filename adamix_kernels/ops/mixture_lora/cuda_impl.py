"""C++/CUDA backend of the mixture: csrc/router, then csrc/gated. Two launches forward."""

from __future__ import annotations

from typing import Any

import torch

from ..._extension import unsupported
from ..gated_lora.cuda_impl import forward as weigh
from ..router.cuda_impl import forward as route
from ._composed import composed

__all__ = ["forward", "unsupported"]


def forward(*arguments: Any, inplace: bool = False) -> tuple[torch.Tensor, ...]:
    return composed(route, weigh, arguments, inplace)
