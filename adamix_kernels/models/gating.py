"""A model whose experts have gates: how they are built, told of a batch, and what the training takes from them."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..modules import AdaptedLayer, RoutedAdapter, RoutedLoRALinear
from ..routing import LEARNED, GateRouter, Router, gate_router
from ..routing.draws import runs_in_backward
from .config import AdaMixConfig
from .gate_config import by_path, experts_at
from .state import AdaMixState, adamix_state
from .targets import is_gathered, layer_number, tokens_first

TASK_IDS = "task_ids"
_DECODER = re.compile(r"(^|\.)decoder\.")
_GENERATES = ("ForCausalLM", "LMHeadModel")


def is_learned(model: nn.Module) -> bool:
    """Whether gates weigh the experts of an adapted model."""
    return adamix_state(model).config.routing == LEARNED


def layer_options(
    config: AdaMixConfig, path: str, features: int, depths: list[int], dtype: torch.dtype, device: torch.device | None
) -> dict[str, Any]:
    """What the patterns and the gates of `config` give to the layer at `path`: num_experts, r, alpha, gate, mix.

    features: K. depths: numbers of the adapted blocks. dtype, device: of the layer's banks.
    """
    width = config.bottleneck if config.method == "adapter" else config.r
    found: dict[str, Any] = {"num_experts": config.num_experts, "r": by_path(config.rank_pattern, path, width)}
    if config.method == "lora":
        found["alpha"] = by_path(config.alpha_pattern, path, config.alpha)
    if config.routing != LEARNED:
        return {**found, "gate": None, "mix": "outputs"}
    number = layer_number(path, config.layers_pattern)
    experts = found["num_experts"] = experts_at(config, path, number, depths)
    more: dict[str, Any] = {"num_tasks": config.num_tasks, "top_k": config.top_k, "dtype": dtype, "device": device}
    balance, z = config.balance_weight > 0, config.z_weight > 0
    gate = gate_router(config.router, features, experts, balance=balance, z=z, **more)
    return {**found, "gate": gate, "mix": config.mix}


def check_model_for_gates(model: nn.Module, config: AdaMixConfig, paths: list[str]) -> None:
    """Raises ValueError where the gates of a sentence would read what is not written yet."""
    if config.routing != LEARNED or config.router != "sentence":
        return
    name = type(model).__name__
    decoder = next((path for path in paths if _in_decoder(model, path)), None)
    if decoder is not None or any(part in name for part in _GENERATES):
        where = "a model that generates" if decoder is None else f"{decoder!r}, in a decoder"
        raise ValueError(
            f"router: got 'sentence' for {name} ({where}), expected 'linear', or layers of an encoder alone: a text's "
            "mean holds the tokens that are not written yet"
        )


def place(model: nn.Module, path: str, layer: AdaptedLayer | RoutedLoRALinear) -> None:
    """Tells a layer where it stands, and how its tokens lie there."""
    part = layer.adapter if isinstance(layer, AdaptedLayer) else layer
    part.place, part.decodes, part.gathered = path, _in_decoder(model, path), is_gathered(path)
    layer.tokens_first = tokens_first(model, path)


def _in_decoder(model: nn.Module, path: str) -> bool:
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(both) and _DECODER.search(path) is not None


def routed_layers(model: nn.Module) -> dict[str, RoutedAdapter | RoutedLoRALinear]:
    """path -> the routed part of each adapted layer; a LoRA that is merged into its weight has none."""
    found = {path: model.get_submodule(path) for path in adamix_state(model).paths}
    parts = {path: layer.adapter if isinstance(layer, AdaptedLayer) else layer for path, layer in found.items()}
    return {path: part for path, part in parts.items() if isinstance(part, (RoutedAdapter, RoutedLoRALinear))}


def gates_of_layers(model: nn.Module) -> dict[str, GateRouter]:
    """path -> the router of each layer that has one."""
    return {path: part.gate for path, part in routed_layers(model).items() if part.gate is not None}


class GateLosses(NamedTuple):
    """Means over the layers, unweighted; zero where there are none. total: balance_weight * balance + z_weight * z."""

    total: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor


def gate_losses(model: nn.Module) -> GateLosses:
    """What to add to the loss of a training step: balance_weight * balance + z_weight * z, of the last forward.

    AdaMixTrainer adds it by itself; a loop of your own does it once a forward, before backward.

    Args:
        model: returned by adapt() with routing="learned"; one without gates gives zeros.

    Raises:
        ValueError: `model` is not adapted.
        RuntimeError: the last forward ran under reentrant activation checkpointing, which keeps no gradient for it, or
            a backward runs this, where a forward leaves no losses.

    Source: see balance_loss and z_loss of adamix_kernels.routing.

    Example:
        >>> out = adapt(model, AdaMixConfig.mola(experts_pattern=None)).train()(**batch)
        >>> losses = gate_losses(model)
        >>> (out.logits.sum() + losses.total).backward()
        >>> losses.balance.item() > 1.5  # 2 where the chosen two serve alike
        True
    """
    config, router = adamix_state(model).config, adamix_state(model).router
    found: dict[str, list[torch.Tensor]] = {"balance": [], "z": []}
    gates = gates_of_layers(model)
    leaves = leaves_losses(config) and router.enabled and router.experts is None
    if leaves and runs_in_backward() and any(gate.training and (gate.balance or gate.z) for gate in gates.values()):
        raise RuntimeError(
            "model: got a forward that a backward runs (reentrant activation checkpointing, or a hook), expected one "
            "outside, or use_reentrant=False: the router would not learn its losses"
        )
    for path, gate in gates.items():
        for name, values in found.items():
            value: torch.Tensor | None = getattr(gate.last, name)
            setattr(gate.last, name, None)
            if value is None:
                continue
            if torch.is_grad_enabled() and not value.requires_grad and any(p.requires_grad for p in gate.parameters()):
                raise RuntimeError(
                    f"model: got a forward of {path!r} without gradients (reentrant activation checkpointing), "
                    "expected gradient_checkpointing_kwargs={'use_reentrant': False}: the router would not learn"
                )
            values.append(value)
    some = next(p for p in model.parameters())
    zero = torch.zeros((), device=some.device)
    means = {name: torch.stack([v.to(zero.device) for v in vs]).mean() if vs else zero for name, vs in found.items()}
    total = config.balance_weight * means["balance"] + config.z_weight * means["z"]
    return GateLosses(total, means["balance"], means["z"])


def leaves_losses(config: AdaMixConfig) -> bool:
    """Whether its routers have logits of a token, of which losses are; those of tasks and Arrow's have none."""
    return config.router not in ("task", "arrow")


