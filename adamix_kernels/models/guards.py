"""Hooks that keep training mode honest: activation checkpointing and generate()."""

from __future__ import annotations

import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)


def install_guards(model: nn.Module) -> None:
    """Installs both guards on an adapted model; they travel with it through deepcopy and pickle."""
    model.adamix.checkpointable = checkpointable(model)
    model.register_forward_pre_hook(_before_forward)
    if callable(getattr(model, "generate", None)):
        model.generate = GuardedGenerate(model)


def _before_forward(model: nn.Module, _args) -> None:
    if not (model.training and torch.is_grad_enabled()):
        return
    if not any(part.gradient_checkpointing for part in model.adamix.checkpointable):
        return
    if model.adamix.router.experts is not None:
        raise RuntimeError(
            "use_experts: got a training forward under activation checkpointing, expected no checkpointing: the "
            "layers are recomputed in backward, outside the context, and would draw other experts"
        )
    # Reentrant checkpointing drops the gradients of a block none of whose inputs requires one, and the
    # embeddings are frozen.
    if not getattr(model, "_adamix_inputs_require_grad", False):
        embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        if embeddings is not None:
            embeddings.register_forward_hook(_require_grad)
            model._adamix_inputs_require_grad = True


def checkpointable(model: nn.Module) -> list[nn.Module]:
    """The parts of a Hugging Face model that recompute their activations where gradient_checkpointing is set."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def _require_grad(_module: nn.Module, _args, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and output.is_floating_point():
        output.requires_grad_(True)


class GuardedGenerate:
    """model.generate that never re-routes in silence: in training mode it warns and uses the merged experts."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args, **kwargs):
        model = self.model
        generate = type(model).generate
        router = model.adamix.router
        if not model.training or router.force_merged:
            return generate(model, *args, **kwargs)
        logger.warning(
            "generate() was called in training mode: dropout is active; the merged experts are used, "
            "because drawing experts anew at every step has no meaning. Call model.eval() first."
        )
        router.force_merged = True
        try:
            return generate(model, *args, **kwargs)
        finally:
            router.force_merged = False
