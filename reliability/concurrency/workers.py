"""DataLoader workers forked from a process whose ops, and their threads, have run already."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from adamix_kernels import consistency_loss, merge_experts, routed_adapter, routed_lora

from ..children import Child
from ..record import Figure

_ITEMS, _WORKERS, _LIMIT = 12, 2, 60  # seconds for one batch


class Computed(Dataset):
    """Items that are results of the ops, computed where the item is asked for."""

    def __len__(self) -> int:
        return _ITEMS

    def __getitem__(self, number: int) -> torch.Tensor:
        return results(number)[0]


def results(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(every op's result in one row, the gradient of its sum), from a generator of its own."""
    generator = torch.Generator().manual_seed(number)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, down, up = some(4, 64, 32).requires_grad_(), some(3, 8, 32), some(3, 32, 8)
    index = torch.randint(3, (4,), generator=generator)
    adapter = routed_adapter(x, down, some(3, 8), up, some(3, 32), index, index)
    lora = routed_lora(x, down, up, index, index, base=adapter)
    loss = consistency_loss(lora, adapter.detach(), reduction="none")
    out = torch.cat([lora.flatten(), loss.flatten(), merge_experts(down, some(3)).flatten()])
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


def figures() -> Iterator[Figure]:
    start = time.perf_counter()
    child = Child(compare)
    same, of = child.next_message()
    ended = child.end() == 0
    yield Figure(
        f"{_WORKERS} DataLoader workers forked after forward and backward on 2 threads; the ops run in them too",
        f"{same} of {of} items with the parent's bits, in two epochs",
        f"{of}",
        ended and same == of == 2 * _ITEMS,
        time.perf_counter() - start,
    )


def compare(send: Callable) -> None:
    """The parent uses two threads, as a training does, before it forks; one would leave nothing to inherit."""
    torch.set_num_threads(2)
    big = torch.randn(256, 256)
    (big @ big).sum()
    wanted = [results(number)[0] for number in range(_ITEMS)]
    loader = DataLoader(Computed(), num_workers=_WORKERS, multiprocessing_context="fork", timeout=_LIMIT)
    same = 0
    for _ in range(2):
        for item, want in zip(loader, wanted, strict=True):
            same += torch.equal(item[0], want)
            results(0)  # the parent goes on meanwhile
    send((same, 2 * _ITEMS))
