"""Names by content: the nearest centroid of a text, and Arrow's prototypes of a LoRA."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models.centroid import Centroid, encode
from ..models.state import adamix_state
from ..modules import RoutedLoRALinear
from ..modules._layout import as_rows, turned
from ..routing import leading_directions
from . import slots
from .sources import LoraPart

if TYPE_CHECKING:
    from .state import Pack

AUTO = "auto"
_SHOWN = 5


@dataclass(frozen=True)
class Nearest:
    """names: one a sample, None where it is refused. similarity: cosine of the sample with the nearest centroid.
    nearest: its name, also where it is refused."""

    names: list[str | None]
    similarity: list[float]
    nearest: list[str]

    @staticmethod
    def best_of(found: Sequence[Nearest]) -> Nearest:
        """Of the same samples, each of which was held against some of the names: for a sample the nearest of all."""
        best = [max(those, key=lambda one: one[1]) for those in zip(*(one._samples() for one in found), strict=True)]
        return Nearest([one[0] for one in best], [one[1] for one in best], [one[2] for one in best])

    def _samples(self) -> list[tuple[str | None, float, str]]:
        return list(zip(self.names, self.similarity, self.nearest, strict=True))


def nearest(
    model: nn.Module,
    *,
    threshold: float | str | None = None,
    names: Collection[str] | None = None,
    **inputs: torch.Tensor | None,
) -> Nearest:
    """Whose training texts each sample is most like: argmax_n cos(v, c_n).

    v is the mean of the frozen encoder's last hidden states over the sample, c_n the centroid stored with name n (see
    store_centroid). Costs one forward of the encoder without its adaptations.

    Args:
        model: a pack. inputs: as the model takes them: input_ids [B, S], attention_mask [B, S].
        threshold: the least cosine; below it a sample has no name. "auto": the name's own, which 1% of its training
            texts stay below. None: no sample is refused.
        names: those to choose from; None: all. A centroid is of texts as its training cut them: where names were
            trained on texts of other lengths, ask once a length.

    Example:
        >>> found = nearest(model, **batch)  # doctest: +SKIP
        >>> with use_experts(model, found.names):  # doctest: +SKIP
        ...     logits = model(**batch).logits

    Raises ValueError: `model` is no pack; a name has no centroid, or `names` are none of the pack's; threshold is no
        number from -1 to 1 and not "auto"; the encoder gives no state per token.
    """
    from .state import pack_of

    state = pack_of(model)
    with state.lock:
        return find(model, state, {n: v for n, v in inputs.items() if v is not None}, threshold, names)


@torch.no_grad()
def find(
    model: nn.Module,
    pack: Pack,
    inputs: Mapping[str, Any],
    threshold: float | str | None,
    names: Collection[str] | None = None,
) -> Nearest:
    check_threshold(threshold)
    known = _centroids(pack)
    if names is not None:
        if not names or not set(names) <= set(known):
            raise ValueError(f"names: got {list(names)}, expected some of {', '.join(known)}, or None")
        known = {name: centroid for name, centroid in known.items() if name in names}
    training, enabled = model.training, pack.router.enabled
    model.eval()
    pack.router.enabled = False
    try:
        vectors = encode(model, inputs)
    finally:
        model.train(training)
        pack.router.enabled = enabled
    matrix = torch.stack([centroid.mean for centroid in known.values()]).to(vectors.device)
    if matrix.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"model: got vectors of {vectors.shape[1]} numbers, expected {matrix.shape[1]} as the centroids"
        )
    best, number = (vectors @ matrix.T).max(1)
    called, lowest = list(known), [centroid.low for centroid in known.values()]
    similarity: list[float] = best.tolist()
    chosen: list[int] = number.tolist()
    least = [lowest[n] if threshold == AUTO else -2.0 if threshold is None else float(threshold) for n in chosen]
    closest = [called[n] for n in chosen]
    kept = [name if s >= bound else None for name, s, bound in zip(closest, similarity, least, strict=True)]
    return Nearest(kept, similarity, closest)


def check_threshold(threshold: object) -> None:
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool) and -1 <= threshold <= 1
    if threshold is not None and threshold != AUTO and not number:
        raise ValueError(f"threshold: got {threshold!r}, expected a cosine from -1 to 1, {AUTO!r} or None")


def choose_nearest(model: nn.Module, pack: Pack, threshold: float | str | None) -> Any:
    """A hook before every forward of `model` that sets its names by its inputs. Returns the hook's handle."""
    check_threshold(threshold)
    _centroids(pack)
    pack.router.experts, pack.last = None, None
    busy = False

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal busy
        if busy or _goes_on(kwargs):
            return
        inputs = {**({"input_ids": args[0]} if args else {}), **kwargs}
        busy = True
        try:
            found = find(model, pack, {n: v for n, v in inputs.items() if v is not None}, threshold)
        finally:
            busy = False
        refused = [n for n, name in enumerate(found.names) if name is None]
        if refused:
            told = ", ".join(f"{n} ({found.nearest[n]} {found.similarity[n]:.3f})" for n in refused[:_SHOWN])
            raise ValueError(
                f"use_experts: got samples below the threshold {threshold!r}: {told}, expected texts of a known name; "
                "nearest(model, ...) tells which are, without an error"
            )
        pack.last = found
        pack.router.experts = pack.at(pack.slots(found.nearest), _device(args, kwargs))

    return model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)


