"""What a training forward of several names consists of: whose rows lie where, and what each name draws for itself."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass
class Block:
    """The rows of one name, side by side: all of pass 1, then all of pass 2.

    Attributes:
        name, start, stop: whose rows these are, and where. columns: of its head, where other names' are more.
        generator: of everything that its rows draw at random in this forward.
        head: path -> the module trained whole. seeds: path -> (probability, seed) of LoRA's dropout.
    """

    name: str
    start: int
    stop: int
    generator: torch.Generator
    head: dict[str, Callable[..., torch.Tensor]]
    seeds: dict[str, tuple[float, torch.Tensor]]
    columns: int | None = None


@dataclass
class Mix:
    """The forward that runs now. index: path -> expert of each row, [2, rows]: of the down and of the up side."""

    blocks: list[Block] = field(default_factory=list)
    index: dict[str, torch.Tensor] = field(default_factory=dict)
    current: list[Block] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self, blocks: list[Block], index: dict[str, torch.Tensor]) -> Iterator[None]:
        """Until the backward is over: what is recomputed there finds the same."""
        self.blocks, self.index, self.current = blocks, index, blocks
        try:
            yield
        finally:
            self.blocks, self.index, self.current = [], {}, []

    def rows_of(self, path: str, rows: int) -> torch.Tensor:
        """[2, rows]: the experts at `path`, where a sample may be several rows."""
        if not self.blocks:
            raise ValueError(
                "model: got a forward of a pack that is being trained, expected PackTrainer.step, or `with "
                'trainer.alone("name") as model`, which computes what that name does'
            )
        index = self.index[path]
        copies, rest = divmod(rows, index.shape[1])
        if rest:
            raise ValueError(f"{path}: got {rows} rows for {index.shape[1]} samples, expected a multiple of them")
        return index if copies == 1 else index.repeat_interleave(copies, 1)

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [rows, ...] by block; a sample may be several rows, one after the other."""
        blocks, rows = self.current, self.current[-1].stop - self.current[0].start
        if not x.dim() or x.shape[0] % rows:
            raise ValueError(f"model: got a tensor of shape {tuple(x.shape)}, expected {rows} samples first")
        each = x.shape[0] // rows
        return list(x.split([each * (block.stop - block.start) for block in blocks]))


def generator_of(device: torch.device, *facts: object) -> torch.Generator:
    """A generator that depends on `facts` alone."""
    digest = hashlib.sha256("/".join(map(str, facts)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class OwnDropout(TorchFunctionMode):
    """Within it every dropout of the base and of the heads draws for each name from that name's own generator.

    What attention drops inside scaled_dot_product_attention is computed by the formula, softmax(q k^T) v.
    """

    def __init__(self, mix: Mix, recomputes: bool):
        super().__init__()
        self.mix, self.recomputes = mix, recomputes

    def __torch_function__(
        self, function: Any, _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout:
            return self._dropout(*args, **kwargs)
        if function is F.scaled_dot_product_attention and (kwargs.get("dropout_p") or (args[4:5] or (0,))[0]):
            return self._attention(*args, **kwargs)
        return function(*args, **kwargs)

    def _dropout(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or p == 0:
            return x
        if self.recomputes:
            raise ValueError(
                "model: got activation checkpointing and dropout in the base, expected one of them: the recomputation "
                "would drop other units. Set the dropout of the model's configuration to 0"
            )
        del inplace  # the same values
        parts = self.mix.split(x)
        keep = [
            torch.empty_like(part, memory_format=torch.contiguous_format).bernoulli_(1 - p, generator=block.generator)
            for part, block in zip(parts, self.mix.current, strict=True)
        ]
        return x * torch.cat(keep).div_(1 - p)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if enable_gqa:
            copies = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(copies, -3), value.repeat_interleave(copies, -3)
        scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -torch.inf)
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
        return self._dropout(torch.ops.aten._safe_softmax(scores, -1), dropout_p) @ value
