"""What adapt() leaves on a model: `model.adamix`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..routing import Router
from .config import AdaMixConfig
from .factors import Factors

if TYPE_CHECKING:
    from .centroid import Centroid
    from .watch import PassWatch


class Names(Protocol):
    """What use_experts asks of a pack."""

    def use(
        self, model: nn.Module, chosen: str | Sequence[str], threshold: float | str | None
    ) -> AbstractContextManager[None]: ...

    def set_centroid(self, name: str | None, centroid: Centroid) -> None: ...


@dataclass
class AdaMixState:
    """The adaptation of one model.

    Attributes:
        config: as given to adapt. router: shared by every layer.
        paths: dotted paths of the adapted layers, in model order.
        saved: dotted paths of the modules trained and saved whole (the task head).
        merged: whether merge() has been called; stash then holds what unmerge() puts back.
        factors: of each layer whose merged LoRA is in its weight.
        gate_spread: by layer, what the mean gates of merge(model, gates="mean") do not say.
        lost: why a merged model has no experts to go back to; empty where it has, or is not merged.
        origin: of a merged checkpoint that was loaded, the SHA-256 of its tensors; empty elsewhere.
        held: whose experts these are, where they are trained on and must stay; empty elsewhere.
        checkpointable: the parts of the model that can recompute their activations.
        watch: looks for the second pass of a training, until it is sure; None then.
        told_of_dropout: whether a warning of dropout under a large consistency weight has been considered.
        centroid: what the training texts look like to the frozen encoder; see store_centroid.
        pack: the names that a pack serves, and how they are chosen; None for a model of one adaptation.
        prefix_is_random: whether the layers below the first adapted one were seen to draw random numbers.
    """

    config: AdaMixConfig
    router: Router
    paths: list[str]
    saved: list[str]
    merged: bool = False
    stash: dict[str, Any] = field(default_factory=dict, repr=False)
    factors: dict[str, Factors] = field(default_factory=dict, repr=False)
    gate_spread: dict[str, float] = field(default_factory=dict, repr=False)
    lost: str = ""
    origin: str = ""
    held: str = ""
    checkpointable: list[nn.Module] = field(default_factory=list, repr=False)
    watch: PassWatch | None = field(default=None, repr=False)
    told_of_dropout: bool = field(default=False, repr=False)
    centroid: Centroid | None = field(default=None, repr=False)
    pack: Names | None = field(default=None, repr=False)
    prefix_is_random: bool = field(default=False, repr=False)


def adamix_state(model: nn.Module) -> AdaMixState:
    """model.adamix. Raises ValueError when `model` was not given to adapt()."""
    state = getattr(model, "adamix", None)
    if not isinstance(state, AdaMixState):
        raise ValueError(f"model: got a {type(model).__name__} without AdaMix, expected one returned by adapt()")
    return state


def device_of(model: nn.Module) -> torch.device:
    """The device of the first layer's banks."""
    layer = model.get_submodule(adamix_state(model).paths[0])
    return next(p.device for name, p in layer.named_parameters() if not name.startswith("base."))


def check_no_pack(model: nn.Module, asked: str) -> None:
    """Raises ValueError for a pack, whose names cannot be `asked` as one adaptation."""
    if adamix_state(model).pack is not None:
        raise ValueError(
            f"model: got a pack, expected one adaptation to {asked}: unpack(model, name, folder) writes a name's own "
            "checkpoint, which load_adamix reads, and save_pack(model, folder) writes them all"
        )


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Puts `new` where `path` points."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
