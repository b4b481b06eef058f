"""Gated LoRA's dispatcher ops: schema, fake, backend selection."""

from __future__ import annotations

import torch

from ..._backends import select
from .._checks import check_index_values
from .._gates import check_scale_values, slots_of
from .._library import define


def _forward(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    gates: torch.Tensor,
    scales: torch.Tensor | None,
    base: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    mix: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_values(lora_a, lora_b, a_index, b_index, scales)
    return select("gated_lora", backend, x.device, x.dtype, _size(lora_a, lora_b)).forward(
        x, lora_a, lora_b, a_index, b_index, gates, scales, base, seed, scaling, groups, offsets, dropout_p, mix
    )


def _forward_fake(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    gates: torch.Tensor,
    scales: torch.Tensor | None,
    base: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    mix: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    select("gated_lora", backend, x.device, x.dtype)
    width = max(offsets) + lora_b.shape[1] // groups if base is None else base.shape[2]
    return x.new_empty(*x.shape[:2], width), _t_fake(x, lora_a, gates)


def _inplace(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    gates: torch.Tensor,
    scales: torch.Tensor | None,
    base: torch.Tensor,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    mix: str,
    backend: str,
) -> torch.Tensor:
    _check_values(lora_a, lora_b, a_index, b_index, scales)
    rows = base.view(*x.shape[:2], base.shape[-1])
    _, t = select("gated_lora", backend, x.device, x.dtype, _size(lora_a, lora_b)).forward(
        x, lora_a, lora_b, a_index, b_index, gates, scales, rows, seed, scaling, groups, offsets, dropout_p, mix,
        inplace=True,
    )  # fmt: skip
    if not base.is_inference():
        # A kernel's write is not seen by autograd: whoever saved base's old value must find out.
        torch.autograd.graph.increment_version(base)
    return t


def _inplace_fake(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    gates: torch.Tensor,
    scales: torch.Tensor | None,
    base: torch.Tensor,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    mix: str,
    backend: str,
) -> torch.Tensor:
    select("gated_lora", backend, x.device, x.dtype)
    return _t_fake(x, lora_a, gates)


def _backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    gates: torch.Tensor,
    scales: torch.Tensor | None,
    seed: torch.Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_gates: bool,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    mix: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return select("gated_lora", backend, x.device, x.dtype, _size(lora_a, lora_b)).backward(
        grad_out, x, t, lora_a, lora_b, a_index, b_index, gates, scales, seed,
        need_x, need_a, need_b, need_gates, scaling, groups, offsets, dropout_p, mix,
    )  # fmt: skip


def _backward_fake(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    gates: torch.Tensor,
    scales: torch.Tensor | None,
    seed: torch.Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_gates: bool,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    mix: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, da = x.new_empty(x.shape if need_x else 0), x.new_empty(lora_a.shape if need_a else 0)
    return dx, da, x.new_empty(lora_b.shape if need_b else 0), gates.new_empty(gates.shape if need_gates else 0)


def _size(lora_a: torch.Tensor, lora_b: torch.Tensor) -> int:
    """What the class of shapes goes by: the narrow columns of all experts of the larger bank."""
    return max(lora_a.shape[0], lora_b.shape[0]) * lora_a.shape[1]


def _t_fake(x: torch.Tensor, lora_a: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:2], slots_of(lora_a, gates) * lora_a.shape[1])


def _check_values(
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> None:
    check_index_values("a_index", a_index, lora_a.shape[0])
    check_index_values("b_index", b_index, lora_b.shape[0])
    check_scale_values(scales)


# Returns (out [B, S, N], t [B, S, slots * groups*r], t_k = dropout(x) A_k^T, before gates and scales). Indices are None
# for dense gates (slot e is expert e), and for a bank of one. seed is None exactly when dropout_p is 0.
gated_lora_op = define(
    "gated_lora(Tensor x, Tensor lora_a, Tensor lora_b, Tensor? a_index, Tensor? b_index, Tensor gates, "
    "Tensor? scales, Tensor? base, Tensor? seed, float scaling, int groups, int[] offsets, float dropout_p, "
    "str mix, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
# Adds into base, contiguous rows [..., N], and returns t.
gated_lora_inplace_op = define(
    "gated_lora_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor? a_index, Tensor? b_index, Tensor gates, "
    "Tensor? scales, Tensor(a!) base, Tensor? seed, float scaling, int groups, int[] offsets, float dropout_p, "
    "str mix, str backend) -> Tensor",
    _inplace,
    _inplace_fake,
)
# Returns (dx, d lora_a, d lora_b, d gates); what is not needed is an empty tensor. The base's gradient is grad_out.
gated_lora_backward_op = define(
    "gated_lora_backward(Tensor grad_out, Tensor x, Tensor t, Tensor lora_a, Tensor lora_b, Tensor? a_index, "
    "Tensor? b_index, Tensor gates, Tensor? scales, Tensor? seed, bool need_x, bool need_a, bool need_b, "
    "bool need_gates, float scaling, int groups, int[] offsets, float dropout_p, str mix, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
