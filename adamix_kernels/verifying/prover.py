"""Verifies jobs in processes of their own, with limits of time: a crash or a hang there is a verdict."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from .. import _build
from .machine import Job, Machine
from .timing import Time
from .verdicts import CRASHED, Store, Verdict, known, unknown, verdict

# Seconds: for everything, and for what one model needs; for a process to start; for one case, compilation included.
EVERYTHING, ONE_MODEL, START, ONE_CASE = 90.0, 20.0, 60.0, 15.0
MOST_PROCESSES = 4
_NAME, _ROOT = __package__.partition(".")[0], Path(__file__).parent.parent.parent
# This very copy of the package, whatever else the process finds; none of its neighbours, where it finds it by itself.
_START = f"""
import importlib.util, os, sys
root = {str(_ROOT)!r}
found = importlib.util.find_spec({_NAME!r})
if found is None or os.path.realpath(os.path.dirname(os.path.dirname(found.origin or ""))) != os.path.realpath(root):
    sys.path.insert(0, root)
from {__package__} import child
child.run()
"""

Progress = Callable[[int, int, str], None]


def prove(
    jobs: Sequence[Job],
    machine: Machine,
    store: Store,
    seconds: float = EVERYTHING,
    one_case: float = ONE_CASE,
    again: bool = False,
    progress: Progress = lambda done, total, words: None,
    processes: int | None = None,
) -> dict[Job, Verdict]:
    """The verdict of each job: from the store, else reached now and kept there.

    seconds: after which what is left stays unknown; the next call goes on there. one_case: after which a silent process
    is ended. again: verify what is known, too. processes: at a time, since compiling takes most of the time; None: one
    for two processors, MOST_PROCESSES at most.
    """
    deadline = time.monotonic() + seconds
    wanted = list(dict.fromkeys(jobs))
    found = {} if again else known(store, wanted, machine)
    if all(job in found for job in wanted):
        return {job: found[job] for job in wanted}
    progress(len(found), len(wanted), "waiting for another process that verifies")
    with store.lock(deadline) as mine:
        if not again:
            found |= known(store, [job for job in wanted if job not in found], machine)
        left = [job for job in wanted if job not in found]
        if not mine:
            why = f"another process has been verifying for {seconds:.0f} s"
            found |= {job: unknown(job, machine, why) for job in left}
        elif left:
            bar = _Bar(progress, len(found), len(wanted))
            count = min(len(left), processes or max(1, min(MOST_PROCESSES, _build.processors() // 2)))
            with ThreadPoolExecutor(count) as pool:
                parts = (left[n::count] for n in range(count))
                try:
                    # As they end: an error of one must not wait for the others.
                    running = [pool.submit(_in_turn, p, machine, store, deadline, one_case, bar) for p in parts]
                    for ended in as_completed(running):
                        found |= ended.result()
                except BaseException:  # Ctrl-C, too: the threads end with their processes
                    bar.stop()
                    raise
    return {job: found[job] for job in wanted}


class _Bar:
    """Counts what is done, for all processes together, and ends them."""

    def __init__(self, progress: Progress, done: int, total: int):
        self._progress, self._done, self._total = progress, done, total
        self._one_at_a_time = threading.Lock()
        self.children: list[Child] = []
        self.stopped = False

    def stop(self) -> None:
        """Ends every process; what they have not found out stays unknown."""
        self.stopped = True
        for child in self.children:
            child.kill()

    def __call__(self, words: str, done: int = 0) -> None:
        with self._one_at_a_time:
            self._done += done
            self._progress(self._done, self._total, words)


def _in_turn(
    jobs: Sequence[Job], machine: Machine, store: Store, deadline: float, one_case: float, bar: _Bar
) -> dict[Job, Verdict]:
    """The verdicts of all, one process after a crash."""
    found: dict[Job, Verdict] = {}
    while len(found) < len(jobs) and not bar.stopped:
        left = [job for job in jobs if job not in found]
        found |= _one_process(left, machine, store, deadline, one_case, bar)
    return found


def _one_process(
    jobs: Sequence[Job],
    machine: Machine,
    store: Store,
    deadline: float,
    one_case: float,
    bar: _Bar,
) -> dict[Job, Verdict]:
    """The verdicts up to the first crash, at least one."""
    found: dict[Job, Verdict] = {}
    with Child(jobs, machine) as child:
        bar.children.append(child)
        case, began, limit = "starting", time.monotonic(), START
        while len(found) < len(jobs):
            job, now = jobs[len(found)], time.monotonic()
            waits = min(limit, deadline - now)
            answer = child.answer(waits) if waits > 0 else None
            if bar.stopped:
                return found
            if answer is not None and "case" in answer:
                case, limit = answer["case"], one_case
                bar(f"{job}: {case}")
                continue
            if answer is not None and "ready" in answer:
                began, limit = time.monotonic(), one_case
                continue
            if answer is not None and "job" in answer:
                made = verdict(job, machine, answer["state"], answer["why"], answer["seconds"], answer["cases"])
            elif answer is None and deadline - time.monotonic() <= 0:
                return found | {job: unknown(job, machine, "time ran out before it") for job in jobs[len(found) :]}
            else:
                words = f"gave no answer within {limit:.0f} s" if answer is None else child.end_in_words()
                if case == "starting":
                    why = f"the process that verifies {words}"
                    return found | {job: unknown(job, machine, why) for job in jobs[len(found) :]}
                made = verdict(job, machine, CRASHED, f"{case}: {words}", time.monotonic() - began)
            began, case = time.monotonic(), "next"
            found[job] = made
            store.write(made, machine)
            bar(f"{job}: {made.state}", 1)
            if made.state == CRASHED and (answer is None or "end" in answer or not child.alive()):
                break
    return found


class Child:
    """child.py with a list of jobs, ended at the latest when it is left."""

    def __init__(self, jobs: Sequence[Job], machine: Machine, time_them: bool = False):
        self._request = {"machine": asdict(machine), "jobs": [list(job) for job in jobs], "time": time_them}

    def __enter__(self) -> Child:
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            start_new_session=True,
        )
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(self._request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; its end is an answer
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next answer, {"end": True} after the last one; None: there was none for so long."""
        try:
            return self._answers.get(timeout=seconds)
        except queue.Empty:
            return None

    def kill(self) -> None:
        """Ends it now."""
        self._process.kill()

    def alive(self) -> bool:
        """Whether it goes on: not a moment after the device broke for it."""
        try:
            self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            return True
        return False

    def end_in_words(self) -> str:
        """How the process ended, and the last thing it said of that."""
        status = self._process.wait()
        how = f"ended with status {status}"
        if status < 0:
            try:
                how = f"was ended by {signal.Signals(-status).name}"
            except ValueError:
                how = f"was ended by signal {-status}"
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 4096))
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f"{how}: {lines[-1][:300]}" if lines else how

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._answers.put(json.loads(line))
        except (ValueError, OSError):
            pass
        self._answers.put({"end": True})


def times(
    jobs: Sequence[Job], machine: Machine, store: Store, seconds: float, again: bool = False
) -> dict[Job, dict[str, Time]]:
    """Of each contest ("a+b+reference" as its backend) the times by backend: from the store, else taken now.

    What crashes or takes too long is left out, and the table's choice stays.
    """
    deadline, found = time.monotonic() + seconds, {}
    for job in jobs:
        record = None if again else store.read_record(machine.key(job))
        if record is not None and isinstance(record.get("times"), dict):
            found[job] = {name: Time(*both) for name, both in record["times"].items()}
    left = [job for job in jobs if job not in found]
    if not left:
        return found
    with Child(left, machine, time_them=True) as child:
        while left and deadline > time.monotonic():
            answer = child.answer(deadline - time.monotonic())
            if answer is None or "end" in answer:
                break
            if answer.get("state") == "timed":
                job = left.pop(0)
                store.write_record(machine.key(job), {"times": answer["why"]})
                found[job] = {name: Time(*both) for name, both in answer["why"].items()}
    return found
