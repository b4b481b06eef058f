"""What a benchmark of an op is made of: a formula, inputs, and the contenders that compute it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from adamix_kernels import BackendUnavailableError, backends

from ..measure.ledger import AbsentError

DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Inputs:
    """leaves: floating tensors to differentiate by. extra: other arguments. grad: of the output, None for a scalar."""

    leaves: tuple[torch.Tensor, ...]
    extra: tuple = ()
    grad: torch.Tensor | None = None

    def cast(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype, detached."""

        def to(t):
            return t.detach().to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

        return Inputs(tuple(map(to, self.leaves)), tuple(map(to, self.extra)), to(self.grad))


@dataclass(frozen=True)
class Bound:
    """A call on one set of inputs, and the tensors that its gradients are taken by."""

    call: Callable[[], object]
    leaves: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """Somebody who computes the case's formula.

    name: the CSV's backend. open: ready to bind inputs; raises ImportError or AbsentError where it cannot run.
    narrow: the inputs it can serve, where that is not all of them (one expert instead of M). plain: the
    formula it computes, where it is another than the case's. graph: whether a CUDA graph can hold it. exacting:
    whether it is held to the exactness that our own kernels promise.
    """

    name: str
    open: Callable[[], Callable[[Inputs], Bound]]
    narrow: Callable[[Inputs], Inputs] | None = None
    plain: Callable | None = None
    graph: bool = True
    exacting: bool = False


@dataclass(frozen=True)
class Case:
    """One op at one size.

    make: one set of random inputs. make_check: a set small enough for float64, the same where None. plain:
    the formula, (*leaves, *extra) -> tensor or sequence of tensors, in any dtype. traffic: the fewest bytes
    to move, by direction; operations: multiplications and additions of matrix products, likewise.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[Draw], Inputs]
    plain: Callable
    contenders: Sequence[Contender]
    traffic: dict[str, float]
    operations: dict[str, float] = field(default_factory=dict)
    make_check: Callable[[Draw], Inputs] | None = None


class Draw:
    """Random inputs on a device; a seed gives the same ones again."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).mul_(scale).to(self.dtype)

    def index(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def routing(self, kind: str, experts: int, batch: int, tokens: int) -> torch.Tensor:
        """An expert for each sample ("sample", "batch": the batch is one row a pass) or token; "sorted": likewise, but
        the tokens of one expert follow each other."""
        if kind == "sorted":
            return self.index(experts, batch * tokens).sort().values.view(batch, tokens)
        return self.index(experts, *((batch, tokens) if kind == "token" else (batch,)))


def of(name: str, function: Callable, **options) -> Contender:
    """A contender that is a function of (*leaves, *extra)."""
    return Contender(name, lambda: bind(function), **options)


def bind(function: Callable) -> Callable[[Inputs], Bound]:
    """Inputs -> the function called on them."""
    return lambda inputs: Bound(lambda: function(*inputs.leaves, *inputs.extra), inputs.leaves)


def compiled(name: str, function: Callable, *, smoke: bool) -> Contender:
    """`function` under torch.compile at fixed sizes; smoke leaves the code generator out."""

    def opened():
        import torch._functorch.config

        # Else a compiled backward would refuse to be timed on its own, as every other contender is.
        torch._functorch.config.donated_buffer = False
        backend = "eager" if smoke else "inductor"
        # A function of its own: compilations of one function share a limit, whatever their sizes.
        fresh = functools.wraps(function)(lambda *arguments: function(*arguments))
        return bind(torch.compile(fresh, dynamic=False, backend=backend))

    return Contender(name, opened)


def require_usable(backend: str, op: str, device: torch.device) -> None:
    """Raises AbsentError where `backend` cannot be timed on `op` here."""
    state = backends()[backend]
    if op not in state.ops:
        raise AbsentError(f"this build has no {backend} implementation of {op}")
    if not state.usable:
        raise AbsentError(state.reason)
    if backend != "reference" and device.type != "cuda":
        raise AbsentError(f"backend {backend} is timed on a GPU only")


def ours(op: str, device: torch.device, make: Callable[[str], Callable]) -> list[Contender]:
    """One contender for each backend of this build; make(backend) -> function of (*leaves, *extra)."""
    made = []
    for name in backends():

        def opened(name=name):
            require_usable(name, op, device)
            return bind(_raising_absent(make(name)))

        made.append(Contender(name, opened, exacting=True))
    return made


def absent(name: str, reason: str) -> Contender:
    """A peer that does not serve this case, for the record."""

    def opened():
        raise AbsentError(reason)

    return Contender(name, opened)


def _raising_absent(function: Callable) -> Callable:
    def call(*arguments):
        try:
            return function(*arguments)
        except BackendUnavailableError as error:
            raise AbsentError(str(error)) from error

    return call


def tensors(result: object) -> tuple[torch.Tensor, ...]:
    """The tensors of a result: one, or a sequence of them."""
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)
