"""Routers that are linear in a token, or in a sentence's mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..ops._checks import autocast_dtype, check_positive
from ..ops.mixture_lora.api import MixtureOutput
from ..ops.router.api import MOST_EXPERTS, router_gates
from ..ops.router.op import by_kernel
from .gates import GateRouter, Gates, _softmax, check_top_k, choose

# MixLoRA's and Mixtral's.
INIT_STD = 0.02


class LinearRouter(GateRouter):
    """p = softmax(x Wg^T) in float32; g = p, or the top_k of p divided by their sum.

    Args:
        features: K. num_experts: M. top_k: how many experts serve a token; None: all (dense).
        dtype: of the weight. balance, z, device: see GateRouter.

    Parameters: weight [M, K], drawn from N(0, 0.02^2); no bias. The product is made in x's dtype. Where kernels serve
    (attribute `backend`, which a layer sets to its own), it is one call of router_gates; within RoutedLoRALinear, one
    of mixture_lora, LoRA and all.

    Shapes: x [B, S, K] -> gates [B, S, top_k] with index, or [B, S, M].

    Raises ValueError: top_k is not in 1..M, M is below 2, or features below 1.

    Source: LoRAMoE (arXiv 2312.09979) and HydraLoRA (arXiv 2404.19245), dense; MixLoRA (arXiv 2404.15159) and MoLA
    (arXiv 2402.08562), top 2.

    Example:
        >>> from adamix_kernels.routing import LinearRouter
        >>> gates, index = LinearRouter(8, 4, top_k=2)(torch.randn(2, 5, 8))
        >>> gates.shape, index.dtype, torch.allclose(gates.sum(-1), torch.ones(2, 5))
        (torch.Size([2, 5, 2]), torch.int64, True)
    """

    def __init__(
        self, features: int, num_experts: int, top_k: int | None = None, *, dtype: torch.dtype | None = None,
        **more: Any,
    ):  # fmt: skip
        check_positive(features=features)
        super().__init__(num_experts, **more)
        self.top_k = check_top_k(top_k, num_experts)
        self.weight = _weight(num_experts, features, dtype, self.mean_gates.device)

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def gates(self, x: torch.Tensor, mask: torch.Tensor | None, tasks: torch.Tensor | None) -> Gates:
        found, logits = self._found(x)
        self._leave(logits, found.chosen, mask)
        return found

    def within(
        self, call: Callable[[torch.Tensor, int | None], MixtureOutput], x: torch.Tensor, mask: torch.Tensor | None
    ) -> MixtureOutput:  # fmt: skip
        """What call(weight, top_k) gives, an op that makes the gates of x by itself, with all that forward() does."""
        self._begin(x, mask)
        made = call(self._weight_in(self.computes_in(x)), self.top_k)
        self._leave(made.logits, made.indices, mask)
        self._end(Gates(made.gates, made.indices), mask)
        return made

    def computes_in(self, x: torch.Tensor) -> torch.dtype:
        """The dtype of the product with x."""
        return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device.type) or x.dtype

    def _weight_in(self, dtype: torch.dtype) -> torch.Tensor:
        """As the ops take it, for x of this dtype."""
        return self.weight if self.weight.dtype in (dtype, torch.float32) else self.weight.to(dtype)

    def _found(self, x: torch.Tensor) -> tuple[Gates, torch.Tensor]:
        """The gates of x [..., K], and the logits [..., M] that they are made of."""
        dtype = self.computes_in(x)
        if self.num_experts <= MOST_EXPERTS and by_kernel(self.backend, x.device, dtype):
            weight = self._weight_in(dtype)
            gates, index, logits = router_gates(x, weight, top_k=self.top_k, backend=self.backend)
            return Gates(gates, index), logits
        logits = F.linear(x, self.weight.to(x.dtype))
        return choose(logits, self.top_k), logits

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.num_experts}, top_k={self.top_k}"


class SentenceRouter(LinearRouter):
    """g = softmax(Wg mean_s(x_s)): one set of gates a sample, from the mean of its tokens that are no padding.

    Arguments and parameters as LinearRouter's. Shapes: x [B, S, K], mask [B, S] -> gates [B, M], or [B, top_k].
    It reads the whole text: not for a model that generates.

    Source: SMEAR (arXiv 2306.03745), whose experts are averaged with these gates (mix="weights").

    Example:
        >>> from adamix_kernels.routing import SentenceRouter
        >>> SentenceRouter(8, 4)(torch.randn(2, 5, 8)).gates.shape
        torch.Size([2, 4])
    """

    per_token = False

    def gates(self, x: torch.Tensor, mask: torch.Tensor | None, tasks: torch.Tensor | None) -> Gates:
        wide = x if x.dtype == torch.float64 else x.float()
        if mask is None or mask.shape != x.shape[:2]:
            mean = wide.mean(1)
        else:
            counted = (mask != 0).to(wide.dtype)
            mean = (wide * counted.unsqueeze(-1)).sum(1) / counted.sum(1, keepdim=True).clamp_min(1)
        found, logits = self._found(mean)
        self._leave(logits, found.chosen, None)
        return found

    def _note(self, found: Gates, mask: torch.Tensor | None) -> None:
        super()._note(found, None)


class ThresholdRouter(LinearRouter):
    """g = max(0, p - tau) / its sum, p = softmax(x Wg^T), tau = limit * sigmoid(x w^T + b): as many experts as x needs.

    Args:
        features, num_experts, dtype, balance, z, device: as LinearRouter's.
        limit: the largest threshold; None is 1 / M, below which no token is left without an expert.

    Parameters: weight [M, K], threshold_weight [1, K], threshold_bias [1], the last two zero.

    Shapes: x [B, S, K] -> gates [B, S, M], zeros where p is below the threshold.

    Raises ValueError: limit is not in (0, 1), or M is below 2.

    Source: AdaMoLE (arXiv 2405.00361).

    Example:
        >>> from adamix_kernels.routing import ThresholdRouter
        >>> ThresholdRouter(8, 4)(torch.randn(2, 5, 8)).gates.shape
        torch.Size([2, 5, 4])
    """

    def __init__(self, features: int, num_experts: int, *, limit: float | None = None, **more: Any):
        super().__init__(features, num_experts, None, **more)
        if limit is not None and not (isinstance(limit, float) and 0 < limit < 1):
            raise ValueError(f"limit: got {limit!r}, expected a number between 0 and 1, or None for 1 / num_experts")
        self.limit = 1 / num_experts if limit is None else limit
        device, dtype = self.weight.device, self.weight.dtype
        self.threshold_weight = nn.Parameter(torch.zeros(1, features, device=device, dtype=dtype))
        self.threshold_bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def gates(self, x: torch.Tensor, mask: torch.Tensor | None, tasks: torch.Tensor | None) -> Gates:
        logits = F.linear(x, self.weight.to(x.dtype))
        probabilities = _softmax(logits)
        level = F.linear(x, self.threshold_weight.to(x.dtype), self.threshold_bias.to(x.dtype))
        above = F.relu(probabilities - self.limit * level.to(probabilities.dtype).sigmoid())
        total = above.sum(-1, keepdim=True)
        self._leave(logits, None, mask)
        return Gates(above / torch.where(total == 0, torch.ones_like(total), total), None)


def _weight(rows: int, columns: int, dtype: torch.dtype | None, device: torch.device) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))
    nn.init.normal_(weight, std=INIT_STD)
    return weight