def _goes_on(kwargs: Mapping[str, Any]) -> bool:
    """Whether this is a later token of generate(), which keeps the names of the first."""
    caches = [value for value in kwargs.values() if hasattr(value, "get_seq_length")]  # past_key_values, or cache
    return any(int(cache.get_seq_length()) > 0 for cache in caches)


def _device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    return next(value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


def _centroids(pack: Pack) -> dict[str, Centroid]:
    """Of every name. Raises ValueError for one without."""
    found = {name: entry.centroid for name, entry in pack.entries.items()}
    absent = [name for name, centroid in found.items() if centroid is None]
    if absent or not found:
        raise ValueError(
            f"use_experts: got {absent[0] if absent else 'an empty pack'!r} without a centroid of its training texts, "
            "expected one of every name: adamix train stores it, and store_centroid(model, batches, name=...) does"
        )
    return {name: centroid for name, centroid in found.items() if centroid is not None}


def choose_by_arrow(model: nn.Module, pack: Pack) -> list[Any]:
    """A hook before every layer that sends each token to the LoRA with the largest |x . v_e|. Returns the handles.

    Raises ValueError for adapters, which have no such direction, and for heads, which need one name a sample.
    """
    owner = adamix_state(model)
    layers = {path: model.get_submodule(path) for path in owner.paths}
    other = next((path for path, layer in layers.items() if not isinstance(layer, RoutedLoRALinear)), None)
    if other is not None or owner.saved:
        raise ValueError(
            f"index: got 'arrow' for a pack with {'adapters' if other else 'heads'} ({other or owner.saved[0]}), "
            "expected one of LoRA alone, without heads: 'nearest', or names"
        )
    hooks = []
    for path, layer in layers.items():
        vectors, known = prototypes(layer, pack, path)
        assert isinstance(layer, RoutedLoRALinear)
        hooks.append(layer.register_forward_pre_hook(_Arrow(pack, layer, vectors, known)))
    return hooks


class _Arrow:
    def __init__(self, pack: Pack, layer: RoutedLoRALinear, vectors: torch.Tensor, known: torch.Tensor):
        self.pack, self.layer, self.vectors, self.known = pack, layer, vectors, known

    @torch.no_grad()
    def __call__(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows = as_rows(self.layer, turned(args[0]) if self.layer.tokens_first else args[0])
        likeness = (rows.to(self.vectors.dtype) @ self.vectors.T).abs().masked_fill(~self.known, -1)  # [B, S, M]
        self.pack.router.experts = likeness.argmax(-1)


@torch.no_grad()
def prototypes(layer: Any, pack: Pack, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(v [M, K], known [M]): v_e the leading right singular vector of B_e A_e, for slots with a LoRA in the layer."""
    vectors = layer.lora_a.new_zeros(pack.capacity, layer.in_features)
    known = torch.zeros(pack.capacity, dtype=torch.bool, device=vectors.device)
    for entry in pack.entries.values():
        if path not in entry.ranks:
            continue
        part = slots.read(layer, entry.slot, entry.ranks[path])
        assert isinstance(part, LoraPart)
        part = part.whole()
        vectors[entry.slot] = leading_directions(part.lora_a[None], part.lora_b[None])[0]
        known[entry.slot] = True
    return vectors, known
