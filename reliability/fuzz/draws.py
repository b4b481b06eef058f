"""What hypothesis draws for every op: sizes, dtypes, layouts in memory, values, expert ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

NAN, INF = float("nan"), float("inf")
HALVES_AND_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
ALL_FLOATS = (*HALVES_AND_FLOAT, torch.float64)
# Of weights and incoming gradients: what infinity times a slope of zero gives is nobody's promise.
FINITE = ("normal", "normal", "normal", "zeros", "huge", "tiny", "one huge")
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded", "misaligned")
ALIGNED = tuple(name for name in LAYOUTS if name not in ("sliced", "misaligned"))
# Experts and rank of more columns than one tile holds.
MANY = 17, 16
# The most frequent first; one infinity or NaN, so that what it must not reach stays comparable.
VALUES = ("normal", "normal", "normal", "zeros", "huge", "tiny", "one huge", "infinity", "nan")


@dataclass(frozen=True)
class Sizes:
    """The largest batch, tokens, features, rank and number of classes that are drawn; 0 and 1 always are.

    more_rows: tokens (of a loss: rows) that every call has besides, for the ways that only many take.
    """

    batch: int = 3
    tokens: int = 4
    features: int = 9
    rank: int = 5
    classes: int = 40
    more_rows: int = 0


class Draw:
    """Draws on behalf of one case: choices by hypothesis, numbers by a generator that hypothesis seeds."""

    def __init__(self, draw, dtypes):
        self._draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
        self.dtype = self.choose(dtypes)
        self.layouts = LAYOUTS
        self.said: list[str] = [str(self.dtype)]

    def choose(self, options):
        return self._draw(st.sampled_from(options))

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def size(self, high: int) -> int:
        """0 to high; 0 rarely enough that most calls compute something."""
        return max(0, self._draw(st.integers(0, 3 * high + 2)) + 2) // 3

    def flag(self) -> bool:
        return self._draw(st.booleans())

    def mostly(self) -> bool:
        return self._draw(st.integers(0, 7)) > 0

    def mostly_aligned(self) -> None:
        """For ways that take nothing misaligned: of several tensors that each may be so, most calls have one."""
        self.layouts = ALIGNED if self.mostly() else LAYOUTS

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def tensor(self, name: str, *shape: int, values=VALUES, layouts=None, dtype=None, huge=None) -> torch.Tensor:
        """A floating tensor of drawn values in a drawn layout; what surrounds it in memory is NaN.

        huge: the scale of huge values; by default one whose products stay within the dtype.
        """
        kind, layout = self.choose(values), self.choose(layouts or self.layouts)
        t = self.randn(*shape, dtype=dtype)
        t = lay_out(fill(t, kind, huge or (3.0 if t.dtype == torch.float16 else 1e4)), layout)
        self.said.append(f"{name} {tuple(shape)} {kind} {layout}")
        return t

    def incoming(self, *shape: int) -> torch.Tensor:
        """The gradient of an output."""
        return self.tensor("incoming", *shape, values=FINITE)

    def index(
        self, name: str, experts: int, batch: int, tokens: int, kinds: tuple[str, ...] = ("sample", "token")
    ) -> torch.Tensor | None:
        """Expert ids of a drawn pattern; None now and then where the bank holds one expert."""
        kind = self.choose((*kinds, *kinds, "none") if experts == 1 else kinds)
        if kind == "none":
            return None
        return self.ids(f"{name} {kind}", experts, *((batch,) if kind == "sample" else (batch, tokens)))

    def ids(self, name: str, experts: int, *shape: int) -> torch.Tensor:
        """Expert ids of a drawn pattern, dtype and layout."""
        pattern = self.choose(("any", "any", "all one", "last", "some unused", "in turn"))
        dtype = self.choose((torch.int32, torch.int64))
        layout = self.choose(("contiguous", "strided", "expanded", "transposed"))
        if pattern == "any":
            ids = torch.randint(experts, shape, generator=self.generator)
        elif pattern == "in turn":
            ids = (torch.arange(torch.Size(shape).numel()) % experts).view(shape)
        elif pattern == "some unused":
            ids = torch.randint((experts + 1) // 2, shape, generator=self.generator) * 2
            ids = ids.clamp_(max=experts - 1)
        else:
            one = experts - 1 if pattern == "last" else self.integer(0, experts - 1)
            ids = torch.full(shape, one)
        self.said.append(f"{name} {tuple(shape)} {pattern} {dtype} {layout}")
        return lay_out(ids.to(dtype), layout)


def fill(t: torch.Tensor, kind: str, huge: float) -> torch.Tensor:
    """Normal numbers t turned into the values of a kind; a new tensor, or t overwritten."""
    if kind == "zeros":
        return t.zero_()
    if kind == "huge":
        return t.mul_(huge)
    if kind == "tiny":
        return t.mul_(1e-6 if t.dtype != torch.float16 else 1e-2)  # whose rounding below 6e-5 is no longer relative
    if kind in ("one huge", "infinity", "nan") and t.numel():
        at = t.numel() // 2
        t.view(-1)[at] = {"one huge": huge, "infinity": INF, "nan": NAN}[kind]
    return t


def lay_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of t in another place; "expanded" repeats the first entry of an axis, which changes them."""
    if t.dim() == 0 or layout == "contiguous":
        return t.contiguous()
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.nn.functional.pad(t, (1, 2), value=_outside(t))[..., 1:-2]
    if layout == "strided":
        return torch.stack([t, torch.full_like(t, _outside(t))], -1)[..., 0]
    if layout == "expanded":
        axis = t.dim() // 2
        return t.narrow(axis, 0, min(1, t.shape[axis])).expand(t.shape)
    whole = torch.full((t.numel() + 1,), _outside(t), dtype=t.dtype)
    whole[1:] = t.reshape(-1)
    return whole[1:].view(t.shape)


def _outside(t: torch.Tensor):
    """What nobody may read: NaN, or an expert id that no bank has."""
    return NAN if t.is_floating_point() else 10**6 + 7
