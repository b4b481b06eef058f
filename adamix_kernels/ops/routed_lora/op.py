"""Routed LoRA's dispatcher ops: schema, fake, backend selection."""

from __future__ import annotations

import torch

from ..._backends import select
from .._checks import check_index_values
from .._library import define


def _forward(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    base: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_index_values("a_index", a_index, lora_a.shape[0])
    check_index_values("b_index", b_index, lora_b.shape[0])
    narrow = lora_a.shape[0] * lora_a.shape[1]
    return select("routed_lora", backend, x.device, x.dtype, narrow).forward(
        x, lora_a, lora_b, a_index, b_index, base, seed, scaling, groups, offsets, dropout_p
    )


def _forward_fake(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    base: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    select("routed_lora", backend, x.device, x.dtype)
    batch, tokens, _ = x.shape
    width = max(offsets) + lora_b.shape[1] // groups if base is None else base.shape[2]
    return x.new_empty(batch, tokens, width), x.new_empty(batch, tokens, lora_a.shape[1])


def _inplace(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    base: torch.Tensor,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    backend: str,
) -> torch.Tensor:
    check_index_values("a_index", a_index, lora_a.shape[0])
    check_index_values("b_index", b_index, lora_b.shape[0])
    rows = base.view(*x.shape[:2], base.shape[-1])
    narrow = lora_a.shape[0] * lora_a.shape[1]
    _, t = select("routed_lora", backend, x.device, x.dtype, narrow).forward(
        x, lora_a, lora_b, a_index, b_index, rows, seed, scaling, groups, offsets, dropout_p, inplace=True
    )
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
    base: torch.Tensor,
    seed: torch.Tensor | None,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    backend: str,
) -> torch.Tensor:
    select("routed_lora", backend, x.device, x.dtype)
    return x.new_empty(*x.shape[:2], lora_a.shape[1])


def _backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    seed: torch.Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    narrow = lora_a.shape[0] * lora_a.shape[1]
    return select("routed_lora", backend, x.device, x.dtype, narrow).backward(
        grad_out, x, t, lora_a, lora_b, a_index, b_index, seed,
        need_x, need_a, need_b, scaling, groups, offsets, dropout_p,
    )  # fmt: skip


def _backward_fake(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    a_index: torch.Tensor | None,
    b_index: torch.Tensor | None,
    seed: torch.Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    scaling: float,
    groups: int,
    offsets: list[int],
    dropout_p: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = x.new_empty(x.shape if need_x else 0)
    return dx, x.new_empty(lora_a.shape if need_a else 0), x.new_empty(lora_b.shape if need_b else 0)


# Returns (out [B, S, N], t = dropout(x) A^T [B, S, groups*r]). seed is None exactly when dropout_p is 0.
routed_lora_op = define(
    "routed_lora(Tensor x, Tensor lora_a, Tensor lora_b, Tensor? a_index, Tensor? b_index, Tensor? base, "
    "Tensor? seed, float scaling, int groups, int[] offsets, float dropout_p, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
# Adds into base, contiguous rows [..., N], and returns t.
routed_lora_inplace_op = define(
    "routed_lora_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor? a_index, Tensor? b_index, Tensor(a!) base, "
    "Tensor? seed, float scaling, int groups, int[] offsets, float dropout_p, str backend) -> Tensor",
    _inplace,
    _inplace_fake,
)
# Returns (dx, d lora_a, d lora_b); what is not needed is an empty tensor. The base's gradient is grad_out itself.
routed_lora_backward_op = define(
    "routed_lora_backward(Tensor grad_out, Tensor x, Tensor t, Tensor lora_a, Tensor lora_b, Tensor? a_index, "
    "Tensor? b_index, Tensor? seed, bool need_x, bool need_a, bool need_b, float scaling, int groups, "
    "int[] offsets, float dropout_p, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
