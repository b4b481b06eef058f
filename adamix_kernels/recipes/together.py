"""AdaMix whose experts begin as one: for the first steps expert 0 alone is trained, then all are copies of it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import TrainerCallback

from ..models.contexts import use_experts
from ..models.gating import routed_layers


class Together(TrainerCallback):
    """W_e = W_0 until `steps` updates are made, and the optimizer's moments of W_e those of W_0; from then on as drawn.

    Args:
        steps: updates of the first phase, at least 1. Both passes go through expert 0 there (R-Drop).

    The other experts' own first weights are lost. Not for a run that is resumed from a checkpoint.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self._one = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._one.enter_context(use_experts(kwargs["model"], 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps:
            self._one.close()
            _spread(kwargs["model"], kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._one.close()


@torch.no_grad()
def _spread(model: Any, optimizer: Any) -> None:
    moments = getattr(optimizer, "optimizer", optimizer).state
    for layer in routed_layers(model).values():
        for bank in layer.parameters(recurse=False):
            if bank.requires_grad and bank.shape[0] == layer.num_experts:
                bank.copy_(bank[:1].expand_as(bank))
                for value in moments.get(bank, {}).values():
                    if isinstance(value, torch.Tensor) and value.shape == bank.shape:
                        value.copy_(value[:1].expand_as(value))
