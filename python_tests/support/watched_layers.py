"""Whoever could tell that a layer's Python did not run: what tests of layers computed in C++ put around them."""

import contextlib
import types
from unittest import mock

import torch
from cuda_host import DEVICE
from torch import nn

# Of a call's surroundings; the first is a usual one.
AROUND = ("nothing", "no_grad", "autocast", "saved hooks")
# Of a module, and more of a linear one; the first is nobody.
OF_MODULES = (
    "nobody", "hook", "pre-hook", "own forward", "class's forward", "global hook", "compiled", "backward hook",
    "own _call_impl", "class's _call_impl", "class's __getattr__",
)  # fmt: skip
OF_LINEARS = (*OF_MODULES, "function", "own weight", "alias")


def around(name):
    return {
        "nothing": contextlib.nullcontext, "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast(DEVICE, torch.bfloat16),
        "saved hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    }[name]()  # fmt: skip


@contextlib.contextmanager
def watched(module, kind, calls):
    """`kind` watches the module; calls: of it, as seen there."""
    seen = lambda *_: calls.append(kind)  # noqa: E731
    conv = type(module).__name__ == "Conv1D"
    with contextlib.ExitStack() as stack:
        if kind in ("hook", "pre-hook", "backward hook"):
            place = {"hook": "forward_hook", "pre-hook": "forward_pre_hook", "backward hook": "full_backward_hook"}[
                kind
            ]
            stack.callback(getattr(module, f"register_{place}")(seen).remove)
        elif kind == "global hook":
            stack.callback(nn.modules.module.register_module_forward_pre_hook(seen).remove)
        elif kind in ("own forward", "class's forward"):
            real, target = type(module).forward, module if kind == "own forward" else type(module)
            owned = target is module

            def forward(*given):
                seen()
                return real(*((module, *given) if owned else given))

            stack.enter_context(mock.patch.object(target, "forward", forward))
        elif kind == "function":
            where, name = (torch, "addmm") if conv else (nn.functional, "linear")
            real = getattr(where, name)
            stack.enter_context(mock.patch.object(where, name, lambda *given: (seen(), real(*given))[1]))
        elif kind == "own weight":
            module.__dict__["weight"] = torch.zeros_like(module.weight)
        elif kind in ("own _call_impl", "class's _call_impl", "class's __getattr__"):
            target, name = module if kind.startswith("own") else nn.Module, kind.split()[1]
            real = getattr(nn.Module, name)

            def instead(*given):
                if name == "_call_impl" and (given[0] is module or target is module):
                    seen()
                return real(*((module, *given) if target is module else given))

            stack.enter_context(mock.patch.object(target, name, instead))
        elif kind == "alias":
            from transformers import pytorch_utils

            where, alias, name = (pytorch_utils, "torch", "addmm") if conv else (nn.modules.linear, "F", "linear")
            real = getattr(where, alias)
            function = lambda *given: (seen(), getattr(real, name)(*given))[1]  # noqa: E731
            other = types.SimpleNamespace(**{**vars(real), name: function})
            stack.enter_context(mock.patch.object(where, alias, other))
        elif kind == "compiled":
            module._compiled_call_impl = lambda *given: (seen(), module._call_impl(*given))[1]
        yield


def agree(got, want):
    """Whether two runs gave the same: an error's words, or (output, ..., gradients, the generator's next number)."""
    if isinstance(got, str) or isinstance(want, str):
        return got == want
    pairs = zip((got[0], *got[2], got[3]), (want[0], *want[2], want[3]), strict=True)
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


def check_gradients_that_are_not_memory(out, leaves):
    """Of a subclass, batched and negated, an output's gradients are those of plain ones."""
    from torch.testing._internal.two_tensor import TwoTensor

    gradient = torch.randn(3, *out.shape, device=DEVICE)
    want = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in gradient]
    two = torch.autograd.grad(out, leaves, TwoTensor(*(g.clone() for g in gradient[:2])), retain_graph=True)
    for got, first, second in zip(two, want[0], want[1], strict=True):
        assert torch.equal(got.a, first)
        assert torch.equal(got.b, second)
    many = torch.autograd.grad(out, leaves, gradient, is_grads_batched=True, retain_graph=True)
    assert all(torch.allclose(got, torch.stack(each)) for got, each in zip(many, zip(*want)))
    negated = torch.autograd.grad(out, leaves, torch._neg_view(-gradient[0]))
    assert all(torch.equal(got, first) for got, first in zip(negated, want[0], strict=True))
