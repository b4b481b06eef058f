"""Stacked banks inside, the reference project's one key per expert outside.

A module that calls translate_keys has `official_banks`, a mapping from its stacked parameters [M, ...] to the
pattern of their keys, and `official_ignored`, keys that are dropped in silence. No state is kept, so such a
module can be copied and pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn


def translate_keys(module: nn.Module) -> None:
    """Makes state_dict and load_state_dict of `module` speak in one key per expert."""
    module.register_state_dict_post_hook(_write_official_keys)
    module.register_load_state_dict_pre_hook(_read_official_keys)


def _banks(module: nn.Module) -> Mapping[str, str]:
    return cast("Mapping[str, str]", module.official_banks)


def _bank_keys(module: nn.Module, prefix: str) -> list[tuple[str, int, str]]:
    """(parameter name, expert, the reference project's key) for every expert, in that project's order."""
    banks = _banks(module)
    count = max(getattr(module, name).shape[0] for name in banks)
    return [
        (name, m, prefix + pattern.format(m=m))
        for m in range(count)
        for name, pattern in banks.items()
        if m < getattr(module, name).shape[0]
    ]


def _write_official_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _local_metadata: dict[str, Any]
) -> None:
    stacked = {name: state_dict.pop(prefix + name) for name in _banks(module)}
    for name, m, key in _bank_keys(module, prefix):
        state_dict[key] = stacked[name][m]


def _read_official_keys(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _local_metadata: dict[str, Any],
    _strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    errors: list[str],
) -> None:
    """Stacks the experts found; an absent or mis-shaped one keeps its values here and is reported by its key."""
    for key in cast("Sequence[str]", module.official_ignored):
        state_dict.pop(prefix + key, None)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in _banks(module)}
    for name in rows:
        if state_dict.pop(prefix + name, None) is not None:
            unexpected_keys.append(prefix + name)
    for name, m, key in _bank_keys(module, prefix):
        own = getattr(module, name).detach()[m]
        row = state_dict.pop(key, None)
        if row is None:
            missing_keys.append(key)
        elif row.shape != own.shape:
            errors.append(f"size mismatch for {key}: got {tuple(row.shape)}, expected {tuple(own.shape)}.")
            row = None
        rows[name].append(own if row is None else row)
    for name, parts in rows.items():
        reference = parts[0]
        state_dict[prefix + name] = torch.stack([part.to(reference.device, reference.dtype) for part in parts])
