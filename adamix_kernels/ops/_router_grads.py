"""The gradient of a router's logits, in plain PyTorch."""

from __future__ import annotations

import torch


def logits_grad(
    grad_gates: torch.Tensor | None,
    grad_logits: torch.Tensor | None,
    gates: torch.Tensor,
    indices: torch.Tensor,
    experts: int,
) -> torch.Tensor:
    """[rows, M] through the gates, of the chosen or of all, and through the logits themselves; one of both is given."""
    d = grad_logits
    if grad_gates is not None:
        through = gates * (grad_gates - (gates * grad_gates).sum(-1, keepdim=True))
        if through.shape[-1] != experts:
            # The ids of a row differ.
            through = through.new_zeros(*through.shape[:-1], experts).scatter(-1, indices, through)
        d = through if d is None else d + through
    assert d is not None
    return d.reshape(-1, experts)
