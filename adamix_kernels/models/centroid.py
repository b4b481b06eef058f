"""What the texts of a training look like to the frozen encoder: one vector, by which a pack finds a text's name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .contexts import disable
from .pooling import mean_pool
from .state import adamix_state, check_model

_LOW = 0.01  # of the training texts are less like the centroid than `low`
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "position_ids")


@dataclass
class Centroid:
    """The direction of the mean sentence vector of a training's texts.

    Attributes:
        mean [H]: sum_i v_i / |sum_i v_i| over the texts, v_i = h_i / |h_i|, h_i the mean of the frozen encoder's last
            hidden states; float32 on the CPU.
        texts: how many there were. low: the cosine with `mean` that 1% of them stay below.
    """

    mean: torch.Tensor
    texts: int
    low: float

    @classmethod
    def of(cls, vectors: torch.Tensor) -> Centroid:
        """vectors: [texts, H] of sentence_vectors. Raises ValueError where they have no direction."""
        total = vectors.double().sum(0)
        length = total.norm().item()
        if not vectors.shape[0] or not math.isfinite(length) or length == 0:
            raise ValueError(f"batches: got {vectors.shape[0]} texts of no common direction, expected some texts")
        mean = (total / length).float()
        return cls(mean, vectors.shape[0], (vectors @ mean).quantile(_LOW).item())

    def to_json(self) -> dict[str, Any]:
        return {"mean": [float(f"{value:.9g}") for value in self.mean.tolist()], "texts": self.texts, "low": self.low}

    @classmethod
    def read(cls, where: object, values: Any) -> Centroid | None:
        """What to_json() gave, or None for None. Raises ValueError, naming `where`."""
        if values is None:
            return None
        try:
            found = cls(torch.tensor(values["mean"], dtype=torch.float32), int(values["texts"]), float(values["low"]))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{where}: got a centroid that is none ({error})") from error
        if found.mean.dim() != 1 or not found.mean.isfinite().all():
            raise ValueError(f"{where}: got a centroid of shape {tuple(found.mean.shape)}, expected finite numbers [H]")
        return found


@torch.no_grad()
def encode(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """h / |h| of each text, h the mean of the last hidden states: [B, H], float32, on the model's device.

    The adaptation must be switched off by the caller. inputs: of the model; what the encoder does not read is left out.

    Raises ValueError for a model without one state per token.
    """
    owner: Any = model
    config = getattr(model, "config", None)
    base: Any = owner.get_encoder() if getattr(config, "is_encoder_decoder", False) else owner.base_model
    states = getattr(base(**{n: v for n, v in inputs.items() if n in _INPUTS}), "last_hidden_state", None)
    source = inputs.get("input_ids")
    if states is None or states.dim() != 3 or (source is not None and states.shape[1] != source.shape[1]):
        raise ValueError(f"model: got a {type(model).__name__}, expected one whose encoder gives a state per token")
    mask = inputs.get("attention_mask")
    mean = mean_pool(states, None if mask is None else mask).float()
    unit: torch.Tensor = mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit


@torch.no_grad()
def sentence_vectors(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """encode() of every batch by the frozen encoder, in evaluation mode: [texts, H], float32 on the CPU.

    Args:
        model: bare, or returned by adapt(), unmerged or with its experts kept. batches: of a DataLoader or a collator.
    """
    device = next(model.parameters()).device
    training, found = model.training, []
    model.eval()
    try:
        with contextlib.nullcontext() if getattr(model, "adamix", None) is None else disable(model):
            for batch in batches:
                tensors = {name: v.to(device) for name, v in batch.items() if isinstance(v, torch.Tensor)}
                found.append(encode(model, tensors).cpu())
    finally:
        model.train(training)
    return torch.cat(found) if found else torch.empty(0, 1)


def store_centroid(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, name: str | None = None) -> nn.Module:
    """Stores what the training texts look like to the frozen encoder, for use_experts(pack, "nearest").

    c = sum_i v_i / |sum_i v_i|, v_i the unit vector along the mean of the frozen encoder's last hidden states of text
    i. save_adamix writes it. `adamix train` does this by itself. Costs one forward of the encoder a text; some hundred
    texts are enough.

    Args:
        model: returned by adapt() or load_adamix(), with its experts (a merged model must be able to unmerge).
        batches: dicts of tensors as the model takes them ("input_ids", "attention_mask"); labels are not looked at.
        name: of a pack, whose texts these are; None for a model of one adaptation.

    Returns `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: it is not adapted, or `name` is none of a pack's; it is merged for good; it has no state per token;
            or there is no text.

    Example:
        >>> folder = save_adamix(store_centroid(adapt(model), [batch]), "leases_2")  # [batch, ...]: the training texts
    """
    check_model(model)
    state = adamix_state(model)
    if state.pack is None and name is not None:
        raise ValueError(f"name: got {name!r} for a model of one adaptation, expected None")
    found = Centroid.of(sentence_vectors(model, batches))
    if state.pack is None:
        state.centroid = found
    else:
        state.pack.set_centroid(name, found)
    return model
