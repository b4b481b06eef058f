"""What one tile of a gated call holds: decided by shapes alone, values stay on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..._routed_plan import fits, power_of_2, same_ids


class Side(NamedTuple):
    """kind: "one" (a bank of one), "every" (dense gates), "chosen" (by index); padded: experts in the narrow tile."""

    index: torch.Tensor | None  # type: ignore[assignment]
    kind: str
    experts: int
    padded: int


class Plan(NamedTuple):
    """rows of x; slot k of row n has its gate and ids at (n // div) * slots + k; rp: columns of one expert; same: both
    sides' ids are one index.
    """

    rows: int
    div: int
    slots: int
    rp: int
    down: Side
    up: Side
    gates: torch.Tensor
    weights: bool
    same: bool

    @property
    def width(self) -> int:
        return self.rp * max(self.down.padded, self.up.padded)

    @property
    def biases(self) -> int:
        """Columns of what weighs every expert's bias up."""
        return max(16, power_of_2(self.up.experts))

    def constants(self, r: int) -> dict[str, Any]:
        """Of the kernels of row tiles."""
        down, up = self.down, self.up
        return dict(
            R=r, RP=self.rp, K=self.slots, MD=down.experts, MDP=down.padded, DOWN=down.kind,
            MU=up.experts, MUP=up.padded, UP=up.kind, GP=self.biases, WEIGHTS=self.weights,
        )  # fmt: skip


def make_plan(x, r, down_index, up_index, gates, md, mu, mix) -> Plan | None:
    """The plan of a call on x [B, S, .]; None where all experts' narrow columns do not fit in one tile."""
    batch, tokens, _ = x.shape
    dense = down_index is None and up_index is None
    kinds = ["one" if m == 1 else "every" if dense else "chosen" for m in (md, mu)]
    if any(kind != "one" and not fits(m, r) for kind, m in zip(kinds, (md, mu))):
        return None
    rp = power_of_2(r) if kinds != ["one", "one"] else max(16, power_of_2(r))
    down, up = (
        Side(None if index is None else index.contiguous(), kind, m, max(1 if m == 1 else power_of_2(m), 16 // rp))
        for index, kind, m in zip((down_index, up_index), kinds, (md, mu))
    )
    by_sample = gates.dim() == 2
    weights = mix == "weights" and kinds != ["one", "one"]
    same = kinds == ["chosen", "chosen"] and md == mu and same_ids(down_index, up_index)
    div, slots = tokens if by_sample else 1, gates.shape[-1]
    return Plan(batch * tokens, div, slots, rp, down, up, gates.contiguous(), weights, same)
