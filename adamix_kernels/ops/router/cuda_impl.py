"""C++/CUDA backend of the router: csrc/router. Launches: one forward; the backward is PyTorch's matrix products."""

from __future__ import annotations

import torch

from ..._extension import unsupported
from ._grads import backward

__all__ = ["backward", "forward", "unsupported"]


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.adamix_cuda.router_forward(x, weight, bias, top_k)
    return made
