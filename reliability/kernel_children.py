"""Processes in which the Triton kernels are interpreted, or the CUDA kernels run on the CPU: both are set at import."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BACKENDS = ("reference", "triton", "cuda")
_ROOT = Path(__file__).parent.parent
_HOST_LIBRARY = _ROOT / "build" / "csrc" / "adamix_host_plain.so"


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
