"""One launch of several processes (torchrun, accelerate launch): the first writes, and all do the same."""

from __future__ import annotations

import os
from typing import Any, TypeVar

T = TypeVar("T")


def count() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process prints and writes: the first of a launch (torchrun and accelerate set RANK), or alone."""
    return int(os.environ.get("RANK", "0")) == 0


def on_cpus(use_cpu: bool) -> bool:
    """What TrainingArguments.use_cpu must be: without it, and without a GPU, each process would train for itself."""
    import torch

    return use_cpu or (count() > 1 and not torch.cuda.is_available())


def join(use_cpu: bool) -> None:
    """Starts the process group, where there are several processes; nothing in one process.

    Raises ValueError where accelerate does not make one of them.
    """
    if count() == 1:
        return
    from accelerate import PartialState

    state = PartialState(cpu=on_cpus(use_cpu))
    if state.num_processes != count():
        raise ValueError(
            f"WORLD_SIZE: got a launch of {count()} processes of which accelerate joins {state.num_processes}, "
            "expected all: a GPU for each, or --use_cpu (adamix recipe run: --set training.use_cpu true)"
        )


def agree(value: T) -> T:
    """The first process's value, on all. After join()."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    values: list[Any] = [value]
    agreed: T = broadcast_object_list(values, from_process=0)[0]
    return agreed
