"""The process in which kernels are verified, started by prover.py.

What a kernel breaks, it breaks here. It reads one line of JSON, {"machine", "jobs", "time"}, and answers in lines:
{"case": name} before each call, {"job": n, "state", "why", "seconds", "cases"} after each job. It ends when its
standard input does: with its parent.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch

from .._backends import BackendUnavailableError
from .cases import cases
from .checks import Check, tf32
from .machine import Job, Machine
from .timing import time_job
from .verdicts import CRASHED, RIGHT, UNKNOWN, WRONG

# Exit status after a kernel has broken the device for this process.
BROKEN = 3


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    machine = Machine(**request["machine"])
    if machine.setup:
        module, _, function = machine.setup.partition(":")
        getattr(importlib.import_module(module), function)()
    if machine.torch_device.type == "cuda":
        torch.cuda.set_device(machine.torch_device)
        torch.cuda.synchronize()
    else:
        torch.set_num_threads(1)
    # What is slow once in a process is no kernel's doing.
    Check(cases("merge", "any")[0], machine.torch_device, torch.float32, 0).problem("reference")
    say = _sayer(answers)
    say({"ready": True})
    for number, fields in enumerate(request["jobs"]):
        job, began = Job(*fields), time.perf_counter()
        work = time_job if request["time"] else verify
        answer = work(job, machine, lambda name: say({"case": name}))
        say({"job": number, "seconds": time.perf_counter() - began, **answer})
        if answer["state"] == CRASHED and not _device_answers(machine):
            return BROKEN
    return 0


def verify(job: Job, machine: Machine, begin: Callable[[str], None]) -> dict[str, Any]:
    """{"state", "why", "cases"} of a job."""
    device, done = machine.torch_device, 0
    on_gpu = device.type == "cuda"
    for number, case in enumerate(cases(job.op, job.shape)):
        if case.large and not on_gpu:
            continue
        for fast in (False, True) if on_gpu and job.dtype == "float32" and number < 2 else (False,):
            name = f"{case.name}, TF32" if fast else case.name
            begin(name)
            try:
                with tf32(fast):
                    wrong = Check(case, device, job.torch_dtype, number, fast).problem(job.backend)
            except (BackendUnavailableError, torch.OutOfMemoryError) as error:
                return {"state": UNKNOWN, "why": _first_line(error), "cases": done}
            except Exception as error:
                # The C++/CUDA library and Triton's loader have no class of their own for it.
                state = UNKNOWN if "out of memory" in str(error) else CRASHED
                return {"state": state, "why": f"{name}: {_first_line(error)}", "cases": done}
            if wrong is not None:
                return {"state": WRONG, "why": f"{name}: {wrong}", "cases": done}
            done += 1
    return {"state": RIGHT, "why": "", "cases": done}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _device_answers(machine: Machine) -> bool:
    if machine.torch_device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(2, device=machine.torch_device).sum().item() == 2)
    except RuntimeError:
        return False


def _sayer(answers: TextIO) -> Callable[[dict[str, Any]], None]:
    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    return say


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def run() -> None:
    """main(), and the end at once: a device that a kernel has broken need not be tidied up."""
    status = main()
    sys.stderr.flush()
    os._exit(status)
