"""Routed ops whose autograd node is in C++ (csrc/autograd): no Python runs below the call, nor in the backward.

With Triton it launches a call's kernels as a plan says (ops/_triton_plans.py) that Python made for the first such call.
The module lies beside the library, whose kernels it calls, or where that would lie, and its name says which torch and
which Python it is for: with any other, and where it was not built, calls take the nodes in Python. Calls that something
besides autograd watches, and those of a kind that Python did not find to be served (`serve`), it leaves alone.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _auto, _environment, _extension
from . import _direct

ADAPTER, LORA = 0, 1
# Kinds of plans.
FORWARDS, IN_PLACE, BACKWARDS = {ADAPTER: 0, LORA: 2}, 3, {1: ADAPTER, 4: LORA}
# Classes whose instances' attributes say what they do: of routers, and of linear layers whose output is new memory.
ROUTERS: set[type] = set()
LINEARS: set[type] = {torch.nn.Linear}


class Node:
    """module: what was loaded, None until a call is served by it."""

    module: Any = None

    def forget(self) -> None:
        """No kind of calls is known to be served any more."""
        if self.module is not None:
            self.module.forget()


NODE = Node()
_direct.OTHERS.append(NODE.forget)


@functools.cache
def _load() -> Any:
    # As _build.node_name names it, which a layout without the build does not have.
    path = _extension.folder() / f"_node-{torch.__version__}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if not path.is_file() or not isinstance(_environment._raw, dict):
        return None
    return _from(path)


def _from(path: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_node", str(path))
    spec = importlib.util.spec_from_loader("_node", loader)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    namespace = __package__.removesuffix(".ops").replace(".", "_")
    tables = vars(_direct), vars(_auto), vars(torch.nn.modules.module), _environment._raw
    names = _environment._check, _environment._one, _environment._table
    module.setup(namespace, *tables, *names, ROUTERS, LINEARS, _backward)
    return module


# By op, its direct calls (ops/_routed_direct.py): what a backward asks that has no plan.
BACKWARD: dict[int, Callable[..., Sequence[torch.Tensor]]] = {}


def _backward(kind: int, passes: int, backend: str, *arguments: Any) -> Sequence[torch.Tensor]:
    return BACKWARD[BACKWARDS[kind]](kind, passes, backend, *arguments)


def serve(direct: Any, op: int, backend: str, x: torch.Tensor, bank: torch.Tensor) -> None:
    """Calls like this one, which `direct` serves, are the node's from now on: where it has_node, by the library's
    kernels or, if it says which stream to launch on (current_stream), by its plans."""
    if getattr(direct, "has_node", False):
        module = _load()
        if module is not None:
            module.serve(op, backend, x, bank, getattr(direct, "current_stream", None))
            NODE.module = module


def keep(kind: int, plan: Any, tensors: Sequence[Any], options: Sequence[Any]) -> None:
    """Calls with these arguments are launched by the node as `plan`, one of Triton's, says."""
    if NODE.module is not None and getattr(plan, "kept", True) is False:
        plan.kept = NODE.module.keep_plan(kind, tuple(tensors), tuple(options), plan)
