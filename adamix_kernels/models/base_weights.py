"""A few values of the frozen base, by which weights of the same sizes are told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .quantised import FLOATS

_PARAMETERS, _VALUES = 6, 4
_COMPILED = "_orig_mod."  # before every name of a compiled model
# Twice what a value loses in bfloat16: a base may be read, trained and served in different dtypes.
_TOLERANCE = 2**-8


@torch.no_grad()
def sampled(model: nn.Module) -> dict[str, list[float]]:
    """name in the bare base -> values of some matrices that stay as they are: frozen, floating, in no head, and in no
    adapted layer but as its base.

    Empty where the model has none of these, as one sharded over processes.
    """
    state = getattr(model, "adamix", None)
    saved = () if state is None else tuple(f"{path}." for path in state.saved)
    frozen = [
        (name, parameter)
        for name, parameter in _named(model)
        if not parameter.requires_grad and not name.startswith(saved) and _is_matrix(parameter)
    ]
    step = max(1, -(-len(frozen) // _PARAMETERS))
    return {name: _values(parameter) for name, parameter in frozen[::step]}


@torch.no_grad()
def others(model: nn.Module, stored: Mapping[str, list[float]]) -> bool:
    """Whether most of the stored matrices have other values in `model`: one may be new in each process, as a pooler is
    that nobody reads. False where nothing can be compared."""
    here = dict(_named(model))
    compared = [(here[name], values) for name, values in stored.items() if name in here and _is_matrix(here[name])]
    different = sum(_differs(_values(parameter), values) for parameter, values in compared)
    return 2 * different > len(compared)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's parameters by its own names, without those that a LoRA was merged into."""
    state = getattr(model, "adamix", None)
    adapted = set() if state is None else set(state.paths)
    inside = tuple(f"{path}." for path in adapted)
    for name, parameter in model.named_parameters():
        name = name.removeprefix(_COMPILED)
        path, _, last = name.rpartition(".base.")
        if path in adapted:
            yield f"{path}.{last}", parameter
        elif not name.startswith(inside):
            yield name, parameter


def _is_matrix(tensor: torch.Tensor) -> bool:
    """Whether its values are those of the weights: quantised ones, and those that bitsandbytes packs into floats, are
    codes."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.dtype in FLOATS
    return plain and tensor.device.type != "meta" and tensor.dim() == 2 and tensor.numel() >= _VALUES


def _values(matrix: torch.Tensor) -> list[float]:
    """Spread over the rows, none of them the first, which may be a padding token's zeros."""
    places = [(2 * number + 1) * matrix.numel() // (2 * _VALUES) for number in range(_VALUES)]
    rows, columns = ([divmod(place, matrix.shape[1])[side] for place in places] for side in (0, 1))
    found: list[float] = matrix[rows, columns].float().tolist()
    return found


def _differs(here: list[float], stored: Any) -> bool:
    if len(stored) != len(here):
        return False
    bound = _TOLERANCE * max(map(abs, stored))
    return any(abs(a - b) > bound for a, b in zip(here, stored, strict=True))
