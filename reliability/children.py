"""Child processes that are there to be killed: forked from a server that has everything imported already."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = 120.0  # seconds; a child that takes longer hangs
_IMPORTED = ("adamix_kernels", "adamix_kernels.models.trainer", "reliability.small_models", "torch.distributed")


def context() -> multiprocessing.context.ForkServerContext:
    """A fork of this process would do, but for PyTorch, which refuses to run backward in one."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(_IMPORTED))
    return server


class Child:
    """`work(*args, send)` in a process of its own; send(value) hands `value` to messages()."""

    def __init__(self, work: Callable, *args: Any, env: dict[str, str] | None = None):
        server = context()
        self._received, sender = server.Pipe(duplex=False)
        self.process = server.Process(target=_run, args=(work, args, env or {}, sender))
        self.process.start()
        sender.close()

    def messages(self) -> list[Any]:
        """Everything sent so far."""
        found = []
        try:
            while self._received.poll(0):
                found.append(self._received.recv())
        except EOFError:
            pass
        return found

    def next_message(self, timeout: float = TIMEOUT) -> Any:
        """Waits for one. Raises RuntimeError when none comes."""
        try:
            if self._received.poll(timeout):
                return self._received.recv()
        except EOFError:
            pass
        raise RuntimeError(f"child: no message in {timeout} s; its exit status is {self.process.exitcode}")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self, timeout: float = TIMEOUT) -> int | None:
        """Its exit status, negative for a signal; None, and it is killed, when it does not end in time."""
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            self.kill()
        return status


def killed(status: int | None) -> bool:
    return status == -signal.SIGKILL


def kill_self() -> None:
    """As abrupt as from outside: no handler, no finally, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def _run(work: Callable, args: tuple, env: dict[str, str], sender: Connection) -> None:
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    work(*args, sender.send)
