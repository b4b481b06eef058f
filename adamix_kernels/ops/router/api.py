"""Public function of the router: documentation and argument checks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..._backends import check_request
from .._checks import autocast_dtype, check_shape, check_tensor, fail
from .._router_arguments import MOST_EXPERTS as MOST_EXPERTS
from .._router_arguments import check_router_weight, chosen_of
from .autograd import router_op


class RouterOutput(NamedTuple):
    """What router_gates gives.

    gates: [..., K] of the chosen, the largest first, or [..., M] where dense. indices: int64, their experts, of the
    same shape; None where dense. logits: [..., M]. gates and logits are float32 (float64 for float64).

    Example:
        >>> from adamix_kernels.routing import router_gates
        >>> router_gates(torch.randn(2, 5, 8), torch.randn(4, 8)).indices is None
        True
    """

    gates: torch.Tensor
    indices: torch.Tensor | None
    logits: torch.Tensor


def router_gates(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int | None = None,
    backend: str = "auto",
) -> RouterOutput:
    """gates = softmax(x weight^T + bias); with top_k the largest top_k of them, divided by their sum.

    Args:
        x: [..., H], floating. weight: [M, H], 1 <= M <= 256, x's dtype or float32; rounded to x's dtype, in which the
            product is made. bias: [M], the weight's dtype, or None.
        top_k: how many experts a row chooses; None, or M: all, dense. Of equal logits the lower id is the larger; a NaN
            is chosen as infinity would be, and makes the row's gates NaN.
        backend: "auto", "reference", "triton" or "cuda": the last two make one launch of the forward, and read x once.

    Returns:
        RouterOutput(gates, indices, logits); the logits for balance_loss and z_loss of adamix_kernels.routing.
        Differentiable once in x, weight and bias, through gates and logits. Softmax and its gradient are float32
        (float64 for float64). Under autocast x takes its dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device or shape is wrong; the message names it.
        BackendUnavailableError: an explicit backend cannot serve the call.

    Source: Mixtral's top-k (arXiv 2401.04088), as MixLoRA (arXiv 2404.15159) and MoLA (arXiv 2402.08562) use it; dense
    as in LoRAMoE (arXiv 2312.09979).

    Example:
        >>> from adamix_kernels.routing import router_gates
        >>> gates, indices, logits = router_gates(torch.eye(3), torch.eye(3), top_k=2)
        >>> indices
        tensor([[0, 1],
                [1, 0],
                [2, 0]])
    """
    check_tensor("x", x)
    if x.dim() < 1:
        fail("x", "shape ()", "[..., H]")
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    check_router_weight("weight", weight, x)
    experts = weight.shape[0]
    if bias is not None:
        check_tensor("bias", bias, weight)
        check_shape("bias", bias, "[M]", experts)
    chosen = chosen_of(top_k, experts)
    check_request(backend)
    gates, indices, logits = router_op(x, weight, bias, chosen, backend)
    return RouterOutput(gates, indices if chosen else None, logits)
