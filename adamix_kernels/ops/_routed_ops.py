"""The dispatcher ops of a layer with two banks, routed or gated: kernels, fakes, backend selection and derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .._backends import select
from .._limits import routed_extent
from ._checks import check_index_values
from ._gates import check_scale_values, slots_of
from ._library import (
    as_base,
    below_autograd,
    define,
    differentiate,
    gradients_of,
    once_differentiable,
    records,
    wrote,
)


class Layer(NamedTuple):
    """What a signature calls the banks, their indices, what the output is added to, and what has a gradient."""

    banks: tuple[str, str]
    indices: tuple[str, str]
    added: str
    learned: tuple[str, ...]


ADAPTER = Layer(
    ("down_weight", "up_weight"), ("down_index", "up_index"), "residual",
    ("x", "down_weight", "down_bias", "up_weight", "up_bias"),
)  # fmt: skip
LORA = Layer(("lora_a", "lora_b"), ("a_index", "b_index"), "base", ("x", "lora_a", "lora_b"))


class RoutedOps:
    """forward: (out, kept), kept the narrow products [B, S, slots * r] before gates. backward: the gradients of all
    that is `learned`, in that order; what is not needed is an empty tensor. inplace, of LoRA alone: adds into base,
    contiguous rows [..., N], and returns kept.

    Saved are the tensors that the backward op takes; everything else, a dropout's mask too, is recomputed.
    """

    def __init__(self, name: str, layer: Layer, arguments: Any, of_backward: Any):
        self.name, self.layer, self.arguments = name, layer, arguments
        self.gated, self.biases = "gates" in arguments._fields, layer is ADAPTER
        self.learned = (*layer.learned, "gates") if self.gated else layer.learned
        fields = of_backward._fields
        needs = [n for n, field in enumerate(fields) if field.startswith("need_")]
        self._needs, self.saved = slice(needs[0], needs[-1] + 1), fields[1 : needs[0]]
        self._first_option = arguments._fields.index(fields[needs[-1] + 1])
        self.groups_of_backward = fields.index("groups") if layer is LORA else None
        self.forward = define(name, arguments, "(Tensor, Tensor)", self._forward, self._forward_fake)
        grads = f"({', '.join(['Tensor'] * len(self.learned))})"
        self.backward = define(f"{name}_backward", of_backward, grads, self._backward, self._backward_fake)
        if layer is LORA:
            self.inplace = define(f"{name}_", arguments, "Tensor", self._inplace, self._kept_fake, layer.added)
        self._differentiate()

    def _banks(self, a: Any) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = (getattr(a, bank) for bank in self.layer.banks)
        return down, up

    def check_values(self, a: Any) -> None:
        for index, bank in zip(self.layer.indices, self._banks(a), strict=True):
            check_index_values(index, getattr(a, index), bank.shape[0])
        check_scale_values(getattr(a, "scales", None))

    def _served(self, a: Any, backend: str) -> ModuleType:
        """The class of shapes goes by the narrow columns of all experts, where gated, of the larger bank."""
        down, up = self._banks(a)
        experts = max(down.shape[0], up.shape[0]) if self.gated else down.shape[0]
        extent = routed_extent(down.shape[1], getattr(a, "groups", 1))
        return select(self.name, backend, a.x.device, a.x.dtype, experts * down.shape[1], extent)

    def _run(self, a: Any, backend: str, **how: bool) -> tuple[torch.Tensor, torch.Tensor]:
        self.check_values(a)
        out: tuple[torch.Tensor, torch.Tensor] = self._served(a, backend).forward(*a, **how)
        return out

    def _forward(self, a: Any, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._run(a, backend)

    def _forward_fake(self, a: Any, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        added, up = getattr(a, self.layer.added), self._banks(a)[1]
        width = max(getattr(a, "offsets", [0])) + up.shape[1] // getattr(a, "groups", 1)
        width = width if added is None else added.shape[2]
        return a.x.new_empty(*a.x.shape[:2], width), self._kept_fake(a, backend)

    def _inplace(self, a: Any, backend: str) -> torch.Tensor:
        kept = self._run(a._replace(base=a.base.view(*a.x.shape[:2], a.base.shape[-1])), backend, inplace=True)[1]
        wrote(a.base)
        return kept

    def _kept_fake(self, a: Any, backend: str) -> torch.Tensor:
        select(self.name, backend, a.x.device, a.x.dtype)
        down = self._banks(a)[0]
        kept: torch.Tensor = a.x.new_empty(
            *a.x.shape[:2], (slots_of(down, a.gates) if self.gated else 1) * down.shape[1]
        )
        return kept

    def _backward(self, a: Any, backend: str) -> tuple[torch.Tensor, ...]:
        grads: tuple[torch.Tensor, ...] = self._served(a, backend).backward(*a)
        return grads

    def _backward_fake(self, a: Any, backend: str) -> tuple[torch.Tensor, ...]:
        tensors = a.x, *self._banks(a), *([a.gates] if self.gated else [])
        grads = []
        for n, (like, needed) in enumerate(zip(tensors, a[self._needs], strict=True)):
            grads.append(like.new_empty(like.shape if needed else 0))
            if self.biases and n in (1, 2):
                grads.append(like.new_empty(like.shape[:2] if needed else 0))
        return tuple(grads)

    def gradients(
        self,
        grad_out: torch.Tensor,
        saved: Sequence[torch.Tensor],
        needs: Sequence[bool],
        options: Sequence[Any],
        direct: Callable[..., tuple[torch.Tensor, ...] | None] | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Of all that is learned, those in `needs`.

        options: those of the forward, and the backend. direct: a backend's backward of all arguments but the backend,
        asked first; None, or None from it: ask the op.
        """
        asked = (needs[0], needs[1] or needs[2], needs[3] or needs[4], *needs[5:]) if self.biases else needs
        if not any(asked):
            return (None,) * len(needs)
        shape = saved[0].shape
        if grad_out.shape[:-1] != shape[:-1]:
            grad_out = grad_out.reshape(*shape[:2], grad_out.shape[-1])
        arguments = (grad_out, *saved, *asked, *options)
        made = None if direct is None else direct(*arguments[:-1])
        if made is None:
            made = self.backward(*arguments)
        return tuple([grad if need else None for grad, need in zip(made, needs)])

    def differentiable_inplace(self, *arguments: Any) -> torch.Tensor:
        """The op `inplace` with its derivative: base, overwritten.

        base may not be a view where a gradient is recorded: autograd takes the first argument for the view rewritten.
        """
        if records(arguments):
            out: torch.Tensor = self._apply_inplace(*arguments)
            return out
        below_autograd(self.inplace, *arguments)
        base: torch.Tensor = arguments[self.arguments._fields.index(self.layer.added)]
        return base

    def _save(self, ctx: Any, arguments: tuple[Any, ...], kept: torch.Tensor) -> None:
        given = dict(zip(self.arguments._fields, arguments))
        ctx.save_for_backward(*(given.get(name, kept) for name in self.saved))
        ctx.options = arguments[self._first_option :]
        ctx.set_materialize_grads(False)

    def _of_arguments(self, ctx: Any, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
        if grad_out is None:
            return gradients_of(self.arguments)
        need = dict(zip(self.arguments._fields, ctx.needs_input_grad))
        made = self.gradients(grad_out, ctx.saved_tensors, [need[name] for name in self.learned], ctx.options)
        grads = dict(zip(self.learned, made, strict=True))
        return gradients_of(self.arguments, **grads, **{self.layer.added: grad_out if need[self.layer.added] else None})

    def _differentiate(self) -> None:
        ops = self

        class Routed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
                out, kept = below_autograd(ops.forward, *arguments)
                ops._save(ctx, arguments, kept)
                ctx.mark_non_differentiable(kept)
                return as_base(out), kept

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, grad_out: torch.Tensor | None, _grad_kept: torch.Tensor | None) -> tuple[Any, ...]:
                return ops._of_arguments(ctx, grad_out)

        class RoutedInPlace(torch.autograd.Function):
            """The same, the output written over base [..., N], which is not saved."""

            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
                ops._save(ctx, arguments, below_autograd(ops.inplace, *arguments))
                base: torch.Tensor = arguments[ops.arguments._fields.index(ops.layer.added)]
                ctx.mark_dirty(base)
                return base

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, grad_out: torch.Tensor | None) -> tuple[Any, ...]:
                return ops._of_arguments(ctx, grad_out)

        differentiate(self.forward, Routed)
        self._apply_inplace: Callable[..., Any] = RoutedInPlace.apply
