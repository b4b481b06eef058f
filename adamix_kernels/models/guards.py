"""Hooks that keep training mode honest (a second pass, checkpointing, generate()), and resizing. Saving: saving.py."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..modules import AdaptedLayer, RoutedAdapter, RoutedLoRALinear
from ..modules.lora import linear_sizes
from ..routing import Router
from .doubling import BATCHED
from .gating import NoteEncoder, gates_of_layers, is_learned, note_batch
from .saving import Guarded, install_saving
from .state import adamix_state
from .watch import PassWatch

logger = logging.getLogger(__name__)


def install_guards(model: nn.Module) -> None:
    """Installs the guards on an adapted model; they travel with it through deepcopy and pickle."""
    state = adamix_state(model)
    state.checkpointable, state.watch = checkpointable(model), PassWatch()
    state.router.sides = _sides(model)
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, always_call=True)
    if is_learned(model):
        model.register_forward_pre_hook(note_batch, with_kwargs=True)
        owner: Any = model
        if hasattr(owner, "generate") and getattr(getattr(owner, "config", None), "is_encoder_decoder", False):
            owner.get_encoder().register_forward_pre_hook(NoteEncoder(state.router), with_kwargs=True)
    embeddings = _input_embeddings(model) if state.checkpointable else None
    if embeddings is not None:
        embeddings.register_forward_hook(RequireGrad(state.checkpointable))
    install_saving(model)
    if callable(getattr(model, "generate", None)):
        model.generate = GuardedGenerate(model)  # type: ignore[assignment]  # a method, in the place of the class's
    if callable(getattr(model, "resize_token_embeddings", None)):
        model.resize_token_embeddings = GuardedResize(model)  # type: ignore[assignment]


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
    """kwargs: the hook of a model that an earlier version pickled gives none."""
    owner: Any = model
    router: Router = owner.adamix.router
    experts = router.experts
    one_for_all = router.eval_level == "merged" if experts is None else experts.dim() == 0
    if model.training or not one_for_all:
        router.samples.begin(_batch(args, kwargs))
    if not (model.training and torch.is_grad_enabled()):
        return
    state = adamix_state(model)
    if not torch.compiler.is_compiling():
        state.router.begin_forward()
        if state.watch is not None:
            state.watch.forward(model, state)
    if state.router.experts is None:
        return
    wrapped = any(hasattr(module, "_checkpoint_wrapped_module") for module in model.modules())
    if wrapped or any(part.gradient_checkpointing for part in state.checkpointable):
        raise RuntimeError(
            "use_experts: got a training forward under activation checkpointing, expected no checkpointing: the "
            "layers are recomputed in backward, outside the context, and would draw other experts"
        )


def _after_forward(model: nn.Module, _args: object, _output: object) -> None:
    router = adamix_state(model).router
    router.samples.end()
    if not torch.compiler.is_compiling():
        router.end_forward()


def _batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The input [B, ...] of a forward that tells how many samples it has, None where nothing does."""
    for value in (*args[:1], *(kwargs.get(name) for name in BATCHED)):
        if isinstance(value, torch.Tensor) and value.dim():
            return value
    return None


def _sides(model: nn.Module) -> Mapping[int, int]:
    """How many banks of weights a forward draws experts for, by their number of experts."""
    parts = [part for part in model.modules() if isinstance(part, (RoutedAdapter, RoutedLoRALinear))]
    banks = [(p.down_weight, p.up_weight) if isinstance(p, RoutedAdapter) else (p.lora_a, p.lora_b) for p in parts]
    return Counter(bank.shape[0] for pair in banks for bank in pair)


def checkpointable(model: nn.Module) -> list[nn.Module]:
    """The parts of a Hugging Face model that recompute their activations where gradient_checkpointing is set."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    owner: Any = model
    try:
        found: nn.Module | None = owner.get_input_embeddings()
        return found
    except (AttributeError, NotImplementedError):  # no text model
        return None


class RequireGrad:
    """A forward hook on the embeddings, which are frozen: their output requires a gradient.

    Reentrant checkpointing drops the gradients of a block none of whose inputs requires one. The other kind does
    not, and is left alone: torch.compile cannot trace requires_grad_().
    """

    def __init__(self, parts: list[nn.Module]):
        self.parts = parts

    def __call__(self, module: nn.Module, _args: object, output: torch.Tensor) -> None:
        if not torch.is_grad_enabled() or not output.is_floating_point():
            return
        if any(part.training and part.gradient_checkpointing and is_reentrant(part) for part in self.parts):
            output.requires_grad_(True)


def is_reentrant(part: nn.Module) -> bool:
    """Whether a part's activation checkpointing is of the reentrant kind, or may be."""
    function = getattr(part, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant") is not False


class GuardedResize(Guarded):
    """model.resize_token_embeddings, which banks on the output layer do not follow."""

    def __call__(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        model: Any = self.model
        output = model.get_output_embeddings()
        if isinstance(output, (AdaptedLayer, RoutedLoRALinear)):
            here = linear_sizes(output.base)[1]
            wanted = new_num_tokens or here
            if pad_to_multiple_of:
                wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
            if wanted != here:
                path = next(path for path in adamix_state(model).paths if model.get_submodule(path) is output)
                raise ValueError(
                    f"new_num_tokens: got {wanted} for a model whose {path} is adapted by experts of {here} columns, "
                    "expected resize_token_embeddings() of the bare model, before adapt()"
                )
        return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


class GuardedGenerate(Guarded):
    """model.generate that never re-routes in silence: in training mode it warns and uses the merged experts.

    Learned gates weigh as in evaluation: no noise, each sample's task for its beams, no running means.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        kind: Any = type(model)
        generate = kind.generate
        router = adamix_state(model).router
        if not model.training or router.force_merged:
            return generate(model, *args, **kwargs)
        learned = is_learned(model)
        used = "the gates weigh as in evaluation" if learned else "the merged experts are used"
        logger.warning(
            "generate() was called in training mode: dropout is active; %s, because drawing anew at every step has no "
            "meaning. Call model.eval() first.",
            used,
        )
        gates = [gate for gate in gates_of_layers(model).values() if gate.training]
        router.force_merged = True
        try:
            for gate in gates:
                gate.eval()
            return generate(model, *args, **kwargs)
        finally:
            router.force_merged = False
            for gate in gates:
                gate.train()
