"""Reference backend of the router: explicit forward and backward in plain PyTorch.

The product is made in x's dtype, all behind it in float32 (float64 for float64).
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from ._grads import backward, wide_dtype

__all__ = ["backward", "forward"]


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).to(wide_dtype(x))
    if not top_k:
        return logits.softmax(-1), logits.new_empty(0, dtype=torch.int64), logits
    # NaN stands where infinity would; of equal ones the first is the larger.
    ranked = logits.masked_fill(logits.isnan(), math.inf).sort(dim=-1, descending=True, stable=True).indices
    index = ranked[..., :top_k].contiguous()
    return logits.gather(-1, index).softmax(-1), index, logits
