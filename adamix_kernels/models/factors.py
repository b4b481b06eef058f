"""The merged factors of a LoRA whose update is in the base's weight: small, kept for export and for packs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..modules import RoutedLoRALinear

NAMES = ("lora_a", "lora_b")
_FACTS = ("r", "alpha", "scaling", "use_rslora", "output_offsets", "dropout")
_SIZES = ("in_features", "out_features", "fan_in_fan_out")


@dataclass
class Factors:
    """W = base + scaling * B_g A_g on the columns of each group g: what one merged layer was merged from.

    Attributes:
        lora_a [G*r, K], lora_b [G*Ng, r]: in the dtype of the banks.
        r, alpha, scaling, use_rslora, output_offsets, dropout, in_features, out_features, fan_in_fan_out: as in
            RoutedLoRALinear, for which it stands in exports.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    r: int
    alpha: float
    scaling: float
    use_rslora: bool
    output_offsets: tuple[int, ...]
    dropout: float
    in_features: int
    out_features: int
    fan_in_fan_out: bool

    @classmethod
    @torch.no_grad()
    def of(cls, layer: RoutedLoRALinear, factors: tuple[torch.Tensor, torch.Tensor] | None = None) -> Factors:
        """factors: what layer.merged_factors() gives, if at hand."""
        lora_a, lora_b = layer.merged_factors() if factors is None else factors
        facts: dict[str, Any] = {name: getattr(layer, name, False) for name in (*_FACTS, *_SIZES)}
        return cls(lora_a.detach().clone(), lora_b.detach().clone(), **facts)

    @classmethod
    def read(cls, path: str, facts: Any, layer: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Factors:
        """From the JSON of to_json(), the layer's sizes and {"lora_a", "lora_b"}. Raises ValueError, naming `path`."""
        if not isinstance(facts, dict) or set(facts) != set(_FACTS):
            raise ValueError(f"{path}: got factors = {facts!r}, expected {', '.join(_FACTS)}")
        values: dict[str, Any] = {
            **facts,
            **{name: layer[name] for name in _SIZES},
            "output_offsets": tuple(facts["output_offsets"]),
        }
        found = cls(tensors["lora_a"], tensors["lora_b"], **values)
        rows = found.groups * found.r
        if found.lora_a.shape != (rows, found.in_features):
            shape, wanted = tuple(found.lora_a.shape), (rows, found.in_features)
            raise ValueError(f"{path}.lora_a: got shape {shape}, expected {wanted}")
        width = found.lora_b.shape[0] // found.groups
        fits = width > 0 and max(found.output_offsets) + width <= found.out_features
        if found.lora_b.dim() != 2 or found.lora_b.shape != (found.groups * width, found.r) or not fits:
            shape = tuple(found.lora_b.shape)
            raise ValueError(f"{path}.lora_b: got shape {shape}, expected {found.groups} slices of rank {found.r}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in _FACTS}, "output_offsets": list(self.output_offsets)}

    @property
    def groups(self) -> int:
        return len(self.output_offsets)

    def merged_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_a, self.lora_b
