"""What a process holds before and after many steps, of whole models and of every public op, with varying batches."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import adamix_kernels as ak

# Batches come in a cycle, so that two snapshots a multiple of it apart have seen the same ones.
CYCLE = 20
_BATCHES = tuple(1 + step * 7 % CYCLE for step in range(CYCLE))
_HIDDEN, _EXPERTS, _RANK = 16, 4, 4


@dataclass(frozen=True)
class Held:
    """objects: that Python's collector tracks. tensors, tensor_bytes: alive, memory that several share counted once.

    cached: entries of the package's caches. resident: bytes of the process in memory, after free memory was returned.
    """

    objects: int
    tensors: int
    tensor_bytes: int
    cached: int
    resident: int


def held(caches: Sequence[Callable] = ()) -> Held:
    """caches: of the package, that the collector does not look through (gc.freeze)."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [o for o in objects if issubclass(type(o), torch.Tensor)]
    storages = dict(filter(None, map(_memory, tensors)))
    entries = sum(cache.cache_info().currsize for cache in [*caches, *_caches(objects)])
    return Held(len(objects), len(tensors), sum(storages.values()), entries, _resident())


def _caches(objects: Iterable[object]) -> list[Callable]:
    found = (o for o in objects if type(o) is functools._lru_cache_wrapper)
    return [c for c in found if (getattr(c, "__module__", None) or "").startswith("adamix_kernels")]


def _memory(tensor: torch.Tensor) -> tuple[int, int] | None:
    """(address, bytes); None for what torch.compile traces with, which has no memory."""
    try:
        storage = tensor.untyped_storage()
        return None if storage.device.type == "meta" else (storage.data_ptr(), storage.nbytes())
    except (RuntimeError, NotImplementedError):
        return None


def growth(step: Callable[[int], None], steps: int, warm_up: int) -> Held:
    """What `steps` further steps add to what is held after `warm_up`, which has seen every size.

    Where something grew, it must grow again, in two further rounds of as many steps: the least of each counts. A leak
    grows in every round; what another thread keeps, a progress bar's or a test runner's, comes once.

    step(n): one step, whose sizes repeat after CYCLE.
    """
    gc.collect()
    caches = _caches(gc.get_objects())
    gc.freeze()  # what was there before is not looked through at every snapshot: it is most of a large process
    try:
        for n in range(warm_up):
            step(n)
        added = _round(step, steps, caches)
        for _ in range(2):
            if not any(grown(added)):
                break
            again = _round(step, steps, caches)
            added = Held(*(min(getattr(added, name), getattr(again, name)) for name in Held.__dataclass_fields__))
        return added
    finally:
        gc.unfreeze()


def _round(step: Callable[[int], None], steps: int, caches: Sequence[Callable]) -> Held:
    before = held(caches)
    before = held(caches)  # with what the first snapshot leaves, itself included: the last one sees as much
    for n in range(steps):
        step(n)
    after = held(caches)
    return Held(*(getattr(after, name) - getattr(before, name) for name in Held.__dataclass_fields__))


