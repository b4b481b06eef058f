"""Calls past the dispatcher: one Python call of an op costs it more than the GPU needs for a small kernel.

An op's direct.py looks a call up among those that were checked and planned before, by everything that the plan
depends on: class, shape, dtype, device, strides and addresses of every tensor, and every option. What it does not find
goes the usual way, through api.py's checks and the dispatcher. So do all calls that something besides autograd watches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from .. import _auto, _environment
from .._backends import most_of, select
from .._limits import UNLIMITED, Extent, tile_columns
from ._library import in_forward_mode

# Other classes are their own business: a DTensor, a FakeTensor, a quantised weight.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
# Plans of an op; batches of very many shapes begin anew.
MOST_PLANS = 4096
_switched_off = 0

Value = TypeVar("Value")


class Kept(dict[Any, Value]):
    """At most MOST_PLANS answers by key; `forget_all` empties every one of these tables."""

    tables: ClassVar[list[Kept[Any]]] = []

    def __init__(self) -> None:
        super().__init__()
        Kept.tables.append(self)

    def keep(self, key: Any, value: Value) -> Value:
        if len(self) >= MOST_PLANS:
            self.clear()
        self[key] = value
        return value


class Served(NamedTuple):
    """The attribute `direct` of a backend's module, None where it has none, and the most that the module takes."""

    direct: Any
    most: Extent

    def takes(self, bank: torch.Tensor, groups: int) -> bool:
        """Whether kernels take a call of this first bank [M, groups * r, H]."""
        most = self.most
        if most is UNLIMITED:
            return True
        shape = bank.shape  # of too few dimensions, for api.py to name
        columns = shape[1] if len(shape) > 1 else 1
        return 0 < groups <= most.groups and tile_columns(columns, groups) <= most.columns


_SERVED: Kept[Served] = Kept()
# What else forgets with them.
OTHERS: list[Callable[[], None]] = []


def forget_all() -> None:
    """No call is known any more: for tests, and for who changes what a plan does not ask for."""
    for forget in (*(table.clear for table in Kept.tables), *OTHERS):
        forget()


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Every call goes through the dispatcher and plans anew: for tests that look at launches, or compare."""
    global _switched_off
    _switched_off += 1
    try:
        yield
    finally:
        _switched_off -= 1


def traced() -> bool:
    """Whether a compiler, a dispatch mode (fake tensors) or a transform of functions follows the dispatcher's calls."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def may_be_direct() -> bool:
    """Whether nobody but autograd watches this call: no compiler, mode, transform, profiler, no ADAMIX_CHECK."""
    return not (
        traced()
        or _switched_off
        or in_forward_mode()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or _environment.checks_values()
    )


def served(
    op: str, backend: str, tensors: tuple[Any, ...], checked: bool, groups: int = 1, size: int | None = None
) -> Any:
    """What serves direct calls of an op with these arguments, the first of which decides, or None: served_within's."""
    found = served_within(op, backend, tensors, checked, groups, size)
    return None if found is None else found.direct


def served_within(
    op: str, backend: str, tensors: tuple[Any, ...], checked: bool, groups: int = 1, size: int | None = None
) -> Served | None:
    """What serves direct calls of an op with these arguments, the first of which decides; None: nothing does.

    What the class of shapes goes by is `size` or else, of a loss, the last axis of its logits, and of routed ops the
    first bank, the second tensor. What exceeds the kernels' limits is not served. checked: whether api.py has checked
    the arguments, `backend` too; what no checked call asked for is not looked up. Raises AttributeError for what is no
    tensor.
    """
    x: Any = tensors[0]
    key: Any = op, backend, x.device, x.dtype
    if backend == "auto":
        if size is None:
            # Slices: what has too few dimensions is for api.py to name.
            size = (x.shape[-1:] if op == "consistency" else tensors[1].shape[:2]).numel()
        key = *key, size, _auto.table
    found = _SERVED.get(key)
    if found is None:
        if not checked:
            return None
        module = select(op, backend, x.device, x.dtype, size or 0)
        found = _SERVED.keep(key, Served(getattr(module, "direct", None), most_of(module, x.device, x.dtype)))
    if found.direct is None or not PLAIN.issuperset(map(type, tensors)):
        return None
    return found if op == "consistency" or found.takes(tensors[1], groups) else None


# Whether autocast is on for any device.
autocasts = torch._C._is_any_autocast_enabled


def below_autograd() -> bool:
    """Whether the caller is itself a kernel that the dispatcher called below autograd."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)


def traits(t: torch.Tensor | None) -> object:
    """What of a tensor of a class in PLAIN a plan depends on, but for its address."""
    return t if t is None else (t.shape, t.dtype, t.device, t.is_contiguous(), t.is_neg())


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without the look for transforms, which `may_be_direct` has taken."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply
