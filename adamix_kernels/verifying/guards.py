"""Guard bands around everything that is allocated, NaN inside: what is written beside a tensor, or not at all, shows.

PyTorch's own allocations, `aten::empty` and `aten::empty_like`, are replaced while `Guards` is entered: what Python
code and the C++ library allocate through the dispatcher alike gets a band on either side. For the child process of a
verification, and tests.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

# Bytes on either side: several cache lines, and the widest vector that a kernel writes.
BAND = 512
# What a band holds, in 16 bits: a NaN, in 32 bits too, but not that of unwritten memory, whose bits are all ones.
_WORD = 0x7FFF


class Guards:
    """with Guards("cuda") as guards: ...; afterwards guards.broken() says whose bands were written."""

    def __init__(self, device_type: str):
        self._key = "CUDA" if device_type == "cuda" else "CPU"
        self._held: list[tuple[torch.Tensor, int, int, str]] = []
        self._library: torch.library.Library | None = None

    def __enter__(self) -> Guards:
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every kernel that is replaced
            self._library.impl("empty.memory_format", self._empty, self._key)
            self._library.impl("empty_like", self._empty_like, self._key)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._library is not None
        self._library._destroy()
        self._library = None

    def new(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None, shift: int = 0
    ) -> torch.Tensor:
        """Memory for a contiguous tensor between two bands, `shift` elements off the usual alignment."""
        inside, before = math.prod(shape) * dtype.itemsize, BAND + shift * dtype.itemsize
        # A kernel of its own, not aten::empty.
        raw = torch.empty_strided((-(-(before + inside + BAND) // 2),), (1,), dtype=torch.int16, device=device)
        bytes_ = raw.fill_(_WORD).view(torch.uint8)
        bytes_[before : before + inside].fill_(255)
        made = torch.empty_strided((0,), (1,), dtype=dtype, device=device)
        strides = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
        made.set_(raw.untyped_storage(), before // dtype.itemsize, tuple(shape), strides)
        self._held.append((bytes_, before, before + inside, f"{str(dtype).removeprefix('torch.')}{list(shape)}"))
        return made

    def broken(self) -> str | None:
        """What was written beside a tensor, in words, or None. Waits for the device."""
        for raw, start, stop, name in self._held:
            want = torch.full((raw.numel() // 2,), _WORD, dtype=torch.int16, device=raw.device).view(torch.uint8)
            if not torch.equal(raw[:start], want[:start]):
                return f"wrote before the start of a tensor {name}"
            if not torch.equal(raw[stop:], want[stop:]):
                return f"wrote behind the end of a tensor {name}"
        return None

    def forget(self) -> None:
        """What was allocated so far is not looked at any more, and may be freed."""
        self._held.clear()

    def _empty_like(
        self, like: torch.Tensor, *, dtype: Any = None, device: Any = None, memory_format: Any = None, **rest: Any
    ) -> torch.Tensor:
        dtype, device = dtype or like.dtype, device or like.device
        if like.is_contiguous() and memory_format in (None, torch.preserve_format, torch.contiguous_format):
            return self._empty(like.shape, dtype=dtype, device=device, **rest)
        model = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="meta")
        strides = torch.empty_like(model, memory_format=memory_format or torch.preserve_format).stride()
        return torch.empty_strided(like.shape, strides, dtype=dtype, device=device)

    def _empty(
        self,
        size: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        layout: torch.layout | None = None,
        device: torch.device | None = None,
        pin_memory: bool | None = None,
        memory_format: Any = None,
    ) -> torch.Tensor:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if layout not in (None, torch.strided) or pin_memory or memory_format not in (None, torch.contiguous_format):
            return torch.empty_strided(
                tuple(size), torch.empty(size, device="meta").stride(), dtype=dtype, device=device
            )
        if 0 in size:
            # PyTorch's own functions resize it to what they need.
            return torch.empty_strided(tuple(size), (1,) * len(size), dtype=dtype, device=device)
        return self.new(size, dtype, device)
