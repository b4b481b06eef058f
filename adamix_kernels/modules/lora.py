"""A frozen linear layer with a routed LoRA update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._backends import check_request
from ..functional import merge_lora, routed_lora
from ..ops._checks import autocast_dtype, check_flag, check_positive
from ..ops._gates import check_mix
from ..ops._node import NODE
from ..ops.merge.api import LoraLayer
from ..ops.routed_lora.api import routed_by_pass
from ..routing import GateRouter, Router
from ._banks import (
    bank_sizes,
    cast_like,
    check_finite,
    check_fraction,
    check_input,
    check_router,
    lora_scaling,
    merge_score,
    merged_bank,
)
from ._finite import check_output, checking
from ._gated import check_gate, gates_of, mean_factors, refreshed
from ._layout import as_rows, like_rows, refuse_gathered, turned
from ._linear import QKV as QKV
from ._linear import OnBase, group_width, qkv_offsets
from ._linear import linear_sizes as linear_sizes
from ._linear import may_overwrite as may_overwrite
from ._mixture import mixed, rides


class RoutedLoRALinear(OnBase):
    """out = base(x) + s (drop(x) A_g[i]^T) B_g[j]^T on the columns of each group g, s = alpha / r or alpha / sqrt(r).

    Args:
        base: any callable layer [..., K] -> [..., N] (a quantised one too); it is called as it is. The update is
            added in place to what nn.Linear and Conv1D return, where no hook is given it.
        in_features: K. out_features: N. r: rank of each group. alpha: numerator of the scaling.
        num_experts: M. share: the side with one bank for all: "up" (B), "down" (A) or None.
        dropout: probability on x, one mask for all groups. groups: slices of the output that are adapted.
        output_offsets: first column of each slice. group_features: Ng, the columns of a slice; by default
            the last slice reaches to the end.
        fan_in_fan_out: base.weight is [K, N] (Hugging Face's Conv1D).
        use_rslora: s = alpha / sqrt(r), as PEFT's.
        router, gate, mix, backend: as for RoutedAdapter.

    Parameters: lora_a [Ma, groups * r, K], one Kaiming-uniform draw copied to every expert (with a gate, one draw
    each); lora_b [Mb, groups * Ng, r], zero; a_score [Ma], b_score [Mb], frozen zeros, as in RoutedAdapter.

    Raises:
        TypeError, ValueError: an argument, or at the call x, does not fit; the message names it.

    Source: AdaMix section 3, equation (LoRA); `AdamixMergedLinear` of the reference project.

    Example:
        >>> layer = RoutedLoRALinear.from_linear(torch.nn.Linear(8, 6), r=2, alpha=4, num_experts=4)
        >>> layer(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 6])
    """

    place: str | None = None  # its path in the model, for messages; set by adapt()
    decodes = False  # whether it stands in the decoder of an encoder-decoder; set by adapt()
    tokens_first = gathered = False  # how its tokens lie; set by adapt()

    def __init__(
        self,
        base: nn.Module,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float,
        num_experts: int,
        share: str | None = "up",
        dropout: float = 0.0,
        groups: int = 1,
        output_offsets: Sequence[int] = (0,),
        fan_in_fan_out: bool = False,
        *,
        group_features: int | None = None,
        use_rslora: bool = False,
        router: Router | None = None,
        gate: GateRouter | None = None,
        mix: str = "outputs",
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features, r=r, num_experts=num_experts, groups=groups)
        if not callable(base):
            raise TypeError(f"base: got {type(base).__name__}, expected a layer, or anything callable")
        check_finite("alpha", alpha)
        check_fraction("dropout", dropout)
        check_flag("fan_in_fan_out", fan_in_fan_out)
        check_flag("use_rslora", use_rslora)
        check_request(backend)
        width = group_width(groups, output_offsets, group_features, out_features)
        down, up = bank_sizes(num_experts, share)
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.scaling = lora_scaling(alpha, r, use_rslora)
        self.num_experts, self.share, self.dropout = num_experts, share, dropout
        self.groups, self.output_offsets = groups, tuple(output_offsets)
        self.fan_in_fan_out, self.backend = fan_in_fan_out, backend
        self.router, self.mix = check_router(router), mix
        check_mix(mix)
        self.gate = check_gate(gate, num_experts, backend)
        self.lora_a = nn.Parameter(torch.empty(down, groups * r, in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(up, groups * width, r, dtype=dtype, device=device))
        self.a_score = merge_score(down, device)
        self.b_score = merge_score(up, device)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        r: int,
        alpha: float,
        num_experts: int,
        share: str | None = "up",
        dropout: float = 0.0,
        groups: int = 1,
        targets: Sequence[str] | None = None,
        output_offsets: Sequence[int] = (0,),
        **options: Any,
    ) -> RoutedLoRALinear:
        """Wraps an nn.Linear, a Conv1D of transformers, or any layer with in_features and out_features.

        targets: which of "q", "k", "v" to adapt in a layer that computes all three side by side; it stands
            for groups and output_offsets. The layer's parameters are frozen.

        Raises ValueError: the layer's sizes cannot be read, or targets do not fit it.
        """
        in_features, out_features, transposed = linear_sizes(layer)
        if targets is not None:
            output_offsets = qkv_offsets(targets, out_features)
            groups = len(output_offsets)
            options["group_features"] = out_features // len(QKV)
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor):
            options.setdefault("device", weight.device)
            if weight.is_floating_point():
                options.setdefault("dtype", torch.promote_types(weight.dtype, torch.float32))
        layer.requires_grad_(False)
        return cls(
            layer, in_features, out_features, r, alpha, num_experts, share, dropout, groups, output_offsets,
            transposed, **options,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """One draw for all experts of A; B zero, so that the layer starts as its base."""
        nn.init.kaiming_uniform_(self.lora_a[0], a=math.sqrt(5))
        if self.gate is None:
            self.lora_a.data[1:] = self.lora_a.data[0]
        else:
            for expert in self.lora_a[1:]:
                nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(self, x: torch.Tensor, _turned: bool = False) -> torch.Tensor:
        """x [B, S, K] (or [N, K]) -> [B, S, N] (or [N, N'])."""
        if self.tokens_first and not _turned and self.router.enabled:
            return turned(self.forward(turned(x), True))
        node = None if torch.compiler.is_compiling() else NODE.module
        if node is None:
            check_input(x, self.in_features)
            base: torch.Tensor = self.base(x)
        else:
            # A frozen linear layer and its update as one call and one node; what that layer gave, if no more was done.
            whole: Any = node.lora_on_linear(self, x)
            made: torch.Tensor | None = None
            if whole.__class__ is tuple:
                (base,) = whole
            elif whole is not None:
                made = whole
            else:
                check_input(x, self.in_features)
                # Not self.base: nn.Module finds its modules last, after all else.
                layer = self._modules.get("base")
                base = self.base(x) if layer is None else layer(x)
                made = node.lora_layer(self, x, base)
            if made is not None:
                return made
        if not self.router.enabled:
            return base
        rows = as_rows(self, x)
        added = like_rows(rows, base)
        if rows.dtype != added.dtype and autocast_dtype(x.device.type) is None:
            rows = rows.to(added.dtype)
        looking = checking()
        if self.gate is not None and self.router.uses_gates(self.training):
            out = self._gated(x, rows, added, looking)
            return out if out.shape == base.shape else out.view(base.shape)
        router, training = self.router, self.training
        a_index = b_index = None
        passes = 0
        merged = router.uses_merged(training, self.a_score.requires_grad or self.b_score.requires_grad)
        if merged:
            lora_a = merged_bank(self.lora_a, self.a_score, self.backend)
            lora_b = merged_bank(self.lora_b, self.b_score, self.backend)
        else:
            lora_a, lora_b = self.lora_a, self.lora_b
            sides = lora_a.shape[0], lora_b.shape[0]
            if self.gathered and sides != (1, 1):
                refuse_gathered(self)
            passes, a_index, b_index = router.draw_sides(sides, rows, training, self.gate is not None)
        lora_a, lora_b = cast_like(rows, lora_a, lora_b)
        options = self.scaling, self.groups, self.output_offsets, self.dropout if self.training else 0.0, None
        over = not looking and may_overwrite(self.base, rows, added)
        tensors = rows, lora_a, lora_b, a_index, b_index
        out = routed_by_pass(*tensors, passes, added, *options, over, self.backend, True)
        if looking:
            result = like_rows(rows, out.view(base.shape))
            check_output(self, result, like_rows(rows, x), like_rows(rows, base), {"a": a_index, "b": b_index}, merged)
        return out if out.shape == base.shape else out.view(base.shape)

    def _gated(self, x: torch.Tensor, rows: torch.Tensor, added: torch.Tensor, looking: bool) -> torch.Tensor:
        refreshed(self)
        lora_a, lora_b = cast_like(rows, self.lora_a, self.lora_b)
        options: dict[str, Any] = dict(
            base=added, scaling=self.scaling, groups=self.groups, output_offsets=self.output_offsets,
            dropout_p=self.dropout if self.training else 0.0, backend=self.backend,
            inplace=not looking and may_overwrite(self.base, rows, added),
        )  # fmt: skip
        out = mixed(self, rows, lora_a, lora_b, **options)
        if out is None:
            gates, index = gates_of(self, x, rows)
            indices = (index if bank.shape[0] > 1 else None for bank in (lora_a, lora_b))
            out = routed_lora(rows, lora_a, lora_b, *indices, gates=gates, mix=self.mix, **options)
        if looking:
            check_output(self, out, rows, added, {}, False, True)
        return out

    @property
    def rides(self) -> bool:
        """Whether its router's logits may be made in the LoRA's tile: a linear router, gates on outputs."""
        return rides(self)

    def merged_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [groups * r, K], B [groups * Ng, r]): each side averaged by itself, never the product.

        With a gate, those of the mean gates (of rank M * r where both sides have M experts).
        """
        if self.gate is not None:
            return mean_factors(self)
        lora_a = merged_bank(self.lora_a, self.a_score, self.backend)
        lora_b = merged_bank(self.lora_b, self.b_score, self.backend)
        return lora_a[0], lora_b[0]

    def merged_weight(self, factors: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """The base weight with the merged update in it, in the base's dtype and layout.

        factors: what merged_factors() gives, if at hand.

        Raises ValueError when the base has no floating weight (a quantised layer) to add it to.
        """
        return merge_lora(**self.with_weight(factors)._asdict(), backend=self.backend)

    def with_weight(self, factors: tuple[torch.Tensor, torch.Tensor] | None) -> LoraLayer:
        """What merge_lora takes for this layer."""
        weight = getattr(self.base, "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise ValueError(
                f"base: got {type(self.base).__name__}, expected a layer with a floating weight to merge into"
            )
        lora_a, lora_b = self.merged_factors() if factors is None else factors
        options = self.scaling, self.groups, self.output_offsets, self.fan_in_fan_out
        return LoraLayer(weight, lora_a, lora_b, *options)

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, alpha={self.alpha}, use_rslora={self.use_rslora}, num_experts={self.num_experts}, "
            f"share={self.share!r}, dropout={self.dropout}, groups={self.groups}, output_offsets={self.output_offsets}"
            + ("" if self.gate is None else f", mix={self.mix!r}")
        )
