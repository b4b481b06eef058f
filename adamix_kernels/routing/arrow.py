"""Arrow: gates without training, from what each LoRA answers to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..ops._checks import check_positive
from .gates import GateRouter, Gates, check_top_k, choose


class ArrowRouter(GateRouter):
    """g = softmax over the top_k of |x . v_e| / temperature, v_e the leading right singular vector of B_e A_e.

    Args:
        features: K. num_experts: M. top_k: experts a token; None: all. temperature: of the softmax.
        balance, z: have no meaning here. device, dtype: of the directions.

    It has no parameters. refresh() sets the directions [M, K], which no checkpoint holds.

    Shapes: x [B, S, K] -> gates [B, S, top_k] with index, or [B, S, M]. Differentiable in x.

    Raises ValueError: top_k is not in 1..M; features are below 1; temperature is not finite or not above 0; a forward
    before refresh().

    Source: Arrow (arXiv 2405.11157).

    Example:
        >>> from adamix_kernels.routing import ArrowRouter
        >>> router = ArrowRouter(8, 4, top_k=2).refresh(torch.randn(4, 2, 8), torch.randn(4, 6, 2))
        >>> router(torch.randn(2, 5, 8)).gates.shape
        torch.Size([2, 5, 2])
    """

    directions: torch.Tensor

    def __init__(
        self, features: int, num_experts: int, top_k: int | None = None, *, temperature: float = 1.0,
        dtype: torch.dtype | None = None, **more: Any,
    ):  # fmt: skip
        check_positive(features=features)
        super().__init__(num_experts, **more)
        self.top_k = check_top_k(top_k, num_experts)
        real = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
        if not (real and 0 < temperature < math.inf):
            raise ValueError(f"temperature: got {temperature!r}, expected a finite number above 0")
        self.temperature = temperature
        self._of: tuple[tuple[int, int], ...] = ()
        empty = torch.zeros(num_experts, features, dtype=dtype, device=self.mean_gates.device)
        self.register_buffer("directions", empty, persistent=False)

    @property
    def width(self) -> int:
        return self.directions.shape[1]

    @torch.no_grad()
    def refresh(
        self, lora_a: torch.Tensor, lora_b: torch.Tensor, output_offsets: Sequence[int] = (0,)
    ) -> ArrowRouter:  # fmt: skip
        """Sets the directions of these factors, [M or 1, G*r, K] and [M or 1, G*Ng, r], and returns the router.

        In evaluation, factors that did not change since the last call cost nothing. (A write through .data leaves no
        trace; nor does an optimizer's fused step, which is why training asks anew each time.)
        """
        if not torch.compiler.is_compiling():
            of = () if self.training else tuple((t.data_ptr(), t._version) for t in (lora_a, lora_b))
            if of and of == self._of:
                return self
            self._of = of
        found = leading_directions(lora_a, lora_b, len(output_offsets))
        self.directions = found.expand(self.num_experts, -1).to(self.directions)
        return self

    def gates(self, x: torch.Tensor, mask: torch.Tensor | None, tasks: torch.Tensor | None) -> Gates:
        likeness = F.linear(x, self.directions.to(x.dtype)).abs()
        return choose(likeness / self.temperature, self.top_k)


@torch.no_grad()
def leading_directions(lora_a: torch.Tensor, lora_b: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """v [M, K]: the unit vector that B_e A_e x answers most to, its leading right singular vector; its sign is free.

    A^T = Q R, so that B A = (B R^T) Q^T and v = Q w, w the eigenvector of R (B^T B) R^T with the largest eigenvalue. Of
    several groups the update is the block-diagonal B times the stacked A. Where B is zero, v is some direction of A.

    Args: lora_a [M or 1, groups * r, K]; lora_b [M or 1, groups * Ng, r]. The products are made in float64.

    Source: Arrow (arXiv 2405.11157), without power iterations.

    Example:
        >>> from adamix_kernels.routing import leading_directions
        >>> a, b = torch.randn(2, 3, 8), torch.randn(2, 5, 3)
        >>> v = leading_directions(a, b)
        >>> torch.allclose((b @ a @ v.unsqueeze(-1)).flatten(1).norm(dim=1), torch.linalg.matrix_norm(b @ a, 2))
        True
    """
    a, b = lora_a.double(), lora_b.double()
    q, r = torch.linalg.qr(a.mT)  # [M, K, n], [M, n, G*r], n = min(K, G*r)
    rank = b.shape[2]
    blocks = b.view(b.shape[0], groups, -1, rank)
    inner = torch.stack([torch.block_diag(*grams) for grams in blocks.mT @ blocks])  # [M, G*r, G*r]
    _, vectors = torch.linalg.eigh(r @ inner @ r.mT)
    found: torch.Tensor = (q @ vectors[..., -1:]).squeeze(-1)
    return found.to(lora_a.dtype)
