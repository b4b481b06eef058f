"""Registration of the ops with the PyTorch dispatcher, once for all devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch.autograd import forward_ad

# The package's own name: a copy under another one (see build.toml) registers beside this one.
NAMESPACE = __package__.removesuffix(".ops").replace(".", "_")
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


# What the annotation of an argument is in a schema.
_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", list[torch.Tensor]: "Tensor[]",
    list[torch.Tensor | None]: "Tensor?[]", bool: "bool", int: "int", float: "float", str: "str", list[int]: "int[]",
}  # fmt: skip


def define(
    name: str,
    arguments: type[Any],
    returns: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    written: str | None = None,
) -> torch._ops.OpOverload:
    """Defines `<the package's name>::<name>(<arguments>, str backend) -> <returns>`, for every device, and its fake.

    arguments: a NamedTuple, whose fields are the schema's; kernel and fake take one of it, and the backend. written:
    the field that is overwritten. The kernel runs outside autocast: api.py has cast its arguments, and a backward in an
    autocast region must compute in the dtype its forward had.
    """
    hints = get_type_hints(arguments)
    types = ["Tensor(a!)" if field == written else _TYPES[hint] for field, hint in hints.items()]
    fields = ", ".join(f"{kind} {field}" for kind, field in zip(types, hints, strict=True))

    def outside_autocast(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return kernel(arguments(*args[:-1]), args[-1])

    def without_values(*args: Any) -> Any:
        return fake(arguments(*args[:-1]), args[-1])

    _LIBRARY.define(f"{name}({fields}, str backend) -> {returns}")
    _LIBRARY.impl(name, outside_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", without_values, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def differentiate(op: torch._ops.OpOverload, function: type[torch.autograd.Function]) -> None:
    """Makes `function` the derivative of `op`.

    function.forward receives the op's arguments and must call the op through `below_autograd`.
    Registered at the Autograd key rather than with register_autograd, which costs three times as
    much host time a call.
    """

    def autograd_kernel(*args: Any) -> Any:
        if records(args):
            return function.apply(*args)
        return below_autograd(op, *args)

    _LIBRARY.impl(op._schema.name.partition("::")[2], autograd_kernel, "Autograd")


def gradients_of(arguments: type[Any], **grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """What a Function's backward returns: the gradients named and None for all other arguments, the backend too."""
    return *map(grads.get, arguments._fields), None


def records(args: tuple[Any, ...]) -> bool:
    """Whether autograd records a call with these arguments, or is to take their tangents, which Functions refuse."""
    if in_forward_mode() and any(
        isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
    ):
        return True
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def in_forward_mode() -> bool:
    """Whether tensors may have tangents (torch.autograd.forward_ad, torch.func.jvp)."""
    return forward_ad._current_level >= 0


def below_autograd(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Calls `op` without passing its autograd kernel again."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of that name, which costs nothing where no graph of the backward is made."""
    refusing = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return refusing(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def wrote(t: torch.Tensor) -> None:
    """A kernel's write is not seen by autograd: whoever saved the old value of `t` must find out."""
    if not t.is_inference():
        torch.autograd.graph.increment_version(t)


def as_base(t: torch.Tensor) -> torch.Tensor:
    """`t` as a tensor of its own, its memory not copied, for a Function to return.

    What a Function returns as a view may not be added to in place. For memory that nobody else holds.
    """
    return torch.ops.aten._unsafe_view(t, t.shape) if t._is_view() else t
