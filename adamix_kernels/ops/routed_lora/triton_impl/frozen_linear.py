"""A frozen linear layer and its routed LoRA in one launch, forward and input gradient.

Not wired into the op: "auto" may use it only for shapes in `WINS`, and no committed measurement has put one there.
"""

from __future__ import annotations

from typing import Any

import torch

from ...._triton_utils import capability, dot_dtype, launch, precision
from .frozen_kernels import frozen_dx_kernel, frozen_forward_kernel
from .plan import MAX_RANK, Plan, make_plan
from .tables import config

# (capability, K, N, groups * r) -> row of benchmarks/results in which one launch beat linear, then routed LoRA.
WINS: dict[tuple[int, int, int, int], str] = {}


def wins(device: torch.device, features: int, width: int, rank: int) -> bool:
    """Whether a committed measurement says that one launch is faster on this GPU for this shape. No shape yet."""
    return (capability(device), features, width, rank) in WINS


def frozen_linear_lora(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_a: torch.Tensor, lora_b: torch.Tensor,
    a_index: torch.Tensor | None, b_index: torch.Tensor | None, scaling: float, *,
    offsets: tuple[int, ...] = (0,), seed: torch.Tensor | None = None, dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out = x W^T + bias, and out[..., o_g : o_g+Ng] += scaling * (dropout(x) A[i]_g^T) B[j]_g^T for every group g.

    Args:
        x: [B, S, K]. weight: [N, K], bias: [N] or None, frozen. lora_a: [Ma, groups*r, K], lora_b: [Mb, groups*Ng, r].
            One dtype: float16, bfloat16 or float32.
        a_index, b_index: int32 or int64, [B] or [B, S]; None for a bank of one.
        scaling: alpha / r. offsets: first output column of each group.
        seed: int64, 0-dimensional, on x's device; None exactly when dropout_p is 0.

    Returns:
        (out [B, S, N], t = dropout(x) A[i]^T [B, S, groups*r]), x's dtype. Not differentiable by itself.

    Raises:
        ValueError: groups * r beyond 128, or weight of another number of columns than x.

    Source: AdaMix (arXiv 2205.12410), section 3; `MergedLinear` of the reference project's NLG/loralib.
    """
    if weight.shape[1:] != x.shape[2:]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [N, {x.shape[2]}], x's features")
    _check_rank(lora_a)
    width = weight.shape[0]
    out, t = x.new_empty(*x.shape[:2], width), x.new_empty(*x.shape[:2], lora_a.shape[1])
    if x.shape[0] * x.shape[1] == 0:
        return out, t
    plan = make_plan(*x.shape[:2], lora_a, lora_b, a_index, b_index, offsets, width, sort=False)
    _launch(
        frozen_forward_kernel, plan, width,
        x.contiguous(), weight.contiguous(), bias, lora_a.contiguous(), lora_b.contiguous(),
        plan.a_index, plan.b_index, seed, out, t, *plan.scalars(dropout_p, scaling),
    )  # fmt: skip
    return out, t


def frozen_linear_lora_dx(
    grad_out: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor,
    a_index: torch.Tensor | None, b_index: torch.Tensor | None, scaling: float, *,
    offsets: tuple[int, ...] = (0,), seed: torch.Tensor | None = None, dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dt = scaling * sum over groups of dy_g B[j]_g; dx = dy W + keep / (1 - p) * (dt A[i]).

    grad_out: [B, S, N]; the rest as in frozen_linear_lora. Returns (dx [B, S, K], dt [B, S, groups*r]); the
    weight gradients follow from x, dt, grad_out and t as in `routed_lora`.

    Raises ValueError for groups * r beyond 128, or weight of another number of rows than grad_out has columns.
    """
    if weight.shape[:1] != grad_out.shape[2:]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [N, K] with N = {grad_out.shape[2]}")
    _check_rank(lora_a)
    width, features = weight.shape
    dx, dt = grad_out.new_empty(*grad_out.shape[:2], features), grad_out.new_empty(*grad_out.shape[:2], lora_a.shape[1])
    if grad_out.shape[0] * grad_out.shape[1] == 0:
        return dx, dt
    plan = make_plan(*grad_out.shape[:2], lora_a, lora_b, a_index, b_index, offsets, width, sort=False)
    _launch(
        frozen_dx_kernel, plan, features,
        grad_out.contiguous(), weight.contiguous(), lora_a.contiguous(), lora_b.contiguous(),
        plan.a_index, plan.b_index, seed, dx, dt, *plan.scalars(dropout_p, scaling),
    )  # fmt: skip
    return dx, dt


def _check_rank(lora_a: torch.Tensor) -> None:
    if lora_a.shape[1] > MAX_RANK:
        raise ValueError(f"lora_a: got {lora_a.shape[1]} rows (groups * r), expected at most {MAX_RANK} in one launch")


def _launch(kernel, plan: Plan, columns: int, *args) -> None:
    meta = frozen_meta(plan.capability, plan.dtype, plan.rank)
    tiles = -(-plan.num_rows // meta["BLOCK_M"]) * -(-columns // meta["BLOCK_N"])
    launch(kernel, (tiles,), args[0].device, *args, **plan.sizes, **meta)


def frozen_meta(gpu: int, dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """Block sizes for a padded rank; gpu: 10 * major + minor."""
    chosen = config("frozen_kernel", gpu, dtype.itemsize, rank)
    return dict(
        BLOCK_M=chosen.rows, BLOCK_N=chosen.cols, BLOCK_K=128 // dtype.itemsize, BLOCK_R=rank,
        DOT=dot_dtype(dtype), PRECISION=precision(dtype), num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        maxnreg=255,
    )  # fmt: skip
