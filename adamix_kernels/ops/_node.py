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
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _auto, _environment, _extension
from .._limits import Extent
from . import _direct

ADAPTER, LORA = 0, 1
# Kinds of plans.
FORWARDS, IN_PLACE, BACKWARDS = {ADAPTER: 0, LORA: 2}, 3, {1: ADAPTER, 4: LORA}
# Classes whose instances' attributes say what they do: of routers, and of linear layers whose output is new memory.
ROUTERS: set[type] = set()
# Of the latter whether the weight is transposed, and all that runs in a call: (a class or a namespace, a name, what it
# is there), which csrc/autograd/modules.cpp looks up again at every call; None where somebody had changed it before.
LINEARS: dict[type, tuple[bool, tuple[tuple[Any, str, Any], ...]] | None] = {}


# The same of adapters that may be one call with the linear layer before them; csrc/autograd/modules.cpp looks it up.
ADAPTERS: dict[type, tuple[tuple[Any, str, Any], ...] | None] = {}


def keep_linear(kind: Any, alias: str, module: Any, name: str, transposed: bool) -> None:
    """A class of linear layers, whose forward calls module.name, by the name of `alias` for the module."""
    own, function, called = vars(sys.modules[kind.__module__]), getattr(module, name), _called(kind)
    original = called and own.get(alias) is module and isinstance(function, types.BuiltinFunctionType)
    LINEARS[kind] = (transposed, (*called, (own, alias, module), (vars(module), name, function))) if original else None


def keep_adapter(kind: Any) -> None:
    """A class of adapters."""
    ADAPTERS[kind] = _called(kind) or None


def _called(kind: Any) -> tuple[tuple[Any, str, Any], ...]:
    """(the class, a name, what it is there) of the methods that run in a module's call; none where one is a patch."""
    base = torch.nn.Module
    inherited = {of: getattr(base, of) for of in ("__call__", "_call_impl", "__getattr__")}
    written = _is_written_in(kind.forward, kind) and all(
        getattr(kind, of) is method and _is_written_in(method, base) for of, method in inherited.items()
    )
    called = {**inherited, "forward": kind.forward}
    return tuple((kind, of, method) for of, method in called.items()) if written else ()


def _is_written_in(function: Any, kind: type) -> bool:
    """Whether a method's code stands in the file of its class: no patch."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == getattr(sys.modules[kind.__module__], "__file__", None)


keep_linear(torch.nn.Linear, "F", torch.nn.functional, "linear", False)


class Node:
    """module: what was loaded, None until a call is served by it."""

    module: Any = None

    def forget(self) -> None:
        """No kind of calls is known to be served any more."""
        if self.module is not None:
            self.module.forget()


NODE = Node()
_direct.OTHERS.append(NODE.forget)


def loaded() -> Any:
    """The module for who needs no kind of calls to be served, or None; not while a compiler follows."""
    return None if torch.compiler.is_compiling() else _load()


@functools.cache
def _load() -> Any:
    module, reason = find()
    if module is None or not isinstance(_environment._raw, dict):
        if reason is not None:
            warnings.warn(f"autograd's nodes stay in Python: {reason}", stacklevel=2)
        return None
    namespace = __package__.removesuffix(".ops").replace(".", "_")
    tables = vars(_direct), vars(_auto), vars(torch.nn.modules.module), _environment._raw
    names = _environment._check, _environment._one, _environment._table
    module.setup(namespace, *tables, *names, ROUTERS, LINEARS, ADAPTERS, _backward)
    return module


@functools.cache
def find() -> tuple[Any, str | None]:
    """(the module, None); (None, None) where there is none for this torch and Python; (None, why it is not used)."""
    # As _build.node_name names it, which a layout without the build does not have.
    path = _extension.folder() / f"_node-{torch.__version__}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if not path.is_file():
        return None, None
    loader = importlib.machinery.ExtensionFileLoader("_node", str(path))
    spec = importlib.util.spec_from_loader("_node", loader)
    assert spec is not None
    try:
        module: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, OSError) as error:
        return None, str(error).partition("\n")[0]
    wanted = _sources()
    if wanted is None or getattr(module, "sources", None) == wanted:
        return module, None
    again = "--host" if _extension.on_host() else "--node"
    return None, f"{path.name} was built from another csrc/; `python -m adamix_kernels._build {again}` builds it anew"


def _sources() -> str | None:
    """What csrc/ would make the module of, or None where there is none: its word is then taken for good."""
    try:
        from .. import _build
    except ImportError:  # a layout without the build
        return None
    try:
        return _build.node_sources(_build.source_folder())
    except (_build.BuildError, OSError):
        return None


# By op, its direct calls (ops/_routed_direct.py): what a backward asks that has no plan.
BACKWARD: dict[int, Callable[..., Sequence[torch.Tensor]]] = {}


def _backward(kind: int, passes: int, backend: str, *arguments: Any) -> Sequence[torch.Tensor]:
    return BACKWARD[BACKWARDS[kind]](kind, passes, backend, *arguments)


def serve(direct: Any, op: int, backend: str, x: torch.Tensor, bank: torch.Tensor, most: Extent) -> None:
    """Calls like this one, which `direct` serves, are the node's from now on, those within `most`: where it has_node,
    by the library's kernels or, if it says which stream to launch on (current_stream), by its plans."""
    if getattr(direct, "has_node", False):
        module = _load()
        if module is not None:
            stream = getattr(direct, "current_stream", None)
            module.serve(op, backend, x, bank, stream, most.columns, most.groups)
            NODE.module = module


def keep(kind: int, plan: Any, tensors: Sequence[Any], options: Sequence[Any]) -> None:
    """Calls with these arguments are launched by the node as `plan`, one of Triton's, says."""
    if NODE.module is not None and getattr(plan, "kept", True) is False:
        NODE.module.keep_plan(kind, tuple(tensors), tuple(options), plan)  # and sets plan.kept
