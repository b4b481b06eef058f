"""Registration of the ops with the PyTorch dispatcher, once for all devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# The package's own name: a copy under another one (see build.toml) registers beside this one.
NAMESPACE = __package__.removesuffix(".ops").replace(".", "_")
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Defines `<the package's name>::<schema>`, with one kernel for every device and its fake.

    The kernel runs outside autocast: api.py has cast its arguments, and a backward called inside an
    autocast region must compute in the dtype its forward had.
    """

    @functools.wraps(kernel)
    def outside_autocast(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return kernel(*args)

    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, outside_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
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


def records(args: tuple[Any, ...]) -> bool:
    """Whether autograd records a call with these arguments."""
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


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


def as_base(t: torch.Tensor) -> torch.Tensor:
    """`t` as a tensor of its own, its memory not copied, for a Function to return.

    What a Function returns as a view may not be added to in place. For memory that nobody else holds.
    """
    return torch.ops.aten._unsafe_view(t, t.shape) if t._is_view() else t
