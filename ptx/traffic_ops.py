"""The calls that `python -m ptx.traffic` counts: (title, floor in bytes or None, the call), forward before backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import adamix_kernels as ak

Call = tuple[str, int | None, Callable[[], object]]
_TOKENS = 64


@dataclass(frozen=True)
class Size:
    """rows N, features H, classes V, the dtype's name."""

    rows: int
    hidden: int
    classes: int
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name)

    @property
    def batch(self) -> tuple[int, int]:
        return self.rows // _TOKENS, _TOKENS

    def new(self, *shape: int, gradient: bool = True) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return (torch.randn(*shape, generator=generator) * 0.1).to(self.dtype).requires_grad_(gradient)

    def index(self, experts: int, by_token: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(experts)
        return torch.randint(experts, self.batch if by_token else self.batch[:1], generator=generator)


def _both(title: str, floors: tuple[int | None, int | None], forward: Callable, tensors: list) -> Iterator[Call]:
    """forward() now and its gradient then; the backward's call uses what the forward's left."""
    kept: list[torch.Tensor] = []

    def backward():
        torch.autograd.grad(kept[-1], tensors, torch.ones_like(kept[-1]))

    yield f"{title}, forward", floors[0], lambda: kept.append(forward())
    yield f"{title}, backward", floors[1], backward


def merge(size: Size) -> Iterator[Call]:
    hidden, e = size.hidden, size.dtype.itemsize
    for experts in (4, 8):
        bank, scores = size.new(experts, 16, hidden), torch.linspace(-1, 1, experts, requires_grad=True)
        one = 16 * hidden * e
        yield from _both(
            f"merge_experts, {experts} of 16x{hidden}", ((experts + 1) * one, (2 * experts + 1) * one),
            lambda bank=bank, scores=scores: ak.merge_experts(bank, scores, backend="triton"), [bank, scores],
        )  # fmt: skip
    weight, a, b = (size.new(*shape, gradient=False) for shape in ((hidden, hidden), (16, hidden), (hidden, 16)))
    yield (
        f"merge_lora, {hidden}x{hidden}, r 16", 2 * hidden * hidden * e,
        lambda: ak.merge_lora(weight, a, b, scaling=1.0, backend="triton"),
    )  # fmt: skip


def adapter(size: Size) -> Iterator[Call]:
    n, hidden, e = size.rows, size.hidden, size.dtype.itemsize
    for r, experts, by_token in ((16, 4, False), (48, 4, False), (16, 4, True), (48, 8, True)):
        x, index = size.new(*size.batch, hidden), size.index(experts, by_token)
        banks = [size.new(*shape) for shape in ((experts, r, hidden), (experts, r), (1, hidden, r), (1, hidden))]
        weights = r * hidden * (experts + 1)
        yield from _both(
            f"routed_adapter, N {n}, H {hidden}, r {r}, {experts} experts by {'token' if by_token else 'sample'}",
            (e * (2 * n * hidden + n * r + weights), e * (3 * n * hidden + n * r + 2 * weights)),
            lambda x=x, banks=banks, index=index: ak.routed_adapter(
                x, *banks, index, None, residual=x, backend="triton"
            ),
            [x, *banks],
        )  # fmt: skip


def lora(size: Size) -> Iterator[Call]:
    n, hidden, e = size.rows, size.hidden, size.dtype.itemsize
    for r, experts, by_token, dropout in ((16, 4, False, 0.1), (48, 4, False, 0.0), (16, 4, True, 0.0)):
        x, base, index = size.new(*size.batch, hidden), size.new(*size.batch, hidden), size.index(experts, by_token)
        a, b = size.new(experts, r, hidden), size.new(1, hidden, r)
        weights = r * hidden * (experts + 1)
        yield from _both(
            f"routed_lora, N {n}, {hidden} to {hidden}, r {r}, {experts} experts by "
            f"{'token' if by_token else 'sample'}, dropout {dropout}",
            (e * (3 * n * hidden + n * r + weights), e * (3 * n * hidden + n * r + 2 * weights)),
            lambda x=x, a=a, b=b, index=index, base=base, dropout=dropout: ak.routed_lora(
                x, a, b, index, None, base=base, scaling=2.0, dropout_p=dropout, seed=3, backend="triton"
            ),
            [x, a, b],
        )  # fmt: skip


def consistency(size: Size) -> Iterator[Call]:
    e = size.dtype.itemsize
    for rows, classes, detach in ((8, size.classes, True), (8, size.classes, False), (size.rows, 64, True)):
        logits = size.new(2 * rows, classes)
        labels = torch.arange(rows) % classes
        yield from _both(
            f"adamix_loss, 2 x {rows} rows of {classes}, detach_target {detach}",
            (2 * 2 * rows * classes * e, None),
            lambda logits=logits, labels=labels, detach=detach: ak.adamix_loss(
                logits, labels, detach_target=detach, backend="triton"
            ).loss,
            [logits],
        )  # fmt: skip


OPS: dict[str, Callable[[Size], Iterator[Call]]] = {
    "merge": merge,
    "adapter": adapter,
    "lora": lora,
    "consistency": consistency,
}
