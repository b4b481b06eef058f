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

import torch

from ._checks import fail, values_at_hand

MIXES = ("outputs", "weights")


def slots_of(down: torch.Tensor, gates: torch.Tensor) -> int:
    """How many narrow products a row of x has on the first side, whose bank is `down`."""
    return 1 if down.shape[0] == 1 else gates.shape[-1]


def check_scale_values(scales: torch.Tensor | None) -> None:
    """Every scale is finite, looked at where indices are."""
    if scales is not None and values_at_hand(scales) and not torch.isfinite(scales).all():
        fail("scaling", scales.tolist(), "finite values, one for each expert")
