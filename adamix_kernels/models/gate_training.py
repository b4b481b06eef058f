"""What learned gates need of a trainer: their losses in the loss, task ids, and checkpointing that keeps gradients."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from .gating import TASK_IDS, gate_losses, gates_of_layers, is_learned, leaves_losses, use_tasks
from .guards import checkpointable, is_reentrant
from .state import adamix_state

NAMES = ("balance_loss", "z_loss")
# Renamed in transformers 5.23.
OPTIONS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


def added_losses(model: nn.Module) -> tuple[str, ...]:
    """Names, in the logs, of what the gates add to the loss."""
    config = adamix_state(model).config
    if not (is_learned(model) and leaves_losses(config)):
        return ()
    return tuple(n for n, weight in zip(NAMES, (config.balance_weight, config.z_weight), strict=True) if weight > 0)


def with_gates(model: nn.Module, loss: torch.Tensor, steps: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(loss + the gates' losses / steps, those of added_losses() / steps). steps: forwards of an update."""
    names = added_losses(model)
    if not names:
        return loss, []
    found = gate_losses(model)
    values = dict(zip(NAMES, (found.balance, found.z), strict=True))
    return loss + (found.total / steps).to(loss.device), [values[name].detach() / steps for name in names]


def weighs_by_task(model: nn.Module) -> bool:
    """Whether a forward needs task ids; a merged model, or a bare one, does not."""
    return (
        hasattr(model, "adamix") and adamix_state(model).config.num_tasks is not None and bool(gates_of_layers(model))
    )


def tasks_of(model: nn.Module, inputs: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Takes task_ids out of a batch, for a table of tasks: the context in which the forward is to run."""
    state = getattr(model, "adamix", None)
    if state is None or state.config.num_tasks is None:
        return contextlib.nullcontext()
    ids = inputs.pop(TASK_IDS, None)
    if not weighs_by_task(model):  # merged
        return contextlib.nullcontext()
    if ids is None and adamix_state(model).router.tasks is None:
        raise ValueError(f"inputs: got {sorted(inputs)}, expected {TASK_IDS!r} [B] among them, for router='task'")
    return contextlib.nullcontext() if ids is None else use_tasks(model, ids)


def keep_gradients(model: nn.Module, args: Any) -> None:
    """Sets the kind of activation checkpointing that keeps the gates' gradients, or raises ValueError."""
    if not added_losses(model):
        return
    name = next((n for n in OPTIONS if hasattr(args, n)), OPTIONS[-1])
    options = getattr(args, name, None) or {}
    if options.get("use_reentrant"):
        raise ValueError(
            f"args.{name}: got use_reentrant=True, expected False: reentrant checkpointing keeps no gradient of the "
            "gates' losses, and the router would not learn them"
        )
    if getattr(args, "gradient_checkpointing", False):
        setattr(args, name, {**options, "use_reentrant": False})
        return
    if any(part.gradient_checkpointing and is_reentrant(part) for part in checkpointable(model)):
        raise ValueError(
            "model: got reentrant activation checkpointing, expected gradient_checkpointing_enable("
            "gradient_checkpointing_kwargs={'use_reentrant': False}): the router would not learn its losses"
        )
