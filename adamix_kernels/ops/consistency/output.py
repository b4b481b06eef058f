"""What the AdaMix losses return."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AdaMixLossOutput(NamedTuple):
    """loss = cross_entropy + weight * consistency; only loss carries gradients, the parts are for logs.

    Example:
        >>> out = adamix_loss(torch.randn(4, 3), torch.tensor([0, 2]), weight=0.5)
        >>> torch.equal(out.loss, out.cross_entropy + 0.5 * out.consistency)
        True
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    consistency: torch.Tensor
