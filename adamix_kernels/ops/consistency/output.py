"""What the AdaMix losses return."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AdaMixLossOutput(NamedTuple):
    """loss = cross_entropy + weight * consistency; only loss carries gradients, the parts are for logs."""

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    consistency: torch.Tensor
