"""Where the results of a list of banks lie: in one allocation, those of one shape side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .. import _node

# What notes a tensor's base: such a one may not be written in place where gradients are on.
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView).add(torch._C.DispatchKey.AutogradFunctionality)


class Results:
    """The results of banks of one dtype and device, in one allocation. shapes: theirs, one each.

    elements: of the allocation. offsets: of each result in it.
    plans: what a backend wants to find again when it is given the same Results, whose banks are alike in strides too.
    """

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.plans: dict[Any, Any] = {}
        self.offsets = [0] * len(shapes)
        self._shapes = list(shapes)
        self._places: Any = None
        self._blocks: list[tuple[tuple[int, ...], tuple[int, ...], int, list[int]]] = []
        self._which: list[int] = []
        alike: dict[torch.Size, list[int]] = {}
        for n, shape in enumerate(shapes):
            alike.setdefault(shape, []).append(n)
        unit, self.elements = 16 // dtype.itemsize, 0
        for shape, which in alike.items():
            size = math.prod(shape)
            for place, n in enumerate(which):
                self.offsets[n] = self.elements + place * size
            # Parts of a longer first axis: splitting it is quicker than taking slices of one axis more.
            rows, *rest = shape or (1,)
            strides = [math.prod(rest[axis:]) for axis in range(len(rest) + 1)]
            self._blocks.append(((len(which) * rows, *rest), tuple(strides), self.elements, [rows] * len(which)))
            self._which += which
            # Every block starts at a multiple of 16 bytes.
            self.elements += -(-len(which) * size // unit) * unit
        # Results without axes.
        self._numbers = [n for shape, which in alike.items() if not shape for n in which]
        self._in_order = self._which == sorted(self._which)

    def allocate(self) -> torch.Tensor:
        """New memory for all, one axis."""
        return torch.empty(self.elements, dtype=self.dtype, device=self.device)

    def merged(self, banks: list[torch.Tensor], scores: list[torch.Tensor | None]) -> list[torch.Tensor] | None:
        """The results by the library's kernels, from C++; None where Python must ask for them."""
        node = _node.loaded()
        made: list[torch.Tensor] | None = None if node is None else node.merge_banks(self._in_node(node), banks, scores)
        return made

    def split(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The results in `memory`, in the order of the shapes. To autograd each is a tensor of its own."""
        node = _node.loaded()
        made: list[torch.Tensor] | None = None if node is None else node.split(self._in_node(node), memory)
        return self._split(memory) if made is None else made

    def _in_node(self, node: Any) -> Any:
        """What the module of nodes reads of this."""
        if self._places is None:
            self._places = node.places(self._shapes, self.offsets, self.elements)
        return self._places

    def _split(self, memory: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            for sizes, strides, offset, rows in self._blocks:
                found += memory.as_strided(sizes, strides, offset).split_with_sizes(rows)
            if not self._in_order:
                parts, found = found, list(found)
                for n, part in zip(self._which, parts, strict=True):
                    found[n] = part
            for n in self._numbers:
                found[n] = found[n].view(())
        return found
