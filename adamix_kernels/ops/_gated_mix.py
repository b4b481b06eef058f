"""The narrow middle of a gated op in plain PyTorch: from every slot's first product to what the second one takes.

    z = t, or sum_k down_k t_k where gates weigh the first side         [B, S, slots or 1, R]
    h = up_k act(z_k), or act(z) where they do not weigh the second     [B, S, slots or 1, R]

and h's sum over the slots where the second bank holds one expert. All of it in float32, or float64 for float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._activations import activate, activate_backward
from ._routed_matmul import at_least_float32


@dataclass(frozen=True)
class Mix:
    """What the gates weigh in one call.

    down, up: [B, 1 or S, slots], what the first and the second side are weighed with, None for a side taken as it is.
    by_down, by_up: their derivatives by the gates. one_up: whether the second bank holds one expert.
    """

    down: torch.Tensor | None
    up: torch.Tensor | None
    by_down: torch.Tensor | float
    by_up: torch.Tensor | float
    one_up: bool

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        experts: tuple[int, int],
        indices: tuple[torch.Tensor | None, torch.Tensor | None],
        gates: torch.Tensor,
        scales: torch.Tensor | None,
        scaling: float,
        mix: str,
    ) -> Mix:
        """experts, indices: of the first and the second side."""
        first, second = experts
        dtype = at_least_float32(x.new_empty(0)).dtype
        index = indices[0] if second == 1 else indices[1]
        factor: torch.Tensor | float = scaling
        if scales is not None:
            own = scales if index is None else scales.index_select(0, index.flatten()).view(index.shape)
            factor = _rows(own.to(dtype), x) * scaling
        gate = _rows(gates.to(dtype), x)
        weights = mix == "weights" and experts != (1, 1)
        if not weights:
            return cls(None, gate * factor, 0.0, factor, second == 1)
        if second == 1:
            return cls(gate * factor, None, factor, 0.0, True)
        return cls(None if first == 1 else gate, gate * factor, 1.0, factor, False)

    def forward(self, t: torch.Tensor, activation: str, constant: bool = False) -> torch.Tensor:
        """h of t [B, S, slots, R] in t's dtype. constant: with a column more, of what weighs a bias."""
        h = self._hidden(self._mean(t), activation, constant)
        h = h if self.up is None else h * self.up.unsqueeze(-1)
        return (h.sum(2, keepdim=True) if self.one_up and h.shape[2] != 1 else h).to(t.dtype)

    def backward(
        self, dh: torch.Tensor, t: torch.Tensor, activation: str, constant: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(dt in t's dtype, d gates [B, S, slots] in the dtype of sums) from dh, as h's slots and columns."""
        z, dh = self._mean(t), at_least_float32(dh)
        dgates = dh.new_zeros(())
        if self.up is not None:
            dgates = (dh * self._hidden(z, activation, constant)).sum(-1) * self.by_up
            dh = dh * self.up.unsqueeze(-1)
        dh = dh[..., : t.shape[3]]
        dh = dh.sum(2, keepdim=True) if z.shape[2] == 1 and dh.shape[2] != 1 else dh
        dt = activate_backward(dh, z, activation)
        if self.down is not None:
            dgates = dgates + (dt * at_least_float32(t)).sum(-1) * self.by_down
            dt = dt * self.down.unsqueeze(-1)
        return dt.to(t.dtype), dgates

    def _mean(self, t: torch.Tensor) -> torch.Tensor:
        z = at_least_float32(t)
        return z if self.down is None else (z * self.down.unsqueeze(-1)).sum(2, keepdim=True)

    @staticmethod
    def _hidden(z: torch.Tensor, activation: str, constant: bool) -> torch.Tensor:
        h = activate(z, activation)
        return torch.cat((h, h.new_ones(*h.shape[:3], 1)), 3) if constant else h


def gates_grad(dgates: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """[B, S, slots] as the gates' gradient: summed over the tokens of gates by sample, in the gates' dtype."""
    return (dgates.sum(1) if gates.dim() == 2 else dgates).to(gates.dtype).contiguous()


def _rows(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A value for each slot [M], [B, slots] or [B, S, slots] as [1 or B, 1 or S, slots]."""
    return value.view(1, 1, -1) if value.dim() == 1 else value.unsqueeze(1) if value.dim() == 2 else value
