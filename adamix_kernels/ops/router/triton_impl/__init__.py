"""Triton backend of the router. Launches: one forward; the backward is PyTorch's matrix products."""

from __future__ import annotations

import torch

from ...._triton_utils import dot_dtype, launch, memory, precision
from ...._triton_utils import problem as unsupported
from .._grads import backward
from .forward import router_kernel
from .plan import ROWS, features_at_once, padded, stages

__all__ = ["backward", "forward", "unsupported"]


def forward(x, weight, bias, top_k):
    lead, (experts, features) = x.shape[:-1], weight.shape
    rows = lead.numel()
    logits = memory(x, *lead, experts, dtype=torch.float32)
    gates = memory(x, *lead, top_k or experts, dtype=torch.float32)
    index = memory(x, *((*lead, top_k) if top_k else (0,)), dtype=torch.int64)
    launch(
        router_kernel, (-(-rows // ROWS),), x.device,
        x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), gates,
        index if top_k else None, logits, rows, features,
        EXPERTS=experts, TOP_K=top_k, PADDED=padded(experts), SLOTS=1 << max(0, top_k - 1).bit_length(), ROWS=ROWS,
        FEATURES=features_at_once(experts, x.dtype), DOT=dot_dtype(x.dtype), PRECISION=precision(x.dtype),
        num_stages=stages(experts, x.dtype, weight.dtype),
    )  # fmt: skip
    return gates, index, logits
