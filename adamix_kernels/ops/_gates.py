"""What the gated ops share.

A gate weighs one expert for one sample or token. Every row of x has slots, and each slot names one expert of each side:

    dense    both indices None, gates [B, M] or [B, S, M]: slot e is expert e; each bank holds 1 or M experts
    chosen   gates [B, K] or [B, S, K], of the shape of every index given; a side without an index is a bank of one

Whatever the slot, a bank of one gives its one expert. `mix` says what the gates weigh, with s_k for `scaling` times
scales[id of B in slot k] (of A where B is a bank of one and A is not):

    "outputs"   out = base + sum_k g_k s_k B_k (A_k x)
    "weights"   out = base + (sum_k g_k s_k B_k) (sum_k g_k A_k) x, where a bank of one is taken as it is, once and
                unweighted; where B is a bank of one and A is not, s_k goes with A_k. Two banks of one: as "outputs".
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._checks import INDEX_DTYPES, check_choice, check_device, check_index_values, check_tensor, fail, values_at_hand
from ._direct import traced

MIXES = ("outputs", "weights")


def check_mix(mix: str) -> None:
    check_choice("mix", mix, MIXES)


def slots_of(down: torch.Tensor, gates: torch.Tensor) -> int:
    """How many narrow products a row of x has on the first side, whose bank is `down`."""
    return 1 if down.shape[0] == 1 else gates.shape[-1]


class Side(NamedTuple):
    """One side of a call: its index and its bank, and what the caller knows them by."""

    name: str
    ids: torch.Tensor | None
    bank: str
    experts: int


def check_gates(gates: torch.Tensor, x: torch.Tensor, first: Side, second: Side) -> None:
    """The gates and both indices are of one form, dense or chosen, and fit x [B, S, .] and the banks."""
    if not isinstance(gates, torch.Tensor):
        fail("gates", type(gates).__name__, "a torch.Tensor or None", TypeError)
    if gates.dtype not in (torch.float32, x.dtype):
        fail("gates", gates.dtype, " or ".join(dict.fromkeys(("torch.float32", str(x.dtype)))), TypeError)
    check_device("gates", gates, x)
    given = [side for side in (first, second) if side.ids is not None]
    for side in given:
        _check_slots(side, x)
    if not given:
        experts = max(first.experts, second.experts)
        for side in (first, second):
            if side.experts not in (1, experts):
                other = first if side is second else second
                wanted = f"1 or {experts} experts, as {other.bank}: without an index, gates weigh all of both sides"
                fail(side.bank, f"a bank of {side.experts}", wanted)
        lead = tuple(x.shape[: gates.dim() - 1])
        if gates.dim() not in (2, 3) or tuple(gates.shape) != (*lead, experts):
            wanted = f"[B, M] or [B, S, M] with B, S = {tuple(x.shape[:2])} and M = {experts}, as no index is given"
            fail("gates", f"shape {tuple(gates.shape)}", wanted)
        return
    shape = tuple(given[0].ids.shape)  # type: ignore[union-attr]  # not None, as given
    for side in (first, second):
        if side.ids is None and side.experts != 1:
            wanted = f"an index {shape} like {given[0].name}, since its bank holds {side.experts} experts"
            fail(side.name, "None", wanted)
        if side.ids is not None and tuple(side.ids.shape) != shape:
            fail(side.name, f"shape {tuple(side.ids.shape)}", f"{shape}, the shape of {given[0].name}")
    if tuple(gates.shape) != shape:
        fail("gates", f"shape {tuple(gates.shape)}", f"{shape}, the shape of {given[0].name}, a gate for each slot")


def _check_slots(side: Side, x: torch.Tensor) -> None:
    index = side.ids
    if not isinstance(index, torch.Tensor):
        fail(side.name, type(index).__name__, "a torch.Tensor or None", TypeError)
    if index.dtype not in INDEX_DTYPES:
        fail(side.name, index.dtype, "int32 or int64", TypeError)
    check_device(side.name, index, x)
    if index.dim() not in (2, 3) or tuple(index.shape[:-1]) != tuple(x.shape[: index.dim() - 1]):
        wanted = f"[B, K] or [B, S, K] with B, S = {tuple(x.shape[:2])}: with gates the last axis counts K slots"
        fail(side.name, f"shape {tuple(index.shape)}", wanted)


def check_scales(scaling: torch.Tensor, x: torch.Tensor, experts: int) -> None:
    """A scaling for each expert is float32 [M], on x's device, and nothing learns it."""
    if scaling.dtype != torch.float32:
        fail("scaling", scaling.dtype, "torch.float32, or a Python number", TypeError)
    check_device("scaling", scaling, x)
    if tuple(scaling.shape) != (experts,):
        fail("scaling", f"shape {tuple(scaling.shape)}", f"[M] = ({experts},), one value for each expert")
    if scaling.requires_grad and torch.is_grad_enabled():
        fail("scaling", "a tensor that requires grad", "one that does not: what is learned belongs into gates")


def cast_gates(gates: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    """Under autocast to `dtype`, gates of 16 bits are cast, too; float32 ones stay."""
    if gates is None or dtype is None:
        return gates
    check_tensor("gates", gates)
    return gates if gates.dtype in (torch.float32, torch.float64) else gates.to(dtype)


def arranged(
    x: torch.Tensor, gates: torch.Tensor | None, first: Side, second: Side
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """(index of the first side, of the second, gates) as the ops want them, of arguments that were checked.

    Without gates every sample or token has one slot of weight 1. A bank of one has no index; where both are of one,
    what their slots weigh is summed.
    """
    given = [side for side in (first, second) if side.ids is not None]
    indices: list[torch.Tensor | None] = [first.ids, second.ids]
    if gates is None:
        lead = x.shape[: max((side.ids.dim() for side in given if side.ids is not None), default=1)]
        gates = x.new_ones(*lead, 1, dtype=torch.float32)
        for n, index in enumerate(indices):
            if index is not None:
                rows = index if index.dim() == len(lead) else index.unsqueeze(1).expand(lead)
                indices[n] = rows.unsqueeze(-1)
    for n, side in enumerate((first, second)):
        if side.experts == 1 and side.ids is not None:
            if not traced():
                check_index_values(side.name, side.ids, 1)
            indices[n] = None
    if given and all(index is None for index in indices):
        gates = gates.sum(-1, keepdim=True)
    return indices[0], indices[1], gates


def check_scale_values(scales: torch.Tensor | None) -> None:
    """Every scale is finite, looked at where indices are."""
    if scales is not None and values_at_hand(scales) and not torch.isfinite(scales).all():
        fail("scaling", scales.tolist(), "finite values, one for each expert")
