"""Public function of the routed adapter: documentation and argument checks."""

from __future__ import annotations

import torch

from ..._backends import check_request
from .._adapter_arguments import check_adapter
from .._checks import autocast, check_tensor
from .._direct import autocasts, may_be_direct
from .._gates import check_mix
from .._node import NODE
from .._passes import fold_passes
from ..gated_adapter.api import gated_adapter
from .direct import call
from .op import routed_adapter_op


def routed_adapter(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = "gelu",
    gates: torch.Tensor | None = None,
    mix: str = "outputs",
    backend: str = "auto",
) -> torch.Tensor:
    """out = residual + act(x Wd[i]^T + bd[i]) Wu[j]^T + bu[j], every sample or token through its own experts.

    With gates, of several experts:
        mix "outputs": out = residual + sum_k gates_k (act(x Wd[i_k]^T + bd[i_k]) Wu[j_k]^T + bu[j_k])
        mix "weights": out = residual + sum_k gates_k (z Wu[j_k]^T + bu[j_k]),
            z = act(sum_k gates_k (x Wd[i_k]^T + bd[i_k]))

    Args:
        x: [B, S, H], floating. B, S and both may be 0.
        down_weight: [Md, r, H], x's dtype. down_bias: [Md, r] or None.
        up_weight: [Mu, Hout, r], x's dtype. up_bias: [Mu, Hout] or None.
        down_index, up_index: i and j, int32 or int64, [B] (per sample) or [B, S] (per token); None only
            for a bank of one. The sides are independent. With gates, see there.
        residual: [B, S, Hout], x's dtype, or None for nothing added. Passing x itself costs no extra read.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or None.
        gates: float32 or x's dtype; None for one expert, unweighted. Either of K experts that each sample or token
            chooses: [B, K] or [B, S, K], and so is every index given; slot k takes Wd[i_k] and Wu[j_k], an expert may
            stand in two slots, and K may be 0. Or of all M experts: both indices None, gates [B, M] or [B, S, M], and
            each bank of M or of one. A bank of one is in every slot of "outputs".
        mix: what the gates weigh, "outputs" or "weights" (SMEAR); in the latter a bank of one is taken once,
            unweighted, unless both are of one.
        backend: "auto", "reference", "triton" or "cuda". "auto" takes the reference for an r that the kernels do not
            hold: "triton" takes up to 256, "cuda" without gates what a GPU's shared memory gives it (docs/auto.md).

    Returns:
        [B, S, Hout], x's dtype. Differentiable once in every floating argument; an expert that no
        sample used gets an exactly zero gradient.

    Under autocast every floating argument is cast to the autocast dtype, but float64, and gates in float32.

    Memory at the peak, in bytes beyond the arguments, for e bytes an element and H, Hout well above r. The forward
    counts its output and what it saves, the backward its gradients:
        triton, cuda: forward `e * B*S * (Hout + r)`,
            backward `e * (B*S * (H + r) + r * (Md*H + Mu*Hout))`, and a float32 copy of the banks' gradients for each
            of the parts that many tokens are split into.
        reference, float32, indices [B]: forward `e * (B*S * (Hout + 2*r) + B * r * Hout)`,
            backward `e * (B*S * (H + r) + B * r * H + r * (Md*H + Mu*Hout))`
        reference, float32, indices [B, S], with T tokens at most to an expert:
            forward `e * (B*S * (Hout + 2*r) + T * Hout)`,
            backward `e * (B*S * (H + r) + T * H + r * (Md*H + Mu*Hout))`
        reference on a GPU, float32, indices [B, S]: forward `e * B*S * (3*Hout + 2*r)`,
            backward `e * (B*S * (3*H + r) + r * (Md*H + Mu*Hout))`

    With gates the forward saves beside its output, on every backend, the narrow values before the activation and
    gates, `e * B*S * T` bytes: T is M * r with dense gates, K * r with K chosen, r where the down side is a bank of
    one. The backward makes `B*S` or `B` times as many values of gates' dtype as there are slots, beside the gradients
    above.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device or shape is wrong; the message names it.
        IndexError: an expert id outside its bank (always on the CPU; on a GPU with ADAMIX_CHECK=1).
            Unchecked on a GPU, "triton" and "cuda" make the output's rows of such an id and their gradient of x NaN.
            With "cuda" no bank learns from such a row. Nor with "triton", but that the side whose id is right takes
            what is not finite in the row's x or gradient, and its up_bias the gradient itself.
        BackendUnavailableError: an explicit backend cannot serve the call.

    Source: AdaMix (arXiv 2205.12410), section 3; `ExpertSoup.forward` of the reference project. Mixed weights:
        SMEAR (arXiv 2306.03745).

    Example:
        >>> x = torch.randn(2, 5, 8)  # two samples of five tokens
        >>> down, up = torch.randn(4, 3, 8), torch.randn(1, 8, 3)  # four experts down, a shared one up
        >>> out = routed_adapter(x, down, None, up, None, torch.tensor([3, 0]), None, residual=x)
        >>> first = x[0] + torch.nn.functional.gelu(x[0] @ down[3].mT) @ up[0].mT
        >>> torch.allclose(out[0], first, atol=1e-5)
        True
        >>> gates = torch.tensor([[0.25, 0.75], [0.5, 0.5]])  # two experts for each sample
        >>> out = routed_adapter(x, down, None, up, None, torch.tensor([[3, 0], [1, 2]]), None, gates=gates)
        >>> h = [torch.nn.functional.gelu(x[0] @ down[e].mT) @ up[0].mT for e in (3, 0)]
        >>> torch.allclose(out[0], 0.25 * h[0] + 0.75 * h[1], atol=1e-5)
        True
    """
    if mix != "outputs":
        check_mix(mix)
    if gates is not None:
        tensors = x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual
        return gated_adapter(tensors, gates, mix, activation, backend)
    return routed_by_pass(
        x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, 0, residual, activation, backend
    )  # fmt: skip


def routed_by_pass(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_index: torch.Tensor | None,
    up_index: torch.Tensor | None,
    passes: int,
    residual: torch.Tensor | None,
    activation: str | None,
    backend: str,
) -> torch.Tensor:
    """routed_adapter; with passes > 0 the indices are [passes], one expert for B / passes samples after another.

    For the modules, which know that passes divides B: autograd sees one operation, no views around it.
    """
    add_input = residual is x
    added = None if add_input else residual
    node = NODE.module
    if node is not None and not torch.compiler.is_compiling():
        out = node.adapter(
            x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, added, add_input, activation, passes,
            backend,
        )  # fmt: skip
        if out is not None:
            return out
    direct = may_be_direct()
    if not direct or autocasts():
        check_tensor("x", x)
        x, down_weight, down_bias, up_weight, up_bias, added = autocast(
            x, down_weight, down_bias, up_weight, up_bias, added
        )
    for checked in (False, True):
        if checked:
            check_tensor("x", x)
            with torch.no_grad():
                folded, other = fold_passes(x, passes), None if added is None else fold_passes(added, passes)
            between = down_weight, down_bias, up_weight, up_bias, down_index, up_index
            check_adapter((folded, *between, other), add_input, activation)
            check_request(backend)
        if direct:
            tensors = x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, added
            out = call(tensors, add_input, activation, backend, passes, checked)
            if out is not None:
                return out
    rows, added = fold_passes(x, passes), None if added is None else fold_passes(added, passes)
    tensors = rows, down_weight, down_bias, up_weight, up_bias, down_index, up_index, added
    out, _ = routed_adapter_op(*tensors, add_input, activation or "", backend)
    return out.view(*x.shape[:2], out.shape[2]) if passes else out
