"""backend="auto" = verified on this GPU, and preferred by a table: adamix_kernels.verify(), and what calls it.

machine.py says what a verdict is about, cases.py what is run, checks.py and guards.py what must hold, child.py where it
runs, prover.py with what limits, verdicts.py where verdicts are kept, table.py what is preferred, ranks.py how
processes agree, proof.py what ADAMIX_AUTO asks for, timing.py what ADAMIX_AUTO=time does. Only this file changes what
"auto" takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .. import _auto, _backends
from .._backends import BackendState
from ..ops._direct import traced
from . import prover, ranks, table
from .machine import DTYPES, KERNELS, Job, Machine, jobs
from .proof import VARIABLE, Proof
from .proof import mode as mode
from .verdicts import CRASHED, UNKNOWN, WRONG, Store, Verdict, unknown

__all__ = ["Report", "Verdict", "backends", "verify"]

# Python that was forked has half of its parent's CUDA, and verifies nothing.
_forked = False
_told: set[str] = set()


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Report:
    """What `verify` found out.

    verdicts: of every job. chosen: (GPU, op, dtype, shape class) -> what "auto" takes from now on. problem: why nothing
    could be verified, or None. seconds: that it took.
    """

    verdicts: tuple[Verdict, ...]
    chosen: dict[tuple[str, str, str, str], str]
    problem: str | None = None
    seconds: float = 0.0

    def of(self, state: str) -> list[Verdict]:
        """The verdicts of one state: "right", "wrong", "crashed", "unknown"."""
        return [verdict for verdict in self.verdicts if verdict.state == state]


def verify(
    *,
    ops: Sequence[str] = tuple(_auto.SHAPES),
    dtypes: Sequence[torch.dtype] | None = None,
    backends: Sequence[str] = KERNELS,
    seconds: float = prover.EVERYTHING,
    again: bool = False,
    progress: prover.Progress = lambda done, total, words: None,
) -> Report:
    """Verifies the kernels on every kind of GPU that this process sees; "auto" takes what is right and preferred there.

    A process of its own runs every kernel forward and backward against the reference in float64: tails, one row, unused
    experts, misaligned and strided inputs, large values; with guard bands around every allocation and NaN in it, twice
    for equal bits, once replayed from a CUDA graph. What it finds out is kept in the cache folder (ADAMIX_CACHE), so
    that it is done once; calls of ops only look the result up.

    Args:
        ops: of "routed_adapter", "routed_lora", "gated_adapter", "gated_lora" (the same with gates), "merge",
            "consistency". dtypes: of torch.float16, torch.bfloat16, torch.float32; None for all. backends: of "triton",
            "cuda".
        seconds: after which what is left stays unknown, on each kind of GPU.
        again: verify what has a verdict, too.
        progress: called with (jobs done, of how many, what runs now).

    ADAMIX_AUTO=off: "auto" takes the reference; table: what is not verified yet stays so, no process is started;
    verify: as above, the default; time: kernels are also timed, and one that beats the table's takes its place.

    Raises:
        ValueError: an argument, or ADAMIX_AUTO, is another word.
        RuntimeError: it is called while a CUDA graph is captured, a compiler traces, or in a forked process.

    Example:
        >>> verify(dtypes=[torch.float32], seconds=20).of("wrong")  # none; all of it: verify()
        []
    """
    for name, given, allowed in (("ops", ops, tuple(_auto.SHAPES)), ("backends", backends, KERNELS)):
        for word in given:
            if word not in allowed:
                raise ValueError(f"{name}: got {word!r}, expected some of {', '.join(map(repr, allowed))}")
    names = DTYPES if dtypes is None else tuple(map(_name, dtypes))
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"dtypes: got {name}, expected some of {', '.join(DTYPES)}")
    mode()
    reason = _not_now()
    if reason is not None:
        raise RuntimeError(f"verify: {reason}")
    machines = _machines()
    if not machines:
        why = "torch sees no GPU"
        return Report((), {}, why)
    wanted = jobs(tuple(ops), names, tuple(backends))
    return settle([(machine, wanted) for machine in machines], seconds=seconds, again=again, progress=progress)


def verify_for(device: torch.device, needs: Iterable[tuple[str, torch.dtype, int]]) -> Report | None:
    """Verifies what one model needs, (op, dtype, size) of each, on its device, if that is a GPU and now is the time.

    Never an error and never a hang: where something is in the way, "auto" stays the reference, with one warning.
    """
    if mode() == "off" or device.type != "cuda":
        return None
    reason = _not_now()
    if reason is not None:
        _tell(f'"auto" stays as it was: {reason}')
        return None
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return verify_on(Machine.of(device), needs)


def verify_on(
    machine: Machine,
    needs: Iterable[tuple[str, torch.dtype, int]],
    *,
    seconds: float = prover.ONE_MODEL,
    one_case: float = prover.ONE_CASE,
    group: ranks.Ranks | None = None,
) -> Report | None:
    """verify_for on a machine that may be a stand-in. None: this process has chosen all of it before."""
    wanted = {(op, dtype, _auto.shape_class(op, size)): None for op, dtype, size in needs if _name(dtype) in DTYPES}
    device, choices = machine.torch_device, _auto.table.choices
    left = [(op, dtype, shape) for op, dtype, shape in wanted if (op, device, dtype, shape) not in choices]
    if not left:
        return None
    asked = [Job(op, backend, _name(dtype), shape) for op, dtype, shape in left for backend in KERNELS]
    try:
        return settle([(machine, asked)], seconds=seconds, preferred_only=True, one_case=one_case, group=group)
    except Exception as error:
        _tell(f'"auto" stays the reference: {type(error).__name__}: {error}')
        return None


def settle(
    wanted: Sequence[tuple[Machine, Sequence[Job]]],
    *,
    seconds: float,
    again: bool = False,
    preferred_only: bool = False,
    one_case: float = prover.ONE_CASE,
    progress: prover.Progress = lambda done, total, words: None,
    store: Store | None = None,
    group: ranks.Ranks | None = None,
) -> Report:
    """Verifies jobs on machines, as ADAMIX_AUTO says, and freezes what "auto" takes there.

    preferred_only: only what the table would take, and its second choice only where the first is not right. group: the
    processes that choose alike; None: those of torch.distributed.
    """
    began, verdicts = time.monotonic(), list[Verdict]()
    chosen: dict[tuple[str, str, str, str], str] = {}
    for machine, given in wanted:
        try:
            together = group or ranks.met()
        except RuntimeError as error:
            _tell(f'"auto" stays the reference: {error}')
            return Report(tuple(verdicts), chosen, str(error), time.monotonic() - began)
        asked = [job for job in given if _problem(job, machine) is None]
        asked = table.jobs_of(machine, asked) if preferred_only else asked
        prove = Proof(machine, store or Store(), seconds, one_case, again, preferred_only, progress)
        found = prove(asked) if together is None else together.verdicts(machine, asked, seconds, prove)
        keys = dict.fromkeys((job.op, job.dtype, job.shape) for job in given)
        mine: ranks.Choices = {key: table.REFERENCE for key in keys}
        if found is None:
            assert together is not None
            together.give_up()
            _tell('"auto" stays the reference: other processes of this job have not come to verify, or not answered')
            found = [unknown(job, machine, "the processes of this job did not agree") for job in asked]
        else:
            made = table.choices(machine, found, prove.faster(found) if together is None else {})
            mine = {key: made.get(key, table.REFERENCE) for key in keys}
            mine = mine if together is None else together.agree(mine, seconds)
            _tell_of(machine, found)
        _auto.freeze(
            {
                (op, device, getattr(torch, dtype), shape): backend
                for (op, dtype, shape), backend in mine.items()
                for device in _alike(machine)
            }
        )
        chosen |= {(machine.name, *key): backend for key, backend in mine.items()}
        verdicts += found
    return Report(tuple(verdicts), chosen, None, time.monotonic() - began)


def backends() -> dict[str, BackendState]:
    """The state of every backend: name -> BackendState(usable, ops, reason, verdicts).

    The verdicts are those of this machine's GPUs that the cache folder holds: right, wrong or crashed, since when and
    why; what is usable and has none is unknown. Nothing is launched and no optional package is imported that is not
    installed.

    Example:
        >>> list(backends())
        ['reference', 'triton', 'cuda']
    """
    made, store = _backends.backends(), Store()
    for name in KERNELS:
        if made[name].usable:
            found = tuple(
                store.read(job, machine) or unknown(job, machine, "not verified on this GPU yet: adamix verify")
                for machine in _machines()
                for job in jobs(backends=(name,))
            )
            made[name] = dataclasses.replace(made[name], verdicts=found)
    return made


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _problem(job: Job, machine: Machine) -> str | None:
    # A stand-in's kernels are at hand in its own process alone.
    return None if machine.setup else _backends.problem(job.op, job.backend, machine.torch_device, job.torch_dtype)


def _machines() -> list[Machine]:
    """One for each kind of GPU that this process sees."""
    kinds: dict[str, Machine] = {}
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        # A GPU that does not answer is for `adamix env` to tell of.
        with contextlib.suppress(RuntimeError, AssertionError):
            machine = Machine.of(number)
            kinds.setdefault(machine.name, machine)
    return list(kinds.values())


def _alike(machine: Machine) -> list[torch.device]:
    """The devices that a machine's verdicts are about."""
    device = machine.torch_device
    if device.type != "cuda":
        return [device]
    every = range(torch.cuda.device_count())
    return [torch.device("cuda", n) for n in every if torch.cuda.get_device_properties(n).name == machine.name]


def _not_now() -> str | None:
    """Why nothing can be verified or chosen at this moment, or None."""
    if _forked:
        return "this process was forked from one that verifies; verify there"
    if traced():
        return "a compiler or a dispatch mode is tracing; verify before"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured; verify before"
    return None


def _tell_of(machine: Machine, found: Sequence[Verdict]) -> None:
    bad = [verdict for verdict in found if verdict.state in (WRONG, CRASHED)]
    late = [verdict for verdict in found if verdict.state == UNKNOWN and verdict.why and VARIABLE not in verdict.why]
    if bad:
        _tell(
            f'{machine.name}: {len(bad)} kernels are not used by "auto": {bad[0].job} is {bad[0].state} '
            f"({bad[0].why}); `adamix verify --export FILE` writes all of it down for an issue"
        )
    elif late:
        _tell(f'{machine.name}: {len(late)} kernels are not verified, so "auto" does not use them: {late[0].why}')


def _tell(words: str) -> None:
    """Once a process."""
    if words not in _told:
        _told.add(words)
        warnings.warn(words, RuntimeWarning, stacklevel=3)
