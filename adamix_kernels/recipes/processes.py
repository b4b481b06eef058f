"""One launch of several processes (torchrun, accelerate launch): the first writes, and all do the same."""

from __future__ import annotations

import os
from typing import Any, TypeVar

T = TypeVar("T")


def count() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join(use_cpu: bool) -> None:
    """Starts the process group, where there are several processes; nothing in one process."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=use_cpu)


def agree(value: T) -> T:
    """The first process's value, on all. After join()."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    values: list[Any] = [value]
    agreed: T = broadcast_object_list(values, from_process=0)[0]
    return agreed
