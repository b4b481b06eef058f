"""Public function of routed LoRA: documentation, argument checks, the dropout seed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..._backends import check_request
from .._checks import check_flag, check_tensor
from .._direct import autocasts, may_be_direct
from .._gates import check_mix
from .._groups import check_number
from .._lora_arguments import autocast_lora, check_inplace, check_lora, seed_tensor
from .._node import NODE
from .._passes import fold_passes
from ..gated_lora.api import gated_lora
from .direct import call
from .op import OPS, routed_lora_op


def routed_lora(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    *,
    base: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
    mix: str = "outputs",
    scaling: float | torch.Tensor = 1,  # torch.compile(dynamic=True) traces twice for a float read from a default
    groups: int = 1,
    output_offsets: Sequence[int] = (0,),
    dropout_p: float = 0,
    seed: int | torch.Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """out[..., o_g : o_g+Ng] = base[..., o_g : o_g+Ng] + scaling * (dropout(x) A[i]_g^T) B[j]_g^T for every group g.

    With gates, of several experts, s_k the scaling of expert k (the groups left out):
        mix "outputs": out = base + sum_k gates_k s_k (dropout(x) A[i_k]^T) B[j_k]^T
        mix "weights": out = base + dropout(x) (sum_k gates_k A[i_k])^T (sum_k gates_k s_k B[j_k])^T

    Args:
        x: [B, S, K], floating. B, S and both may be 0.
        lora_a: [Ma, groups * r, K], x's dtype. lora_b: [Mb, groups * Ng, r], x's dtype.
        a_index, b_index: i and j, int32 or int64, [B] (per sample) or [B, S] (per token); None only for a
            bank of one. The sides are independent. With gates, see there.
        base: [B, S, N], x's dtype; None for zeros of width max(output_offsets) + Ng.
        gates: float32 or x's dtype; None for one expert, unweighted. Either of K experts that each sample or token
            chooses: [B, K] or [B, S, K], and so is every index given; slot k takes A[i_k] and B[j_k], an expert may
            stand in two slots, and K may be 0. Or of all M experts: both indices None, gates [B, M] or [B, S, M], and
            each bank of M or of one. A bank of one is in every slot of "outputs" (one A and many B: HydraLoRA).
        mix: what the gates weigh, "outputs" or "weights" (SMEAR, Polytropon); in the latter a bank of one is taken
            once, unweighted, unless both are of one.
        scaling: alpha / r, a finite number; or float32 [M], one for each expert of lora_b, of lora_a where lora_b is a
            bank of one, which is not differentiated by.
        groups: how many column ranges the factors serve; each has its own r rows of A and Ng rows of B.
        output_offsets: first output column of each group; ranges may not overlap. GPT-2's fused c_attn with
            LoRA on q and v: groups=2, output_offsets=(0, 2H).
        dropout_p: probability of dropping an element of x, 0 <= p < 1; kept ones are divided by 1 - p.
        seed: what the mask is computed from (see ops/_dropout.py): an int64, or a 0-dimensional int64 tensor
            on x's device; None draws one from the global generator of x's device. Unused when dropout_p is 0.
        inplace: write the output over base; the same bits. base must then be contiguous, share no memory with
            x, lora_a and lora_b, and while autograd records be neither a leaf that requires grad nor a
            part of another tensor. If a backward needs base's old value, that backward raises.
        backend: "auto", "reference", "triton" or "cuda". "auto" takes the reference for what the kernels do not hold:
            "cuda" takes up to 64 groups, and without gates as many narrow columns, r in units of 16 for every group,
            as a GPU's shared memory gives it (docs/auto.md).

    Returns:
        [B, S, N], x's dtype; in base's memory if inplace. Differentiable once in x, lora_a, lora_b, gates and
        base; an expert that no sample used gets an exactly zero gradient.

    Under autocast every floating argument is cast to the autocast dtype, but float64, scaling, and gates in float32.

    Memory at the peak, in bytes beyond the arguments, for e bytes an element, one group and K, N well above r. The
    forward counts its output (none if inplace) and what it saves, the backward its gradients:
        triton, cuda: forward `e * B*S * (N + r)`, backward `e * (B*S * (K + r) + r * (Ma*K + Mb*N))`, and a float32
            copy of the banks' gradients for each of the parts that many tokens are split into. Dropout adds nothing.
        reference, float32, indices [B]: forward `e * (B*S * (N + r) + B * r * N)`,
            backward `e * (B*S * (K + r) + B * r * K + r * (Ma*K + Mb*N))`
        reference, float32, indices [B, S], with T tokens at most to an expert: forward `e * B*S * (2*N + r)`,
            backward `e * (B*S * (K + r) + T * K + r * (Ma*K + Mb*N))`
        reference on a GPU, float32, indices [B, S]: forward `e * B*S * (3*N + r)`,
            backward `e * (B*S * (3*K + r) + r * (Ma*K + Mb*N))`
        reference, float32, indices [B], dropout, K >= N: forward `B*S * K * (2*e + 1)`,
            backward `B*S * (e * (3*K + r) + K) + e * r * (Ma*K + Mb*N)`

    With gates the forward saves beside its output, on every backend, the narrow values before gates, `e * B*S * T`
    bytes: T is M * r with dense gates, K * r with K chosen, r where the A side is a bank of one. The backward makes
    `B*S` or `B` times as many values of gates' dtype as there are slots, beside the gradients above.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong; the message names it.
        IndexError: an expert id outside its bank (always on the CPU; on a GPU with ADAMIX_CHECK=1).
            Unchecked on a GPU, "triton" and "cuda" make the output's rows of such an id and their gradient of x NaN.
            With "cuda" no bank learns from such a row. Nor with "triton", but that the side whose id is right takes
            what is not finite in the row's x or gradient.
        BackendUnavailableError: an explicit backend cannot serve the call.

    Source: AdaMix (arXiv 2205.12410), section 3; `MergedLinear` of the reference project's NLG/loralib. Gates: LoRAMoE,
        MoLA (arXiv 2402.08562), HydraLoRA; weights: SMEAR (arXiv 2306.03745), Polytropon (arXiv 2202.13914).

    Example:
        >>> x, base = torch.randn(2, 5, 8), torch.randn(2, 5, 6)
        >>> a, b = torch.randn(4, 2, 8), torch.randn(4, 6, 2)
        >>> out = routed_lora(x, a, b, torch.tensor([1, 2]), torch.tensor([0, 2]), base=base, scaling=2.0)
        >>> torch.allclose(out[0], base[0] + 2 * x[0] @ a[1].mT @ b[0].mT, atol=1e-4)
        True
        >>> gates = torch.randn(2, 5, 4).softmax(-1)  # every token weighs all four experts
        >>> out = routed_lora(x, a, b, None, None, base=base, gates=gates)
        >>> parts = torch.stack([x[0] @ a[e].mT @ b[e].mT for e in range(4)], -1)
        >>> torch.allclose(out[0], base[0] + (parts * gates[0].unsqueeze(1)).sum(-1), atol=1e-4)
        True
    """
    if mix != "outputs":
        check_mix(mix)
    # A number's type is told in a third of the time of isinstance with a tensor's class.
    if gates is not None or (type(scaling) not in (int, float) and isinstance(scaling, torch.Tensor)):
        tensors = x, lora_a, lora_b, a_index, b_index, base
        return gated_lora(tensors, gates, mix, scaling, groups, output_offsets, dropout_p, seed, inplace, backend)
    return routed_by_pass(
        x, lora_a, lora_b, a_index, b_index, 0, base, scaling,  # type: ignore[arg-type]  # a number, as was just asked
        groups, output_offsets, dropout_p, seed, inplace, backend,
    )  # fmt: skip


def routed_by_pass(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    passes: int,
    base: torch.Tensor | None,
    scaling: float,
    groups: int,
    output_offsets: Sequence[int],
    dropout_p: float,
    seed: int | torch.Tensor | None,
    inplace: bool,
    backend: str,
    consumed: bool = False,
) -> torch.Tensor:
    """routed_lora; with passes > 0 the indices are [passes], one expert for B / passes samples after another.

    For the modules, which know that passes divides B: autograd sees one operation, no views around it. consumed: who
    calls does not look at base again, which may then be overwritten and keep its old history.
    """
    node = NODE.module
    if node is not None and not torch.compiler.is_compiling():
        out = node.lora(
            x, lora_a, lora_b, a_index, b_index, base, seed, scaling, groups, output_offsets, dropout_p,
            inplace, consumed, passes, backend,
        )  # fmt: skip
        if out is not None:
            return out
    given = base
    direct = may_be_direct()
    if not direct or autocasts():
        check_tensor("x", x)
        x, lora_a, lora_b, base = autocast_lora(x, lora_a, lora_b, base)
    drawn = _Once(seed_tensor, seed, x)
    offsets: Sequence[int] = output_offsets
    for checked in (False, True):
        if checked:
            check_tensor("x", x)
            with torch.no_grad():
                folded, other = fold_passes(x, passes), None if base is None else fold_passes(base, passes)
            tensors = folded, lora_a, lora_b, a_index, b_index, other
            offsets = check_lora(tensors, scaling, groups, output_offsets)
            check_request(backend)
            check_number("dropout_p", dropout_p, 0, 1, "a Python number, 0 <= dropout_p < 1")
            check_flag("inplace", inplace)
        if direct:
            over = functools.partial(check_inplace, given, x, lora_a, lora_b)
            out = call(
                (x, lora_a, lora_b, a_index, b_index, base), scaling, groups, offsets, dropout_p, backend, inplace,
                passes, checked, drawn, over,
            )  # fmt: skip
            if out is not None:
                return out if base is None or out.shape == base.shape else out.view(base.shape)
    target = check_inplace(given, x, lora_a, lora_b) if inplace else base
    key = drawn() if dropout_p > 0 else None
    rows = fold_passes(x, passes)
    if not inplace:
        target = target if target is None else fold_passes(target, passes)
    arguments = (rows, lora_a, lora_b, a_index, b_index, target, key, scaling, groups, offsets, dropout_p, backend)
    if not inplace:
        out = routed_lora_op(*arguments)[0]
        return out.view(*x.shape[:2], out.shape[2]) if passes else out
    assert base is not None  # check_inplace
    assert target is not None
    if torch.compiler.is_compiling():
        # The compiler decides itself what may share memory.
        return target.copy_(
            routed_lora_op(*arguments[:5], fold_passes(target, passes), *arguments[6:])[0].view_as(target)
        )
    return OPS.differentiable_inplace(*arguments).view(base.shape)


class _Once:
    """A seed that is drawn when it is first asked for, and then stays: what is drawn twice would differ."""

    def __init__(self, draw: Callable[[Any, torch.Tensor], torch.Tensor], seed: Any, x: torch.Tensor):
        self._draw, self._arguments = draw, (seed, x)
        self._drawn: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        if self._drawn is None:
            self._drawn = self._draw(*self._arguments)
        return self._drawn
