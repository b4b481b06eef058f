"""The routed bottleneck adapter as a module, and the layer that carries one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._backends import check_request
from ..functional import routed_adapter
from ..ops._adapter_arguments import ACTIVATIONS
from ..ops._checks import check_choice, check_positive
from ..ops._gates import check_mix
from ..ops._node import NODE, keep_adapter
from ..ops.routed_adapter.api import routed_by_pass
from ..routing import GateRouter, Router
from ._banks import (
    bank_sizes,
    cast_like,
    check_input,
    check_router,
    merge_score,
    merged_bank,
    merged_banks,
)
from ._finite import check_output, checking
from ._gated import check_gate, gates_of, mean_banks
from ._layout import as_rows, like_rows, refuse_gathered, turned
from ._linear import OnBase

INIT_STD = 0.02


class RoutedAdapter(nn.Module):
    """out = residual + act(x Wd[i]^T + bd[i]) Wu[j]^T + bu[j]; i, j drawn in training, merged in evaluation.

    Args:
        hidden_size: H. bottleneck: r. num_experts: M.
        share: the side with one bank for all experts: "up" (as the paper's scripts), "down" or None.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or None.
        router: draws the experts; by default one of its own, batch level with two passes.
        gate: a router of gates (adamix_kernels.routing), by which all experts, or the K it chooses, serve in training
            and in evaluation: out = residual + sum_k g_k (act(x Wd[k]^T + bd[k]) Wu[k]^T + bu[k]); None: none.
        mix: what the gates weigh, the experts' "outputs" or their "weights"; see routed_adapter.
        backend: see routed_adapter. dtype, device: of the parameters.

    Parameters: down_weight [Md, r, H], down_bias [Md, r], up_weight [Mu, H, r], up_bias [Mu, H]; weights
    N(0, 0.02), every expert its own draw, biases zero. down_score [Md] and up_score [Mu] are frozen zeros
    (uniform merging); while one of them requires grad, training computes with the merged experts and so
    learns the merging.

    Raises:
        TypeError, ValueError: an argument, or at the call x, is not one of the above; the message names it.

    Source: AdaMix section 3; `ExpertSoup` of the reference project.

    Example:
        >>> adapter = RoutedAdapter(8, 2, num_experts=4)
        >>> adapter(torch.randn(2, 5, 8)).shape, adapter.down_weight.shape, adapter.up_weight.shape
        (torch.Size([2, 5, 8]), torch.Size([4, 2, 8]), torch.Size([1, 8, 2]))
    """

    place: str | None = None  # its path in the model, for messages; set by adapt()
    decodes = False  # whether it stands in the decoder of an encoder-decoder; set by adapt()
    gathered = False  # whether it is given tokens of all samples, mixed; set by adapt()

    def __init__(
        self,
        hidden_size: int,
        bottleneck: int,
        num_experts: int,
        share: str | None = "up",
        activation: str | None = "gelu",
        *,
        router: Router | None = None,
        gate: GateRouter | None = None,
        mix: str = "outputs",
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        check_positive(hidden_size=hidden_size, bottleneck=bottleneck, num_experts=num_experts)
        down, up = bank_sizes(num_experts, share)
        check_choice("activation", activation, ACTIVATIONS)
        check_request(backend)
        self.hidden_size, self.bottleneck, self.num_experts = hidden_size, bottleneck, num_experts
        self.share, self.activation, self.backend = share, activation, backend
        self.router, self.mix = check_router(router), mix
        check_mix(mix)
        self.gate = check_gate(gate, num_experts, backend)
        self.down_weight = nn.Parameter(torch.empty(down, bottleneck, hidden_size, dtype=dtype, device=device))
        self.down_bias = nn.Parameter(torch.empty(down, bottleneck, dtype=dtype, device=device))
        self.up_weight = nn.Parameter(torch.empty(up, hidden_size, bottleneck, dtype=dtype, device=device))
        self.up_bias = nn.Parameter(torch.empty(up, hidden_size, dtype=dtype, device=device))
        self.down_score = merge_score(down, device)
        self.up_score = merge_score(up, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.down_weight, self.up_weight):
            nn.init.normal_(weight, std=INIT_STD)
        for bias in (self.down_bias, self.up_bias):
            nn.init.zeros_(bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, S, H] (or [N, H]); residual of x's shape, x itself when None. Returns x's shape."""
        node = NODE.module
        if node is not None and not torch.compiler.is_compiling():
            made: torch.Tensor | None = node.adapter_layer(self, x, residual)
            if made is not None:
                return made
        check_input(x, self.hidden_size)
        if not self.router.enabled:
            return x if residual is None else residual
        rows = as_rows(self, x)
        added = rows if residual is None else like_rows(rows, residual)
        if self.gate is not None and self.router.uses_gates(self.training):
            return self._gated(x, rows, added)
        down_index = up_index = None
        merged = self.router.uses_merged(self.training, self.down_score.requires_grad or self.up_score.requires_grad)
        passes = 0
        if merged:
            down_weight, down_bias, up_weight, up_bias = self.merged_banks()
        else:
            down_weight, down_bias, up_weight, up_bias = self.banks()
            sides, paired = (down_weight.shape[0], up_weight.shape[0]), self.gate is not None
            if self.gathered and sides != (1, 1):
                refuse_gathered(self)
            passes, down_index, up_index = self.router.draw_sides(sides, rows, self.training, paired)
        down_weight, down_bias, up_weight, up_bias = cast_like(rows, down_weight, down_bias, up_weight, up_bias)
        out = routed_by_pass(
            rows, down_weight, down_bias, up_weight, up_bias, down_index, up_index, passes, added, self.activation,
            self.backend,
        )  # fmt: skip
        if checking():
            other = None if residual is None else added
            check_output(self, out, rows, other, {"down": down_index, "up": up_index}, merged)
        return out if x.dim() == 3 else out.view(x.shape)

    def _gated(self, x: torch.Tensor, rows: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        gates, index = gates_of(self, x, rows)
        down_weight, down_bias, up_weight, up_bias = cast_like(rows, *self.banks())
        indices = (index if bank.shape[0] > 1 else None for bank in (down_weight, up_weight))
        out = routed_adapter(
            rows, down_weight, down_bias, up_weight, up_bias, *indices, residual=added, activation=self.activation,
            gates=gates, mix=self.mix, backend=self.backend,
        )  # fmt: skip
        if checking():
            check_output(self, out, rows, None if added is rows else added, {}, False, True)
        return out if x.dim() == 3 else out.view(x.shape)

    def merged_banks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(down_weight, down_bias, up_weight, up_bias), each a bank of one; each side averaged by itself.

        With a gate, those of the mean gates (of width M * r where both sides have M experts, or the down side alone).
        """
        if self.gate is not None:
            down_weight, down_bias, up_weight, up_bias = (bank[None] for bank in mean_banks(self))
            return down_weight, down_bias, up_weight, up_bias
        pairs = zip(self.banks(), self.bank_scores(), strict=True)
        down_weight, down_bias, up_weight, up_bias = (merged_bank(bank, score, self.backend) for bank, score in pairs)
        return down_weight, down_bias, up_weight, up_bias

    def merged(self) -> RoutedAdapter:
        """A plain adapter (one expert) that computes what this one does in evaluation."""
        return merge_adapters([self])[0]

    def banks(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]:
        return self.down_weight, self.down_bias, self.up_weight, self.up_bias

    def bank_scores(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]:
        """The merge scores of each of `banks()`."""
        return self.down_score, self.down_score, self.up_score, self.up_score

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, bottleneck={self.bottleneck}, num_experts={self.num_experts}, "
            f"share={self.share!r}, activation={self.activation!r}"
            + ("" if self.gate is None else f", mix={self.mix!r}")
        )


keep_adapter(RoutedAdapter)


@torch.no_grad()
def merge_adapters(adapters: Sequence[RoutedAdapter]) -> list[RoutedAdapter]:
    """[adapter.merged() for each], the banks of all of one backend merged together (one launch on a GPU).

    A merged bank requires a gradient where the experts' does."""
    gated = {n: adapter.merged_banks() for n, adapter in enumerate(adapters) if adapter.gate is not None}
    plain = [
        RoutedAdapter(
            adapter.hidden_size,
            gated[n][0].shape[1] if n in gated else adapter.bottleneck,
            1,
            None,
            adapter.activation,
            router=adapter.router,
            backend=adapter.backend,
            dtype=adapter.down_weight.dtype,
            device=adapter.down_weight.device,
        ).train(adapter.training)
        for n, adapter in enumerate(adapters)
    ]
    for n, values in gated.items():
        for target, value in zip(plain[n].banks(), values, strict=True):
            target.copy_(value)
    for backend in sorted({adapter.backend for adapter in adapters}):
        pairs = [
            (mine, full)
            for mine, full in zip(plain, adapters, strict=True)
            if full.backend == backend and full.gate is None
        ]
        banks = [bank for _, full in pairs for bank in full.banks()]
        scores = [score for _, full in pairs for score in full.bank_scores()]
        targets = [bank for mine, _ in pairs for bank in mine.banks()]
        for target, value in zip(targets, merged_banks(banks, scores, backend), strict=True):
            target.copy_(value)
    for mine, full in zip(plain, adapters, strict=True):
        mine.place = full.place
        for target, bank in zip(mine.banks(), full.banks(), strict=True):
            target.requires_grad_(bank.requires_grad)
    return plain


class AdaptedLayer(OnBase):
    """out = adapter(base(x)): a frozen layer with a routed adapter behind it.

    base: any module that returns one tensor [..., H]; its weight and bias stay reachable here, because
    model code looks at them (T5 reads wo.weight.dtype).

    Example:
        >>> layer = adapt(model).get_submodule("bert.encoder.layer.0.output.dense")
        >>> isinstance(layer, AdaptedLayer)
        True
    """

    tokens_first = False  # whether it is given [S, B, H]; set by adapt()

    def __init__(self, base: nn.Module, adapter: RoutedAdapter):
        super().__init__()
        self.base = base
        self.adapter = adapter

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.tokens_first and self.adapter.router.enabled:
            return turned(self.adapter(turned(self.base(*args, **kwargs))))
        node = NODE.module
        if node is not None and len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            # A frozen linear layer and its adapter as one call and one node; what that layer gave, if no more was done.
            whole: Any = node.adapter_on_linear(self, *args)
            if whole is not None:
                made: torch.Tensor = self.adapter(*whole) if whole.__class__ is tuple else whole
                return made
        out: torch.Tensor = self.adapter(self.base(*args, **kwargs))
        return out
