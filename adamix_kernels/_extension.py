"""The compiled C++/CUDA library: whether it is there, and if not, why not."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


@functools.cache
def library_path() -> Path | None:
    """The shared object built by setup.py beside this file, or None."""
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    return found[0] if found else None


@functools.cache
def problem() -> str | None:
    """Why the compiled library cannot be used in this process, or None once it is loaded."""
    path = library_path()
    if path is None:
        return "the C++/CUDA library was not built into this installation"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} did not load: {error}"
    return None
