"""Runs the stages of the GPU proof: each in a process of its own with its own time, so that none stops the rest."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"
# A benchmark that a contender took down goes on after it; not for ever.
ATTEMPTS = 6
POLL = 0.2  # seconds


@dataclass(frozen=True)
class Stage:
    """One command of the proof.

    seconds: how long it may take; whole: also where time is short and other stages get less. paced: it takes --seconds,
    and stops itself after so many, `spare` before its end: for imports before, and for what is in progress then. csv:
    the rows it writes as it goes; such a benchmark takes --out and --resume, and goes on after the contender that
    crashed it, or that took longer than `item_seconds`. absent: why it cannot run here (then it does not). read: its
    output -> (whether it passed, a note). okay: exit statuses that pass. skips: exit statuses that mean there was
    nothing to run.
    """

    name: str
    command: Sequence[str] = ()
    seconds: float = 60.0
    whole: bool = False
    paced: bool = False
    spare: float = 15.0
    csv: Path | None = None
    item_seconds: float = 60.0
    environment: dict[str, str] = field(default_factory=dict)
    absent: str = ""
    read: Callable[[int, str], tuple[bool, str]] | None = None
    okay: Sequence[int] = (0,)
    skips: Sequence[int] = ()


@dataclass
class Result:
    """How a stage ended: outcome, seconds, a note of one line, and the end of what it printed."""

    name: str
    outcome: str
    seconds: float
    note: str
    output: str = ""


class _Running:
    """A stage in progress."""

    def __init__(self, stage: Stage, limit: float, folder: Path, root: Path):
        self.stage, self.root = stage, root
        self.log = folder / f"{stage.name.replace('/', '_')}.log"
        self.began = time.monotonic()
        self.ends = self.began + limit
        self.starts, self.started = 0, 0.0
        self.notes: list[str] = []
        self.process: subprocess.Popen | None = None
        self._start()

    def _start(self) -> None:
        command = list(self.stage.command)
        if self.stage.csv is not None:
            command += [f"--out={self.stage.csv}", "--resume"]
        if self.stage.paced:
            spare = self.stage.spare
            left = max(1.0, self.ends - time.monotonic() - min(spare, 0.02 * spare * (self.ends - self.began)))
            command.append(f"--seconds={left:.0f}")
        self.starts += 1
        self.started = time.time()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=self.root,
                env={**os.environ, **self.stage.environment}, start_new_session=True,
            )  # fmt: skip

    def poll(self) -> Result | None:
        """The result once the stage is over; before that, keeps it going."""
        now, status = time.monotonic(), self.process.poll()
        if now > self.ends:
            self.end()
            return self._result(TIMED_OUT, "its time was used up")
        if status is None and self._hangs():
            self.end()
            status = self.process.returncode
            self.notes.append(f"one contender took longer than {self.stage.item_seconds:.0f} s")
        if status is None:
            return None
        if self._died_in_a_contender() and self.starts < ATTEMPTS and self.ends - now > 5:
            self.notes.append(f"went on after a contender ended it (exit status {status})")
            self._start()
            return None
        if status in self.stage.skips:
            return self._result(NOT_RUN, _last_line(self.output))
        passed, note = status in self.stage.okay, "" if status in self.stage.okay else f"exit status {status}"
        if self.stage.read is not None:
            passed, note = self.stage.read(status, self.output)
        elif not passed:
            note += f": {_last_line(self.output)}"
        return self._result(PASSED if passed else FAILED, note)

    def end(self) -> None:
        """Ends the process and all it started."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def _marker(self) -> Path | None:
        return None if self.stage.csv is None else self.stage.csv.with_name(self.stage.csv.name + ".now")

    def _hangs(self) -> bool:
        with contextlib.suppress(OSError):
            if self._marker is not None:
                # One from before this start only says where to go on.
                since = self._marker.stat().st_mtime
                return since >= self.started and time.time() - since > self.stage.item_seconds
        return False

    def _died_in_a_contender(self) -> bool:
        """Its marker is still there, or it says itself that the GPU no longer answers it (exit status 4)."""
        return self._marker is not None and (self._marker.exists() or self.process.returncode == 4)

    def _result(self, outcome: str, note: str) -> Result:
        output = self.output
        if outcome == TIMED_OUT and self.stage.read is not None:
            note += f"; {self.stage.read(-1, output)[1]}"
        note = "; ".join(filter(None, [note, *dict.fromkeys(self.notes)]))
        return Result(self.stage.name, outcome, time.monotonic() - self.began, note, output)


def run_together(
    stages: Sequence[Stage], factor: float, folder: Path, root: Path, on_result: Callable[[Result], None],
    on_tick: Callable[[], None],
) -> None:  # fmt: skip
    """Runs stages side by side, each for at most `factor` of its seconds, or all; calls on_result as they end."""
    running: list[_Running] = []
    try:
        for stage in stages:
            if stage.absent:
                on_result(Result(stage.name, NOT_RUN, 0.0, stage.absent))
                continue
            try:
                limit = stage.seconds if stage.whole else max(1.0, stage.seconds * factor)
                running.append(_Running(stage, limit, folder, root))
            except OSError as error:
                on_result(Result(stage.name, FAILED, 0.0, f"did not start: {error}"))
        while running:
            time.sleep(POLL)
            for one in list(running):
                try:
                    result = one.poll()
                except Exception as error:
                    # What cannot be read of one stage is no other's loss.
                    one.end()
                    words = f"{type(error).__name__}: {error}"
                    result = Result(one.stage.name, FAILED, time.monotonic() - one.began, words)
                if result is not None:
                    running.remove(one)
                    on_result(result)
            on_tick()
    finally:
        for one in running:
            one.end()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].strip("= ")[:200] if lines else ""
