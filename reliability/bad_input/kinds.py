"""One kind of bad input, and what must happen to it."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch

_OPS = (
    "routed_adapter", "routed_lora", "gated_adapter", "gated_lora", "router", "mixture_lora", "merge", "consistency",
)  # fmt: skip
# What a reference backend computes with; everything else in these modules is names of helpers.
_WORK = re.compile(r"(adamix_|linear_|experts_|banks_|lora_)?(forward|backward)(_grad)?|rescale")


@dataclass(frozen=True)
class Kind:
    """name: what is wrong, in words. argument: what the message must name. call: makes the mistake.

    inputs: tensors that may not change, and models whose parameters, modes and layers may not.
    """

    name: str
    argument: str
    call: Callable[[], object]
    inputs: tuple[torch.Tensor | torch.nn.Module, ...] = ()


def problem(kind: Kind) -> str | None:
    """What the package did wrong with it, or None: a ValueError or TypeError names the argument, before any work."""
    before = [_state(value) for value in kind.inputs]
    with counted_work() as work:
        try:
            kind.call()
        except (ValueError, TypeError) as error:
            message = str(error)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        else:
            return "nothing was raised"
    if not re.search(rf"(?<![\w.]){re.escape(kind.argument)}(?!\w)", message):
        return f"the message does not name {kind.argument}: {message}"
    if work:
        return f"{work[0]} ran before the error"
    if any(not _same(old, _state(value)) for old, value in zip(before, kind.inputs, strict=True)):
        return "an input was changed"
    return None


@contextlib.contextmanager
def counted_work() -> Iterator[list[str]]:
    """The names of everything the reference backend, which serves the CPU, is asked to compute."""
    done: list[str] = []

    def counting(name, real):
        def run(*args, **keywords):
            done.append(name)
            return real(*args, **keywords)

        return run

    with contextlib.ExitStack() as stack:
        for op in _OPS:
            backend = importlib.import_module(f"adamix_kernels.ops.{op}.reference")
            for name in vars(backend):
                if _WORK.fullmatch(name):
                    counter = counting(f"{op}.{name}", getattr(backend, name))
                    stack.enter_context(mock.patch.object(backend, name, counter))
        yield done


def _state(value: torch.Tensor | torch.nn.Module) -> list:
    if isinstance(value, torch.Tensor):
        return [value._version, value.requires_grad, None if value.is_meta else value.detach().clone()]
    facts = [(name, type(module).__name__, module.training) for name, module in value.named_modules()]
    facts += [(name, p.requires_grad) for name, p in value.named_parameters()]
    state = getattr(value, "adamix", None)
    facts.append(None if state is None else (state.merged, state.router.experts, state.router.eval_level))
    return [facts, *(t.detach().clone() for t in value.state_dict().values())]


def _same(old: list, new: list) -> bool:
    return len(old) == len(new) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(old, new, strict=True)
    )


def wrong_arguments(function: Callable, valid: Callable[[], dict], changes) -> Iterator[Kind]:
    """A Kind for each (argument named, words, change): change(arguments) gives what to replace, {name: value}."""
    for argument, words, change in changes:
        given = valid()
        given.update(change(given))
        tensors = tuple(value for value in given.values() if isinstance(value, torch.Tensor))
        yield Kind(f"{function.__name__}: {argument}: {words}", argument, _call(function, given), tensors)


def _call(function, given):
    return lambda: function(**given)


def instead(name: str, value: object) -> Callable[[dict], dict]:
    return lambda _given: {name: value}


def of(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[dict], dict]:
    return lambda given: {name: change(given[name])}


def floating(name: str, *, alone: bool = False, optional: bool = False) -> list[tuple]:
    """What may be wrong with any floating tensor; alone: the one that sets the dtype and device for the others."""
    kinds = [
        (name, "a list", instead(name, [1.0])),
        (name, "a number", instead(name, 1.0)),
        (name, "a NumPy array", of(name, lambda t: t.detach().numpy())),
        (name, "integers", of(name, lambda t: t.long())),
        (name, "booleans", of(name, lambda t: t.bool())),
        (name, "complex numbers", of(name, lambda t: t.to(torch.complex64))),
    ]
    if not optional:
        kinds.append((name, "None", instead(name, None)))
    if not alone:
        kinds.append((name, "another dtype", of(name, lambda t: t.to(torch.bfloat16))))
        kinds.append((name, "another device", of(name, lambda t: t.to("meta"))))
    return kinds


def one_axis_more(name: str) -> tuple:
    return name, "one axis more", of(name, lambda t: t.unsqueeze(0))


def one_axis_less(name: str) -> tuple:
    return name, "one axis less", of(name, lambda t: t[0])


def longer(name: str, axis: int) -> tuple:
    return name, f"one too many on axis {axis}", of(name, lambda t: torch.cat([t, t.narrow(axis, 0, 1)], axis))


def index(name: str, experts: int) -> list[tuple]:
    """What may be wrong with a routing index of a bank of several experts, given as [B, S]."""
    return [
        (name, "None for several experts", instead(name, None)),
        (name, "a list", instead(name, [0, 0])),
        (name, "a number", instead(name, 0)),
        (name, "floating ids", of(name, lambda t: t.float())),
        (name, "8-bit ids", of(name, lambda t: t.to(torch.uint8))),
        (name, "booleans", of(name, lambda t: t.bool())),
        (name, "another device", of(name, lambda t: t.to("meta"))),
        (name, "no axis", of(name, lambda t: t[0, 0])),
        (name, "three axes", of(name, lambda t: t.unsqueeze(2))),
        (name, "a sample too many", of(name, lambda t: torch.cat([t, t[:1]]))),
        (name, "a token too many", of(name, lambda t: torch.cat([t, t[:, :1]], 1))),
        (name, "ids per token of another batch", of(name, lambda t: t.t().contiguous())),
        (name, "an id of -1", of(name, lambda t: t - 1)),
        (name, "an id of no expert", of(name, lambda t: torch.full_like(t, experts))),
        (name, "an id beyond 32 bits", of(name, lambda t: torch.full_like(t, 2**40, dtype=torch.int64))),
    ]


def choice(name: str, *values: object) -> list[tuple]:
    return [(name, f"{value!r}", instead(name, value)) for value in values]
