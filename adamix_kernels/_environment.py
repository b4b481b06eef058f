"""What the process's settings say, at the price of a dictionary's lookup: a call of an op asks every time.

os.environ decodes at every look, which costs as much as half a torch.add; its table of bytes is looked into instead,
so a changed variable counts from the next call on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

_CHECK, _TABLE = "ADAMIX_CHECK", "ADAMIX_TRITON_TABLE"
_TABLE_OF_BYTES = os.name == "posix" and isinstance(getattr(os.environ, "_data", None), dict)
_raw: Mapping[Any, Any] = os.environ._data if _TABLE_OF_BYTES else os.environ  # type: ignore[attr-defined]
_check, _table, _one = (os.fsencode(s) if _TABLE_OF_BYTES else s for s in (_CHECK, _TABLE, "1"))


def checks_values() -> bool:
    """ADAMIX_CHECK=1: what costs a synchronisation is checked too."""
    return bool(_raw.get(_check) == _one)


def triton_table() -> str | None:
    """ADAMIX_TRITON_TABLE: the file of measured block sizes, or None."""
    path = _raw.get(_table)
    return os.fsdecode(path) if path is not None else None


def tf32() -> bool:
    """Whether PyTorch multiplies float32 matrices on TF32 units."""
    matmul = torch.backends.cuda.matmul
    return bool(getattr(matmul, "fp32_precision", "tf32" if matmul.allow_tf32 else "") == "tf32")
