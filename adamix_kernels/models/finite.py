"""ADAMIX_CHECK=1: losses and gradients that are not finite stop the training, named."""

from __future__ import annotations

import torch
from torch import nn

from ..functional import AdaMixLossOutput
from .state import adamix_state


def check_loss(result: AdaMixLossOutput) -> None:
    """Raises FloatingPointError when the loss is not finite though every adapted layer's output was."""
    if result.loss.isfinite().all():
        return
    values = ", ".join(f"{name} = {value.item()}" for name, value in zip(result._fields, result, strict=True))
    raise FloatingPointError(
        f"loss: got {values}, expected finite numbers; every adapted layer gave finite ones, so it came behind them"
    )


@torch.no_grad()
def check_gradients(model: nn.Module) -> None:
    """Raises FloatingPointError, naming layer and expert, when a trained parameter's gradient is not finite."""
    layers = tuple(f"{path}." for path in adamix_state(model).paths)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None or gradient.isfinite().all():
            continue
        wrong = gradient[~gradient.isfinite()][0].item()
        which = ""
        if name.startswith(layers):
            experts = (~gradient.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            which = f" for expert {', '.join(map(str, experts))}"
        raise FloatingPointError(f"{name}: got a gradient with {wrong}{which}, expected finite numbers")
