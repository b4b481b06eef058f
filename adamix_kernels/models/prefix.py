"""What both passes have in common, computed once: the layers below the first adapted one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .doubling import double_batch, find_batch_size
from .guards import is_reentrant
from .state import AdaMixState, adamix_state


def both_passes(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """model(**double_batch(inputs)), but what both passes have in common runs on one copy of the batch.

    Up to the first layer that has experts both passes compute the same, where nothing there is random. These layers see
    the B rows once, and their output is doubled. Whether they may is AdaMixConfig's shared_prefix: "auto" asks whether
    they draw random numbers (dropout), in which case nothing is shared.

    Args:
        model: returned by adapt(), in training mode; with two passes (consistency_weight > 0).
        inputs: of the model, [B, ...], not doubled, without labels. use_cache=False for a model that has it.

    Returns the model's outputs for [2B, ...]: pass 1, then pass 2. hidden_states of the shared layers, where they are
    asked for, are the last one's.

    Raises ValueError: `model` is not adapted, or `inputs` holds no tensor with a first dimension.

    Source: AdaMix section 3.2, whose passes differ in their experts alone.

    Example:
        >>> _ = adapt(model, AdaMixConfig(layers_to_transform=[1])).train()
        >>> both_passes(model, batch).logits.shape  # layer 0 saw two rows, layer 1 four
        torch.Size([4, 2])
    """
    adamix_state(model)
    with shared_prefix(model, inputs):
        return model(**double_batch(dict(inputs)))


@contextlib.contextmanager
def shared_prefix(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[bool]:
    """A forward of the doubled `inputs` within the context does not compute the shared layers. Yields whether so."""
    state = adamix_state(model)
    lists = first_blocks(model, state) if _may_share(model, state) else {}
    found = _run(model, inputs, state, lists) if any(lists.values()) else None
    if found is None:
        yield False
        return
    blocks, output = found
    doubled = double_batch(output, find_batch_size(inputs))
    for block in blocks:
        block.__dict__["_before_sharing"] = block.__dict__.get("forward")
        block.forward = lambda *args, **kwargs: doubled
    try:
        yield True
    finally:
        for block in blocks:
            forward = block.__dict__.pop("_before_sharing")
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.forward = forward


def first_blocks(model: nn.Module, state: AdaMixState) -> dict[nn.ModuleList, int]:
    """Of every list of layers that has adapted ones: the number of the first; {} where one stands in no list."""
    first: dict[nn.ModuleList, int] = {}
    for path in state.paths:
        parent: Any = model
        for part in path.split("."):
            if isinstance(parent, nn.ModuleList):
                first[parent] = min(first.get(parent, len(parent)), int(part))
                break
            parent = getattr(parent, part)
        else:
            return {}
    return first


def _may_share(model: nn.Module, state: AdaMixState) -> bool:
    if state.config.shared_prefix is False or state.merged or not model.training or state.router.passes != 2:
        return False
    if state.prefix_is_random and state.config.shared_prefix == "auto":
        return False
    # A block gives [S, B, H] there, whose first axis is not doubled.
    if any(getattr(model.get_submodule(path), "tokens_first", False) for path in state.paths):
        return False
    # Recomputed in the backward, outside the context, a shared layer would be given its own output.
    if any(part.gradient_checkpointing and is_reentrant(part) for part in state.checkpointable):
        return False
    return not (torch.compiler.is_compiling() or state.router.experts is not None)


class _Reached(Exception):
    """The first adapted layer is about to run."""


def _run(
    model: nn.Module, inputs: Mapping[str, Any], state: AdaMixState, lists: dict[nn.ModuleList, int]
) -> tuple[list[nn.Module], Any] | None:
    """(layers below the first adapted one, what the last of them gave for B rows), or None: they draw at random, or
    there are none below it, as in a decoder that reads an adapted encoder."""
    outputs: dict[nn.ModuleList, Any] = {}
    reached: list[nn.ModuleList] = []

    def keep(blocks: nn.ModuleList) -> Any:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[blocks] = output

        return after

    def stop(blocks: nn.ModuleList) -> Any:
        def before(_module: nn.Module, _args: Any) -> None:
            reached.append(blocks)
            raise _Reached

        return before

    hooks = [blocks[number - 1].register_forward_hook(keep(blocks)) for blocks, number in lists.items() if number]
    hooks += [blocks[number].register_forward_pre_hook(stop(blocks)) for blocks, number in lists.items()]
    watch, state.watch = state.watch, None
    before = _random_states(inputs)
    try:
        with contextlib.suppress(_Reached):
            model(**inputs)
    finally:
        state.watch = watch
        for hook in hooks:
            hook.remove()
    random = any(not torch.equal(a, b) for a, b in zip(before, _random_states(inputs)))
    if random and state.config.shared_prefix == "auto":
        state.prefix_is_random = True
        _restore(inputs, before)
        return None
    if not reached or reached[0] not in outputs:
        _restore(inputs, before)
        return None
    blocks = reached[0]
    return list(blocks[: lists[blocks]]), outputs[blocks]


def _devices(inputs: Mapping[str, Any]) -> list[torch.device]:
    found = {t.device for t in inputs.values() if isinstance(t, torch.Tensor) and t.device.type == "cuda"}
    return sorted(found, key=str)


def _random_states(inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices(inputs))]


def _restore(inputs: Mapping[str, Any], states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, rng in zip(_devices(inputs), states[1:]):
        torch.cuda.set_rng_state(rng, device)
