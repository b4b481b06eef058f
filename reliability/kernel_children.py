"""Processes in which the Triton kernels are interpreted, or the CUDA kernels run on the CPU: both are set at import."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamix_kernels import backends

BACKENDS = ("reference", "triton", "cuda")
_ROOT = Path(__file__).parent.parent
_HOST_LIBRARY = _ROOT / "build" / "csrc" / "adamix_host_plain.so"


@dataclass(frozen=True)
class Shared:
    """Backends shared out: here: to measure in this process; children: backend -> a process; missing: -> the reason."""

    wanted: tuple[str, ...]
    here: tuple[str, ...]
    children: dict[str, subprocess.Popen]
    missing: dict[str, str]

    def said(self, measured: Sequence[str]) -> str:
        """`measured`, and why the others are not in it."""
        return ", ".join(measured) + "".join(f"; {name}: {reason}" for name, reason in self.missing.items())


def share_out(module: str, size: str, only: Sequence[str] | None = None) -> Shared:
    """Starts `python -m module BACKEND SIZE` for the backends that this process does not have.

    only: the backends to measure; None for all of them in full, and in small for those this process has.
    """
    usable = {name for name, state in backends().items() if state.usable}
    wanted = tuple(only or [name for name in BACKENDS if size == "full" or name in usable])
    children, missing = {}, {}
    for name in wanted:
        if name in usable:
            continue
        found = environment(name)
        if isinstance(found, str):
            missing[name] = found
        else:
            children[name] = start(module, name, size, variables=found)
    return Shared(wanted, tuple(name for name in wanted if name in usable), children, missing)


def environment(backend: str) -> dict[str, str] | str:
    """The variables under which a child has `backend`, or what is missing for that."""
    mine = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return 'needs pip install triton==3.6.0 "numpy<2.4"'
        return mine | {"TRITON_INTERPRET": "1"}
    if backend == "cuda":
        library = Path(os.environ.get("ADAMIX_CUDA_HOST") or _HOST_LIBRARY)
        if not library.exists():
            return f"needs {library.name}, which python -m adamix_kernels._build --host plain builds"
        mine |= {"ADAMIX_CUDA_HOST": str(library)}
    return mine


def start(module: str, *arguments: str, variables: dict[str, str]) -> subprocess.Popen:
    """`python -m module arguments`, whose output is JSON."""
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", module, *arguments]
    return subprocess.Popen(command, env=variables, cwd=_ROOT, stdout=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen) -> Any:
    """What a child printed last. Raises RuntimeError where it failed; its own words went to stderr."""
    output, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{' '.join(child.args)} exited with {child.returncode}; it says why above")
    return json.loads(output.splitlines()[-1])
