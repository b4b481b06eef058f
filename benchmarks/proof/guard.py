"""pytest -p benchmarks.proof.guard: on a GPU, a kernel that writes where it must not, or never ends, costs one test.

After every test the GPU is waited for, so that its error is that test's. A process that the GPU no longer answers, or
whose test takes over LONGEST seconds, ends at once where xdist replaces it. Failures are told when they happen: a run
that is cut off has no summary.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Seconds of a test, the compilation of its kernels included.
LONGEST = 90.0
BROKEN, HUNG = 70, 71
_ENDS = "ADAMIX_GUARD_ENDS"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    watch = threading.Timer(LONGEST, _end, (HUNG, f"{item.nodeid} took over {LONGEST:.0f} s"))
    watch.daemon = True
    if _replaceable():
        watch.start()
    try:
        return (yield)
    finally:
        watch.cancel()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if call.excinfo is not None and _replaceable():
        why = _no_answer()
        if why is not None:
            _end(BROKEN, f"{item.nodeid}: {call.excinfo.exconly()}; the GPU no longer answers: {why}")
    return report


class _AtOnce:
    """Writes failures as they come, and why a process ended."""

    def __init__(self, terminal, ends: Path):
        self._terminal, self._ends, self._read = terminal, ends, 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        what = "ERROR" if report.when in ("setup", "teardown") else "FAILED"
        self._terminal.write_line(f"at once: {what} {report.nodeid}")
        self._terminal.write_line(report.longreprtext[-3000:])
        told = self._ends.read_text(encoding="utf-8")
        if told[self._read :]:
            self._terminal.write_line(f"ended: {told[self._read :].rstrip()}")
        self._read = len(told)

    def pytest_unconfigure(self) -> None:
        self._ends.unlink(missing_ok=True)


@pytest.hookimpl(trylast=True)  # after the terminal's own
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.getplugin("terminalreporter")
    if terminal is not None and not _replaceable():
        handle, name = tempfile.mkstemp(prefix="adamix-guard-")
        os.close(handle)
        # xdist's processes inherit it.
        os.environ[_ENDS] = name
        config.pluginmanager.register(_AtOnce(terminal, Path(name)), "adamix-at-once")


def _replaceable() -> bool:
    """Whether this is one of xdist's processes."""
    return "PYTEST_XDIST_WORKER" in os.environ


def _no_answer() -> str | None:
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        torch.rand(1, device="cuda").item()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def _end(status: int, words: str) -> None:
    """Ends this process; its own output is captured, and lost with it."""
    with contextlib.suppress(OSError, KeyError), open(os.environ[_ENDS], "a", encoding="utf-8") as told:
        told.write(f"{words}\n")
    os._exit(status)
