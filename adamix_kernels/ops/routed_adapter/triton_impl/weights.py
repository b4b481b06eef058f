"""Launches of the weight gradients: planes over a split of the tokens, then their sum."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...._triton_utils import capability, dot_dtype, launch, memory, precision
from ..._adapter_planes import count_splits, sum_planes
from ..._routed_plan import MIN_SPAN, fits, per_row, power_of_2, sort_rows
from .one_read import UpPlanes
from .tables import config, sums_by_dot
from .weight_grad import adapter_weight_grad_kernel


class _Tokens(NamedTuple):
    """Where one side's weight gradient finds an expert's rows: spans of one expert, masked rows, or sorted rows."""

    index: torch.Tensor | None
    perm: torch.Tensor | None
    edges: torch.Tensor | None
    masked: bool
    batch: int
    span: int
    div: int


def weight_grads(
    x, dpre, grad_out, h, down_index, up_index, down_shape, up_shape, need_up, activation, up_planes: UpPlanes | None
):
    """(dWd, dbd, dWu, dbu): a side's pair is empty tensors where dpre is None, or not need_up.

    activation: of h, "" where it is applied. up_planes: of the up side, where an earlier launch has made them.
    """
    batch, tokens, r = h.shape
    down = _outputs(x, down_shape if dpre is not None else None)
    up = _outputs(x, up_shape if need_up else None)
    outputs = (*down, *up)
    if batch * tokens == 0:
        return tuple(t.zero_() for t in outputs)
    if dpre is None and not need_up:
        return outputs
    down_tokens = _tokens(batch, tokens, r, down_index if dpre is not None else None, down_shape[0])
    up_tokens = _tokens(batch, tokens, r, up_index if need_up else None, up_shape[0])
    rp = max(16, power_of_2(r))
    chosen = config("adapter_weight_grad_kernel", capability(x.device), x.element_size(), rp)
    # A side of no features still has its bias.
    blocks = [max(1, -(-n // chosen.cols)) for n in (down_shape[2], up_shape[1])]
    need = (dpre is not None, need_up and up_planes is None)
    ways = _ways(down_tokens, down_shape[0]), _ways(up_tokens, up_shape[0])
    planes_of = sum(m // way * r for m, way, wanted in zip((down_shape[0], up_shape[0]), ways, need) if wanted)
    features = sum(b for b, wanted in zip(blocks, need) if wanted)
    splits = count_splits(batch * tokens, max(1, features), chosen.rows, planes_of, sum(need) * x.element_size())
    down_splits, up_splits = (max(1, splits // way) for way in ways)
    planes = [*_planes(x, down, down_splits), *_planes(x, up, up_splits)]
    if need_up and up_planes is not None:
        planes[2:], up_splits = up_planes[:2], up_planes.programs
    # Of the down side one program more, for the bias.
    programs = need[0] * down_shape[0] * (-(-down_shape[2] // chosen.cols) + 1) * down_splits
    programs += need[1] * up_shape[0] * blocks[1] * up_splits
    absent = [None, None]
    launch(
        adapter_weight_grad_kernel, (programs,), x.device,
        x, dpre, grad_out, h, *down_tokens[:3], *up_tokens[:3],
        *(planes[:2] if need[0] else absent), *(planes[2:] if need[1] else absent),
        *down_tokens[4:], *up_tokens[4:], down_splits, up_splits,
        H=down_shape[2], O=up_shape[1], R=r, RP=rp, MD=down_shape[0], MASK_D=down_tokens.masked,
        MU=up_shape[0], MASK_U=up_tokens.masked, ACTIVATION=activation,
        ONES=sums_by_dot(capability(x.device), x.element_size(), rp),
        DOT=dot_dtype(x.dtype), PRECISION=precision(x.dtype), ROWS=chosen.rows, COLS=chosen.cols,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    sum_planes(x, planes, outputs, down_splits, up_splits)
    return outputs


def _ways(tokens: _Tokens, experts: int) -> int:
    """Among how many experts a side's tokens are shared out; 1 where every program walks all of them."""
    alone = tokens.perm is not None or (tokens.index is not None and not tokens.masked)
    return experts if alone else 1


def _planes(x: torch.Tensor, outputs: tuple[torch.Tensor, torch.Tensor], splits: int) -> list[torch.Tensor]:
    """What a side's splits write: the outputs themselves where there is but one."""
    return [t if splits == 1 else memory(x, splits, *t.shape, dtype=torch.float32) for t in outputs]


def _tokens(batch: int, tokens: int, r: int, index: torch.Tensor | None, experts: int) -> _Tokens:
    if index is None:
        return _Tokens(None, None, None, False, 1, batch * tokens, 1)
    if index.dim() == 1 and tokens >= MIN_SPAN and experts > 1:
        return _Tokens(index.contiguous(), None, None, False, batch, tokens, tokens)
    if experts == 1 or fits(experts, r):
        return _Tokens(index.contiguous(), None, None, True, 1, batch * tokens, tokens if index.dim() == 1 else 1)
    return _Tokens(None, *sort_rows(per_row(index, batch, tokens), experts), False, 1, batch * tokens, 1)


def _outputs(x: torch.Tensor, shape: torch.Size | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A bank's and its bias's gradient, not yet written."""
    if shape is None:
        return memory(x, 0), memory(x, 0)
    bias = shape[:2]
    return memory(x, *shape), memory(x, *bias)
