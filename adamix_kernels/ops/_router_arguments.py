"""Checks of a linear router's arguments, which its ops share."""

from __future__ import annotations

import torch

from ._checks import check_device, check_tensor, fail

MOST_EXPERTS = 256


def check_router_weight(name: str, weight: torch.Tensor, x: torch.Tensor) -> None:
    """weight [M, H], in x's dtype or float32, on its device, fits x [..., H]."""
    check_tensor(name, weight)
    check_device(name, weight, x)
    if weight.dtype not in (x.dtype, torch.float32):
        fail(name, weight.dtype, " or ".join(dict.fromkeys((str(x.dtype), "torch.float32"))), TypeError)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not 1 <= weight.shape[0] <= MOST_EXPERTS:
        wanted = f"[M, H] with 1 <= M <= {MOST_EXPERTS} and H = {x.shape[-1]}"
        fail(name, f"shape {tuple(weight.shape)}", wanted)


def chosen_of(top_k: int | None, experts: int) -> int:
    """How many of the experts a row chooses, as the ops take it: 0 is all."""
    wrong = isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= experts
    if top_k is not None and wrong:
        fail("top_k", repr(top_k), f"None (all experts) or 1 <= top_k <= {experts}")
    return 0 if top_k is None or top_k == experts else top_k
