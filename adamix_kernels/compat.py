"""The layers of the reference project (microsoft/AdaMix): same constructors and state-dict keys, stacked banks inside.

A bank is one Parameter `[M, ...]`; state_dict and load_state_dict translate it to the reference project's
one key per expert, so its checkpoints load strictly and ours load there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ._official_keys import translate_keys
from .functional import merge_experts, routed_adapter, routed_lora
from .modules._banks import check_finite, check_fraction
from .ops._checks import check_choice, check_positive
from .routing import Router

_ACTIVATIONS = {
    None: None,
    "linear": None,
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_MERGED = 3
_EVAL_LEVELS = {0: "token", 1: "sample", _MERGED: "merged"}


def _check_flag(name: str, value: object) -> bool:
    if value not in (0, 1):
        raise ValueError(f"{name}: got {value!r}, expected 0 or 1")
    return bool(value)


def _drawn_expert(bank: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """[M, ...] and an index [1] -> [1, ...], chosen on the device."""
    return bank if index is None else bank.index_select(0, index)


class _ExpertBank(nn.Module):
    """weight [M, out, in] and bias [M, out], named `{m}.weight` and `{m}.bias` outside; M equal copies of one draw."""

    official_banks = {"weight": "{m}.weight", "bias": "{m}.bias"}  # noqa: RUF012
    official_ignored = ()

    def __init__(self, in_features: int, out_features: int, num_experts: int):
        super().__init__()
        one = nn.Linear(in_features, out_features)
        self.weight = nn.Parameter(one.weight.detach().repeat(num_experts, 1, 1))
        self.bias = nn.Parameter(one.bias.detach().repeat(num_experts, 1))
        translate_keys(self)

    def __len__(self) -> int:
        return self.weight.shape[0]


class MixtureSoup(nn.Module):
    """One side of an ExpertSoup: a bank of linear experts and the scores of their mean.

    State-dict keys: `expert_score_weight` [M], `deepspeed_experts.{m}.weight` [out, in], `.bias` [out].
    """

    def __init__(self, in_features: int, out_features: int, num_local_experts: int = 1, inference_level: int = _MERGED):
        super().__init__()
        self.num_local_experts = num_local_experts
        self.deepspeed_experts = _ExpertBank(in_features, out_features, num_local_experts)
        self.expert_score_weight = nn.Parameter(torch.zeros(num_local_experts), requires_grad=False)
        self.router = Router("batch", passes=1)
        self.router.eval_level = _EVAL_LEVELS[inference_level]

    def route(
        self, batch: int, tokens: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The (weight, bias, index) of this forward; index None when they hold a single expert."""
        weight, bias = self.deepspeed_experts.weight, self.deepspeed_experts.bias
        scores = self.expert_score_weight
        if len(self.deepspeed_experts) == 1:
            return weight, bias, None
        if self.router.uses_merged(self.training, scores.requires_grad):
            return merge_experts(weight, scores).unsqueeze(0), merge_experts(bias, scores).unsqueeze(0), None
        index = self.router.draw(
            len(self.deepspeed_experts), 1 if self.training else batch, tokens, device, self.training
        )
        if self.training:
            return _drawn_expert(weight, index), _drawn_expert(bias, index), None
        return weight, bias, index


