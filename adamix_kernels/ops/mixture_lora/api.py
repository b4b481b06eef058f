"""Public function of the mixture: documentation and argument checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..._backends import check_request
from .._checks import check_flag, check_tensor, fail
from .._groups import check_groups, check_number, check_scaling
from .._lora_arguments import autocast_lora, base_width, check_factors, check_inplace, seed_tensor
from .._router_arguments import check_router_weight, chosen_of
from .autograd import mixture_inplace, mixture_lora_op


class MixtureOutput(NamedTuple):
    """What mixture_lora gives: routed_lora's output, and the gates, indices and logits that router_gates gives.

    Example:
        >>> from adamix_kernels.routing import mixture_lora
        >>> a, b = torch.randn(4, 2, 8), torch.randn(4, 6, 2)
        >>> mixture_lora(torch.randn(2, 5, 8), a, b, torch.randn(4, 8)).gates.shape
        torch.Size([2, 5, 4])
    """

    out: torch.Tensor
    gates: torch.Tensor
    indices: torch.Tensor | None
    logits: torch.Tensor


def mixture_lora(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    router: torch.Tensor,
    *,
    top_k: int | None = None,
    base: torch.Tensor | None = None,
    scaling: float = 1,
    groups: int = 1,
    output_offsets: Sequence[int] = (0,),
    dropout_p: float = 0,
    seed: int | torch.Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> MixtureOutput:
    """out = base + scaling * sum_k g_k (dropout(x) A[i_k]^T) B[i_k]^T, g = softmax(x router^T).

    With top_k the largest top_k of g, divided by their sum. It is routed_lora(gates=g) behind router_gates as one op:
    where a tile of the kernels holds the columns of all experts, one launch, in which the router reads no x of its own.
    The router reads x before dropout.

    Args:
        x: [B, S, K], floating. B, S and both may be 0.
        lora_a: [Ma, groups * r, K], x's dtype. lora_b: [Mb, groups * Ng, r], x's dtype. Each is a bank of M experts or
            of one, and one of both is of M.
        router: [M, K], 1 <= M <= 256, x's dtype or float32; rounded to x's dtype, in which the product is made.
        top_k: how many experts a token chooses; None, or M: all, dense. Of equal logits the lower id is the larger; a
            NaN is chosen as infinity would be, and makes the token's gates NaN.
        base, groups, output_offsets, dropout_p, seed, inplace: as routed_lora's. scaling: a finite number.
        backend: "auto", "reference", "triton" or "cuda", which takes up to 64 groups; "auto" takes more elsewhere.

    Returns:
        MixtureOutput(out, gates, indices, logits). Differentiable once in x, lora_a, lora_b, router and base, through
        out, gates and logits; an expert that no token chose gets exactly zero gradients in the banks.

    Under autocast x, lora_a, lora_b and base are cast to the autocast dtype, but float64; the router is not.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong; the message names it.
        BackendUnavailableError: an explicit backend cannot serve the call.

    Source: LoRAMoE (arXiv 2312.09979) and HydraLoRA (arXiv 2404.19245), dense; MoLA (arXiv 2402.08562), top 2.

    Example:
        >>> from adamix_kernels import routed_lora
        >>> from adamix_kernels.routing import mixture_lora, router_gates
        >>> x, router = torch.randn(2, 5, 8), torch.randn(4, 8)
        >>> a, b = torch.randn(4, 2, 8), torch.randn(4, 6, 2)
        >>> out, gates, index, logits = mixture_lora(x, a, b, router, top_k=2)
        >>> gates, index, logits = router_gates(x, router, top_k=2)
        >>> torch.allclose(out, routed_lora(x, a, b, index, index, gates=gates), atol=1e-4)
        True
    """
    given = base
    check_tensor("x", x)
    x, lora_a, lora_b, base = autocast_lora(x, lora_a, lora_b, base)
    check_factors(x, lora_a, lora_b)
    check_router_weight("router", router, x)
    experts = router.shape[0]
    for name, bank in (("lora_a", lora_a), ("lora_b", lora_b)):
        if bank.shape[0] not in (1, experts):
            fail(name, f"a bank of {bank.shape[0]}", f"1 or {experts} experts, as the router weighs {experts}")
    if max(lora_a.shape[0], lora_b.shape[0]) != experts:
        fail("lora_b", "a bank of one, as lora_a is", f"{experts} experts on one side, as the router weighs {experts}")
    chosen = chosen_of(top_k, experts)
    width = base_width(x, base)
    check_scaling(scaling)
    offsets = check_groups(lora_a, lora_b, groups, output_offsets, width)
    check_request(backend)
    check_number("dropout_p", dropout_p, 0, 1, "a Python number, 0 <= dropout_p < 1")
    check_flag("inplace", inplace)
    target = check_inplace(given, x, lora_a, lora_b, router=router) if inplace else base
    key = seed_tensor(seed, x) if dropout_p > 0 else None
    options = key, chosen, scaling, groups, offsets, dropout_p, backend
    tensors = x, lora_a, lora_b, router
    if not inplace or torch.compiler.is_compiling():
        out, _, gates, index, logits = mixture_lora_op(*tensors, target, *options)
        if inplace:
            # The compiler decides itself what may share memory.
            assert target is not None  # check_inplace
            out = target.copy_(out)
    else:
        assert base is not None  # check_inplace
        out, gates, index, logits = mixture_inplace(*tensors, target, *options)
        out = out.view(base.shape)
    return MixtureOutput(out, gates, index if chosen else None, logits)
