"""What a call starts and keeps, counted on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VIEWS = ("view", "reshape", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze", "expand", "alias", "t.")
_VIEWS += ("detach", "as_strided", "split", "unbind", "lift_fresh", "unsafe_view", "_unsafe_view", "narrow", "chunk")


class Calls(TorchDispatchMode):
    """Counts what computes, and the bytes of its arguments and results, each tensor of a call once."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).partition(".")[2]
        if not name.startswith(_VIEWS):
            self.count += 1
            found = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in found.values())
        return out


def calls_of(run: Callable[[], object]) -> int:
    return counted(run).count


def counted(run: Callable[[], object]) -> Calls:
    with Calls() as found:
        run()
    return found


def kept_bytes(run: Callable[[], torch.Tensor], given: list[torch.Tensor]) -> int:
    """What the graph of run() saves, each storage once, those of `given` left out."""
    known = {t.untyped_storage().data_ptr() for t in given}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    total = sum(found.values())
    del out
    return total