class ExpertSoup(nn.Module):
    """out = residual + act(x Wd[i]^T + bd[i]) Wu[j]^T + bu[j], the reference project's layer.

    It stands in BERT and RoBERTa; for GPT-2 see NLGExpertSoup.

    Training draws i and j uniformly, once a forward, on x's device; a side whose `expert_score_weight`
    requires grad uses its softmax-weighted mean instead. The mean is computed when it is used, never kept.

    Args:
        dim: H, features of x. r: features of the bottleneck.
        act: "gelu" (erf), "gelu_new" / "gelu_pytorch_tanh" / "gelu_tanh", "relu", "silu" / "swish",
            "linear" or None.
        num_expert: M, experts of a side that is not shared.
        inference_level: of evaluation: 3 merged, 0 a random expert per token, 1 per sentence.
        sharing_down, sharing_up: 1 for a side of one expert.

    State-dict keys: `MoA_A.` (down) and `MoA_B.` (up) followed by `expert_score_weight` [M],
    `deepspeed_experts.{m}.weight`, `deepspeed_experts.{m}.bias`.

    Raises:
        ValueError: an unknown act or inference_level (2 and 4 return None in the released code), a
            size below 1; from forward, shapes that do not fit.

    Source: `ExpertSoup` of src/transformers/models/expert_soup.py in microsoft/AdaMix.
    """

    def __init__(
        self,
        dim: int,
        r: int,
        act: str | None = None,
        num_expert: int = 4,
        inference_level: int = 0,
        sharing_down: int = 0,
        sharing_up: int = 0,
    ):
        super().__init__()
        check_positive(dim=dim, r=r, num_expert=num_expert)
        check_choice("act", act, tuple(_ACTIVATIONS))
        if inference_level not in _EVAL_LEVELS:
            raise ValueError(
                f"inference_level: got {inference_level!r}, expected 3 (merged), 0 (random per token) or "
                "1 (random per sentence)"
            )
        self.act = act
        self.inference_level = inference_level
        down = 1 if _check_flag("sharing_down", sharing_down) else num_expert
        up = 1 if _check_flag("sharing_up", sharing_up) else num_expert
        self.MoA_A = MixtureSoup(dim, r, down, inference_level)
        self.MoA_B = MixtureSoup(r, dim, up, inference_level)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x, residual: [..., H] (usually [B, S, H]) -> the same shape and dtype."""
        features = self.MoA_A.deepspeed_experts.weight.shape[-1]
        if not isinstance(x, torch.Tensor) or x.shape[-1:] != (features,):
            raise ValueError(f"x: got {getattr(x, 'shape', type(x).__name__)}, expected a tensor [..., {features}]")
        batched = _as_batch(x)
        batch, tokens, _ = batched.shape
        down_weight, down_bias, down_index = self.MoA_A.route(batch, tokens, x.device)
        up_weight, up_bias, up_index = self.MoA_B.route(batch, tokens, x.device)
        out = routed_adapter(
            batched, down_weight, down_bias, up_weight, up_bias, down_index, up_index,
            residual=batched if residual is x else _as_batch(residual), activation=_ACTIVATIONS[self.act],
        )  # fmt: skip
        return out.reshape(x.shape)


class NLGExpertSoup(ExpertSoup):
    """The reference project's adapter layer for GPT-2 (NLG/src/expert_soup.py).

    Differs from ExpertSoup as there: any `act` means the tanh form of GELU, and evaluation is always merged.
    """

    def __init__(
        self,
        dim: int,
        r: int,
        act: str | None = None,
        num_expert: int = 4,
        sharing_down: int = 0,
        sharing_up: int = 0,
    ):
        act = None if act is None else "gelu_tanh"
        super().__init__(dim, r, act, num_expert, _MERGED, sharing_down, sharing_up)


class AdamixMergedLinear(nn.Linear):
    """out = x W^T + b, plus s * (drop(x) A[i]_g^T) B[j]_g^T on the block of each enabled group g.

    s = lora_alpha / r. Training draws i and j uniformly, once a forward, on x's device; with
    `lora_expert_score_weight.requires_grad` it uses the softmax-weighted means of A and of B, as
    evaluation always does. The means are computed when they are used, never kept.

    Args:
        num_experts: M. share_A, share_B: 1 for a side of one expert.
        in_features, out_features: K and N. r: rank, at least 1. lora_alpha, lora_dropout: as in LoRA.
        enable_lora: one flag per equal block of the N outputs; [True, False, True] adapts q and v of a fused c_attn.
        fan_in_fan_out: weight is [K, N], as in GPT-2's Conv1D.
        merge_weights: accepted for the signature's sake. The frozen weight is never rewritten here,
            so evaluation gives the same result with either value.
        bias, device, dtype: of torch.nn.Linear.

    State-dict keys: `weight`, `bias`, `lora_expert_score_weight` [M], `experts_lora_A.{m}` [G*r, K] and
    `experts_lora_B.{m}` [G*N/len(enable_lora), r], G the enabled groups. `lora_A_w` and `lora_B_w`, which
    the released code may leave in its checkpoints, are ignored.

    Raises:
        ValueError: an argument out of range; out_features not a multiple of len(enable_lora).

    Source: `AdamixMergedLinear` of NLG/loralib/layers.py in microsoft/AdaMix.
    """

    official_banks = {"experts_lora_A": "experts_lora_A.{m}", "experts_lora_B": "experts_lora_B.{m}"}  # noqa: RUF012
    official_ignored = ("lora_A_w", "lora_B_w")

    def __init__(
        self,
        num_experts: int = 1,
        share_A: int = 0,
        share_B: int = 0,
        *,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **linear_options: Any,
    ):
        check_positive(num_experts=num_experts, r=r, in_features=in_features, out_features=out_features)
        check_finite("lora_alpha", lora_alpha)
        check_fraction("lora_dropout", lora_dropout)
        if not isinstance(enable_lora, Sequence):
            raise TypeError(f"enable_lora: got {enable_lora!r}, expected a sequence of flags")
        share_down, share_up = _check_flag("share_A", share_A), _check_flag("share_B", share_B)
        if not any(enable_lora):
            raise ValueError(f"enable_lora: got {list(enable_lora)}, expected at least one True")
        if out_features % len(enable_lora):
            raise ValueError(
                f"enable_lora: got {len(enable_lora)} flags, expected a divisor of out_features = {out_features}"
            )
        super().__init__(in_features, out_features, **linear_options)
        block = out_features // len(enable_lora)
        groups = sum(map(bool, enable_lora))
        self.num_experts, self.share_A, self.share_B = num_experts, share_A, share_B
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.enable_lora = list(enable_lora)
        self.output_offsets = tuple(g * block for g, enabled in enumerate(enable_lora) if enabled)
        self.fan_in_fan_out = fan_in_fan_out
        self.merge_weights = merge_weights
        self.router = Router("batch", passes=1)
        self.weight.requires_grad = False
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t().contiguous()
        one = self.weight.new_empty(groups * r, in_features)
        nn.init.kaiming_uniform_(one, a=5**0.5)
        self.experts_lora_A = nn.Parameter(one.repeat(1 if share_down else num_experts, 1, 1))
        self.experts_lora_B = nn.Parameter(one.new_zeros(1 if share_up else num_experts, groups * block, r))
        self.lora_expert_score_weight = nn.Parameter(one.new_zeros(num_experts), requires_grad=False)
        translate_keys(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] -> [..., N], x's dtype."""
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        base = F.linear(x, weight, self.bias)
        out = routed_lora(
            _as_batch(self.lora_dropout(x)),
            self._factor(self.experts_lora_A),
            self._factor(self.experts_lora_B),
            None,
            None,
            base=_as_batch(base),
            scaling=self.scaling,
            groups=len(self.output_offsets),
            output_offsets=self.output_offsets,
        )
        return out.reshape(base.shape)

    def _factor(self, bank: torch.Tensor) -> torch.Tensor:
        """[M, ...] -> [1, ...]: one drawn expert in training, the weighted mean otherwise."""
        if bank.shape[0] == 1:
            return bank
        if self.router.uses_merged(self.training, self.lora_expert_score_weight.requires_grad):
            return merge_experts(bank, self.lora_expert_score_weight).unsqueeze(0)
        return _drawn_expert(bank, self.router.draw(bank.shape[0], 1, 1, bank.device, self.training))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, num_experts={self.num_experts}, enable_lora={self.enable_lora}"


def _as_batch(x: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [B, S, H]."""
    if x.dim() == 3:
        return x
    return x.unsqueeze(0) if x.dim() == 2 else x.reshape(-1, x.shape[-2] if x.dim() > 2 else 1, x.shape[-1])
