"""Routed ops whose autograd node is in C++ (csrc/autograd): no Python runs below the call, nor in the backward.

The module lies beside the library whose kernels it calls, and its name says which torch and which Python it is for:
with any other, and where it was not built, calls take the nodes in Python. Calls that something besides autograd
watches, and those of a kind that Python did not find to be served (`serve`), it leaves alone.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import torch

from .. import _auto, _environment, _extension
from . import _direct

ADAPTER, LORA = 0, 1


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
    library = _extension.library_path()
    # As _build.node_name names it, which a layout without the build does not have.
    name = f"_node-{torch.__version__}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    path = None if library is None else library.parent / name
    if path is None or not path.is_file() or not isinstance(_environment._raw, dict):
        return None
    return _from(path)


def _from(path: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_node", str(path))
    spec = importlib.util.spec_from_loader("_node", loader)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    namespace = __package__.removesuffix(".ops").replace(".", "_")
    tables = vars(_direct), vars(_auto), _environment._raw
    module.setup(namespace, *tables, _environment._check, _environment._one)
    return module


def serve(direct: Any, op: int, backend: str, x: torch.Tensor, bank: torch.Tensor) -> None:
    """Calls like this one, which `direct` serves, are the node's from now on, if it has kernels to call."""
    if getattr(direct, "has_node", False):
        module = _load()
        if module is not None:
            module.serve(op, backend, x, bank)
            NODE.module = module