def note_batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A hook before every forward of a model with gates: which of its tokens are padding."""
    router = adamix_state(model).router
    if len(args) > 1:  # model(ids, mask)
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        kwargs = {**dict(zip(names, args)), **kwargs}
    found = (kwargs.get("attention_mask"), kwargs.get("decoder_attention_mask"))
    mask, decoder_mask = (mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None for mask in found)
    router.attention_mask, router.decoder_mask = mask, decoder_mask
    router.note(masks=(mask, decoder_mask))


class NoteEncoder:
    """A hook before the encoder of an encoder-decoder, which generate() calls by itself: which tokens are padding."""

    def __init__(self, router: Router):
        self.router = router

    def __call__(self, _encoder: nn.Module, _args: object, kwargs: Mapping[str, Any]) -> None:
        router = self.router
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return
        if router.notes is not None and router.notes.here() is not None:  # the model's own forward, which was told
            return
        mask = kwargs.get("attention_mask")
        router.attention_mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        router.note(begins=False)


@contextlib.contextmanager
def use_tasks(model: nn.Module, tasks: torch.Tensor | list[int]) -> Iterator[nn.Module]:
    """Within the context the gates are those of these tasks, one a sample (router="task").

    Args:
        model: adapted with router="task". tasks: ids [B], 0 <= id < num_tasks; a batch of k * B rows takes each k times
            (passes in training, beams in evaluation).

    A backward that recomputes activations may run outside: it takes the tasks of the forward. One thread at a time: the
    model holds the ids.

    Raises:
        TypeError: tasks are no integers. ValueError: the model has no task router, or an id is not in its table.

    Source: Polytropon (arXiv 2202.13914).

    Example:
        >>> config = AdaMixConfig(routing="learned", router="task", num_tasks=3, mix="weights")
        >>> with use_tasks(adapt(model, config).eval(), [0, 2]):
        ...     model(**batch).logits.shape
        torch.Size([2, 2])
    """
    state = adamix_state(model)
    count = state.config.num_tasks
    if count is None:
        raise ValueError(
            "model: got one without a task router, expected AdaMixConfig(routing='learned', router='task')"
        )
    ids = torch.as_tensor(tasks)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"tasks: got {ids.dtype}, expected int32 or int64")
    if ids.dim() != 1 or not ids.numel() or not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(f"tasks: got {ids.tolist()!r}, expected ids [B] with 0 <= id < {count}")
    gate = next(iter(gates_of_layers(model).values()))
    previous, state.router.tasks = state.router.tasks, ids.to(gate.mean_gates.device, torch.int64)
    state.router.note()
    try:
        yield model
    finally:
        state.router.tasks = previous
        state.router.note(begins=False)


def usage(model: nn.Module) -> list[list[float]]:
    """[layers][experts]: the mean gate of each expert over the last training batches; empty before any.

    Layers of fewer experts are filled up with zeros.
    """
    gates = [gate for gate in gates_of_layers(model).values() if bool(gate.batches)]
    widest = max((gate.num_experts for gate in gates), default=0)
    rows: list[list[float]] = [gate.mean_gates.tolist() for gate in gates]
    return [row + [0.0] * (widest - len(row)) for row in rows]


def spread(model: nn.Module) -> dict[str, float]:
    """path -> 1 - |E g|^2 / E |g|^2: how much of the gates their mean does not say; 0 where they never vary.

    Raises ValueError where no training batch was seen.
    """
    found = {}
    for path, gate in gates_of_layers(model).items():
        if not bool(gate.batches):
            raise ValueError(
                f"model: got gates at {path!r} that saw no training batch, expected a trained model: the mean gates "
                "are those of the last 100 or so training batches"
            )
        square = float(gate.mean_square.double())
        found[path] = max(0.0, 1 - float(gate.mean_gates.double().square().sum()) / square) if square else 0.0
    return found


def check_mergeable(model: nn.Module, state: AdaMixState, gates: object) -> None:
    """Raises ValueError where merge(model, gates) would lie."""
    if gates is not None and gates != "mean":
        raise ValueError(f"gates: got {gates!r}, expected 'mean' or None")
    learned = state.config.routing == LEARNED
    if gates is not None and not learned:
        raise ValueError(f"gates: got {gates!r} for routing={state.config.routing!r}, expected None: it has no gates")
    if learned and gates is None:
        by = "task" if state.config.router == "task" else "token or sample"
        raise ValueError(
            f"model: got one whose gates differ by {by}, which no single expert computes, expected "
            "merge(model, gates='mean'), which takes the mean gates of the training and says what is lost"
        )
    if gates is not None:
        spread(model)


def check_one(model: nn.Module, what: str, or_else: str = "") -> None:
    """Raises ValueError where the experts are not one: their gates differ by token. what: the format without gates."""
    state = adamix_state(model)
    if state.config.routing == LEARNED and not state.merged:
        raise ValueError(
            f"model: got learned gates, which {what} has no place for, expected merge(model, gates='mean') first"
            f"{or_else}"
        )