def training(method: str) -> Callable[[int], None]:
    """A step of AdaMix training of a small adapted network: both passes in one doubled batch, AdamW."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(_HIDDEN, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _HIDDEN), nn.Linear(_HIDDEN, 3))
    config = ak.AdaMixConfig(
        method=method, target_modules=["0", "2"], num_experts=_EXPERTS, bottleneck=_RANK, r=_RANK,
        modules_to_save=["3"], dropout=0.1 if method == "lora" else 0.0,
    )  # fmt: skip
    ak.adapt(network, config).train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)

    def step(n: int) -> None:
        batch, tokens = _BATCHES[n % CYCLE], _BATCHES[-1 - n % CYCLE]
        x, labels = torch.randn(batch, tokens, _HIDDEN), torch.randint(3, (batch, tokens))
        optimizer.zero_grad(set_to_none=True)
        ak.adamix_loss(network(ak.double_batch({"input": x})["input"]), labels).loss.backward()
        optimizer.step()

    return step


def ops(backend: str, most: int = CYCLE) -> dict[str, Callable[[int], None]]:
    """public function -> a step of its forward and backward, with other sizes and experts each time.

    most: the largest batch, and the most tokens.
    """
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, requires_grad=True)

    def size(n):
        return 1 + (_BATCHES[n % CYCLE] - 1) % most

    def rows(n):
        return size(n), size(CYCLE - 1 - n % CYCLE)

    def index(n, batch, tokens):
        return torch.randint(_EXPERTS, (batch, tokens) if n % 2 else (batch,))

    def adapter(n):
        batch, tokens = rows(n)
        x = leaf(batch, tokens, _HIDDEN)
        banks = (leaf(_EXPERTS, _RANK, _HIDDEN), leaf(_EXPERTS, _RANK), leaf(_EXPERTS, _HIDDEN, _RANK), None)
        ids = index(n, batch, tokens), index(n, batch, tokens)
        ak.routed_adapter(x, *banks, *ids, residual=x, backend=backend).sum().backward()

    def lora(n):
        batch, tokens = rows(n)
        factors = leaf(_EXPERTS, _RANK, _HIDDEN), leaf(_EXPERTS, _HIDDEN, _RANK)
        ids = index(n, batch, tokens), index(n, batch, tokens)
        x, base = leaf(batch, tokens, _HIDDEN), leaf(batch, tokens, _HIDDEN)
        dropout_p = 0.5 * size(n) / CYCLE
        ak.routed_lora(x, *factors, *ids, base=base, dropout_p=dropout_p, backend=backend).sum().backward()

    def experts(n):
        bank, scores = leaf(_EXPERTS, *rows(n)), leaf(_EXPERTS)
        ak.merge_experts(bank, scores if n % 2 else None, backend=backend).sum().backward()

    def merged(n):
        width, features = rows(n)
        factors = leaf(_EXPERTS, _RANK, features), leaf(_EXPERTS, width, _RANK)
        ak.merge_lora(leaf(width, features), *factors, scaling=0.5, backend=backend).sum().backward()

    def consistency(n):
        batch, classes = rows(n)
        ak.consistency_loss(leaf(batch, classes), leaf(batch, classes), backend=backend).backward()

    def loss(n):
        batch, classes = rows(n)
        ak.adamix_loss(leaf(2 * batch, classes), torch.randint(classes, (batch,)), backend=backend).loss.backward()

    def linear(n):
        batch, classes = rows(n)
        states, head, labels = leaf(2 * batch, _HIDDEN), leaf(classes, _HIDDEN), torch.randint(classes, (batch,))
        ak.linear_adamix_loss(states, head, labels, chunk_rows=4, backend=backend).loss.backward()

    return {
        "routed_adapter": adapter, "routed_lora": lora, "merge_experts": experts, "merge_lora": merged,
        "consistency_loss": consistency, "adamix_loss": loss, "linear_adamix_loss": linear,
    }  # fmt: skip


def by_turns(steps: dict[str, Callable[[int], None]]) -> Callable[[int], None]:
    """Every step is that of one of them, each in its turn."""
    functions = list(steps.values())
    return lambda n: functions[n % len(functions)](n // len(functions))


def grown(added: Held) -> Iterator[str]:
    """In words, what grew; nothing where nothing did. Up to RESIDENT is taken for the C library's own."""
    if added.objects > 0:
        yield f"{added.objects} Python objects"
    if added.tensors > 0 or added.tensor_bytes > 0:
        yield f"{added.tensors} tensors of {added.tensor_bytes} bytes"
    if added.cached > 0:
        yield f"{added.cached} cache entries"
    if added.resident > RESIDENT:
        yield f"{added.resident / 2**20:.1f} MiB resident"


# Less than one of the smallest objects a step that malloc hands out would be over 1,000 steps: 1 KiB each.
RESIDENT = 2**20


def _resident() -> int:
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
