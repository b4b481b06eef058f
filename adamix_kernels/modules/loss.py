"""AdaMixLoss: the training loss of a doubled batch as a module."""

from __future__ import annotations

import torch
from torch import nn

from ..functional import AdaMixLossOutput, adamix_loss


class AdaMixLoss(nn.Module):
    """loss = CE(first pass, labels) + weight * 1/2 [KL(b||a) + KL(a||b)]; see `functional.adamix_loss`.

    Args:
        weight: of the consistency, >= 0 (the reference project: 1 for understanding, 100 for GPT-2).
        ignore_index: a row with this label has no cross-entropy.
        label_smoothing: in [0, 1], of the cross-entropy only.
        detach_target: each KL takes its target as a constant.
        backend: "auto", "reference", "triton" or "cuda".
        inplace: the gradient may overwrite the logits, as in `adamix_loss`.

    Raises what `adamix_loss` raises, at the first call.

    Example:
        >>> loss = AdaMixLoss(weight=0.5)
        >>> loss(torch.randn(4, 3), torch.tensor([0, 2]))._fields
        ('loss', 'cross_entropy', 'consistency')
    """

    def __init__(
        self,
        weight: float = 1.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        detach_target: bool = True,
        backend: str = "auto",
        inplace: bool = False,
    ):
        super().__init__()
        self.weight = weight
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.detach_target = detach_target
        self.backend = backend
        self.inplace = inplace

    def forward(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
        num_items: int | torch.Tensor | None = None,
        expected_grad: float | None = None,
    ) -> AdaMixLossOutput:
        """logits [2B, ..., V] (pass 1, then pass 2), labels and mask [B, ...] -> (loss, cross_entropy, consistency).

        expected_grad: the gradient that will come in to the loss, such as the loss scale / accumulation steps.
        """
        return adamix_loss(
            logits,
            labels,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            mask=mask,
            num_items=num_items,
            detach_target=self.detach_target,
            inplace=self.inplace,
            expected_grad=expected_grad,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"detach_target={self.detach_target}, inplace={self.inplace}, backend={self.backend!r}"
        )
