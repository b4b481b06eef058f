"""model.adamix.pack: the names of a pack, their slots, and how a forward finds them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..models.centroid import Centroid
from ..models.state import device_of
from ..routing import Router
from . import route

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
RESERVED = ("nearest", "arrow")


class PackRouter(Router):
    """The caller's names, always: a forward outside use_experts has none.

    exact: a head's rows are the samples, so that there are as many names; elsewhere a name may stand for its beams.
    """

    exact = False

    def uses_merged(self, training: bool, learning: bool) -> bool:
        return False

    def passes_in(self, batch: int, training: bool) -> int:
        return 0

    def draw(
        self, num_experts: int, batch: int, tokens: int, device: torch.device, training: bool
    ) -> torch.Tensor | None:
        if self.experts is None:
            raise ValueError("use_experts: got a forward of a pack without names, expected use_experts(model, names)")
        if num_experts == 1:
            return None
        return self._chosen(batch, tokens, device, training and not self.force_merged)


class Lock:
    """An RLock that deepcopy and pickle make anew."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()


@dataclass(frozen=True)
class Entry:
    """One name of a pack.

    Attributes:
        slot: its place in every bank. ranks: of its part, by path; a layer that is absent here serves it unadapted.
        heads: paths of the modules that it brought; for the others it has the base model's.
        labels: in id order, None where the task has none. problem: problem_type of its configuration.
        centroid: of its training texts, or None. run: the values of its run file, or None: what it came from had none.
    """

    slot: int
    ranks: Mapping[str, int]
    heads: tuple[str, ...]
    labels: list[str] | None = None
    problem: str | None = None
    centroid: Centroid | None = None
    run: Mapping[str, Any] | None = None


@dataclass
class Pack:
    """Attributes: router: of every layer and head. capacity: slots of every bank. entries: by name. heads: the base
    model's own ones, by path, for names without. tied: what the base's own ones share parameters with, by path. last:
    what the last forward under "nearest" chose. tokenizer: of all names, as files by name; empty where no folder
    brought one."""

    router: PackRouter
    capacity: int
    entries: dict[str, Entry]
    heads: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    tied: dict[str, list[str]] = field(default_factory=dict, repr=False)
    lock: Lock = field(default_factory=Lock, repr=False)
    last: route.Nearest | None = field(default=None, repr=False)
    tokenizer: dict[str, bytes] = field(default_factory=dict, repr=False)
    _buffers: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False)
    _depth: int = field(default=0, repr=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """An earlier version's pickle lacks what is newer."""
        self.__dict__.update({"tied": {}, "tokenizer": {}, **state})

    def entry(self, name: str) -> Entry:
        """Raises ValueError for a name that is none."""
        if name not in self.entries:
            known = ", ".join(self.entries) or "none: the pack is empty"
            raise ValueError(f"name: got {name!r}, expected one of {known}")
        return self.entries[name]

    def slots(self, names: str | Sequence[str]) -> torch.Tensor:
        """[] or [B], int64, on the CPU. Raises ValueError for a name that is none."""
        unknown = [name for name in ([names] if isinstance(names, str) else names) if name not in self.entries]
        if unknown:
            raise ValueError(f"index: got the name {unknown[0]!r}, expected {', '.join(self.entries) or 'none: empty'}")
        if isinstance(names, str):
            return torch.tensor(self.entries[names].slot)
        return torch.tensor([self.entries[name].slot for name in names], dtype=torch.int64)

    def at(self, slots: torch.Tensor, device: torch.device) -> torch.Tensor:
        """`slots` in memory that keeps its address for its size, so that captured and compiled forwards find it."""
        key = (self._depth, tuple(slots.shape), device)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros_like(slots, device=device)
        return self._buffers[key].copy_(slots)

    def set_centroid(self, name: str | None, centroid: Centroid) -> None:
        """Raises ValueError for a name that is none."""
        if name is None:
            raise ValueError("name: got None for a pack, expected the name whose texts these are")
        with self.lock:
            self.entries[name] = dataclasses.replace(self.entry(name), centroid=centroid)

    @contextlib.contextmanager
    def use(self, model: nn.Module, chosen: str | Sequence[str], threshold: float | str | None) -> Iterator[None]:
        """use_experts of a pack; see there."""
        if threshold is not None and chosen != "nearest":
            raise ValueError(f'threshold: got {threshold!r}, expected it with "nearest" alone')
        with self.lock:
            before, self._depth = self.router.experts, self._depth + 1
            hooks: list[Any] = []
            try:
                if chosen == "nearest":
                    hooks.append(route.choose_nearest(model, self, threshold))
                elif chosen == "arrow":
                    hooks += route.choose_by_arrow(model, self)
                else:
                    self.router.experts = self.at(self.slots(chosen), device_of(model))
                yield
            finally:
                for hook in hooks:
                    hook.remove()
                self.router.experts, self._depth = before, self._depth - 1


def pack_of(model: nn.Module) -> Pack:
    """model.adamix.pack. Raises ValueError where `model` is no pack."""
    found = getattr(getattr(model, "adamix", None), "pack", None)
    if not isinstance(found, Pack):
        raise ValueError(f"model: got a {type(model).__name__} that is no pack, expected one returned by pack()")
    return found


def check_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name: got {name!r}, expected 1 to 64 of A-Z, a-z, 0-9, _, . and -, a letter or digit first")
    if name in RESERVED:
        raise ValueError(f"name: got {name!r}, which use_experts means otherwise, expected another name")
    return name
