"""Parameters that stand in two places of a model, as an output layer's weight in the input embedding."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_COMPILED = "_orig_mod."  # before every name of a compiled model


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """id -> names of each parameter that the model has in two places at least."""
    names: dict[int, list[str]] = {}
    for name, parameter in _places(model, "", set()):
        names.setdefault(id(parameter), []).append(name.removeprefix(_COMPILED))
    return {key: found for key, found in names.items() if len(found) > 1}


def tied_outside(model: nn.Module, path: str) -> list[str]:
    """The names outside the module at `path` of parameters that it holds, in model order."""
    shared = shared_parameters(model)
    inside: dict[int, int] = {}
    for _, parameter in _places(model.get_submodule(path), "", set()):
        inside[id(parameter)] = inside.get(id(parameter), 0) + 1
    tied = [names for key, names in shared.items() if 0 < inside.get(key, 0) < len(names)]
    return [name for names in tied for name in names if not name.startswith(f"{path}.")]


def _places(module: nn.Module, prefix: str, walked: set[int]) -> Iterator[tuple[str, nn.Parameter]]:
    """As named_parameters, with each place that a parameter or the module that holds it is put in."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    if id(module) in walked:  # its parts stand in one place, however many ways lead to it
        return
    walked.add(id(module))
    for name, child in module._modules.items():
        if child is not None:
            yield from _places(child, f"{prefix}{name}.", walked)
