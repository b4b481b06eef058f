"""Merging all experts of a model, one bank with scores, and LoRA into its base weights, against torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from adamix_kernels import merge_experts
from adamix_kernels.ops.merge.api import LoraLayer, merge_banks, merge_lora_banks

from .. import sizes
from ..sizes import BankSize, LoraSize
from .cases import Case, Contender, Draw, Inputs, compiled, of, ours

SCALING = 2.0


def cases(which: str, device: torch.device) -> Iterator[Case]:
    """sizes.MERGE_BANKS (every bank of a model), MERGE_EXPERTS (with gradients) and MERGE_LORA."""
    smoke = which == "smoke"
    for size in sizes.MERGE_BANKS[which]:
        dtype = getattr(torch, size.dtype)
        parameters = size.layers * (2 * size.rank * size.hidden + size.rank + size.hidden)
        yield Case(
            op="merge_banks",
            shape=size.words,
            dtype=dtype,
            make=functools.partial(_banks, size),
            plain=_means,
            contenders=_bank_contenders(device, smoke=smoke),
            # M experts read, one written.
            traffic={"forward": (size.experts + 1.0) * parameters * dtype.itemsize},
        )
    for size in sizes.MERGE_EXPERTS[which]:
        dtype = getattr(torch, size.dtype)
        moved = float(size.rank * size.hidden * dtype.itemsize)
        yield Case(
            op="merge_experts",
            shape=size.words,
            dtype=dtype,
            make=functools.partial(_scored, size),
            plain=_weighted_mean,
            contenders=[
                *ours("merge", device, lambda backend: functools.partial(merge_experts, backend=backend)),
                of("weighted_mean", _weighted_mean),
                compiled("compile_weighted_mean", _weighted_mean, smoke=smoke),
                of("baddbmm", _scored_baddbmm),
            ],
            # The bank and the mean; dy, the bank, its gradient.
            traffic={
                "forward": (size.experts + 1) * moved,
                "backward": (2 * size.experts + 1) * moved,
                "both": (3 * size.experts + 2) * moved,
            },
        )
    for size in sizes.MERGE_LORA[which]:
        dtype = getattr(torch, size.dtype)
        yield Case(
            op="merge_lora",
            shape=size.words,
            dtype=dtype,
            make=functools.partial(_lora, size),
            plain=_lora_plain,
            contenders=[*ours("merge", device, _ours_lora), of("baddbmm", _lora_baddbmm)],
            traffic={"forward": 2.0 * size.batch * size.width * size.features * dtype.itemsize},
            operations={"forward": 2.0 * size.batch * size.width * size.features * size.rank},
        )


def _banks(size: BankSize, draw: Draw) -> Inputs:
    made = []
    for _ in range(size.layers):
        for shape in ((size.rank, size.hidden), (size.rank,), (size.hidden, size.rank), (size.hidden,)):
            made.append(draw.normal(size.experts, *shape))
    return Inputs(tuple(made))


def _scored(size: BankSize, draw: Draw) -> Inputs:
    bank = draw.normal(size.experts, size.rank, size.hidden)
    return Inputs((bank, draw.normal(size.experts)), (), draw.normal(size.rank, size.hidden))


def _lora(size: LoraSize, draw: Draw) -> Inputs:
    """`batch` layers: weight [N, K], A [M, r, K], B [1, N, r] of each, one after the other."""
    made = []
    for _ in range(size.batch):
        made.append(draw.normal(size.width, size.features, scale=size.features**-0.5))
        made.append(draw.normal(size.experts, size.rank, size.features, scale=size.features**-0.5))
        made.append(draw.normal(1, size.width, size.rank, scale=size.rank**-0.5))
    return Inputs(tuple(made))


def _bank_contenders(device: torch.device, *, smoke: bool) -> list[Contender]:
    return [
        *ours("merge", device, _ours_banks),
        of("stacked_mean", _means),
        compiled("compile_stacked_mean", _means, smoke=smoke),
        of("baddbmm", _baddbmm),
        of("foreach", _foreach),
    ]


def _ours_banks(backend: str):
    return lambda *banks: merge_banks(banks, [None] * len(banks), backend=backend)


def _means(*banks):
    return [bank.mean(0) for bank in banks]


def _baddbmm(*banks):
    """Each mean as a product of one row 1/M with the bank [M, P]."""
    made = []
    for bank in banks:
        flat = bank.view(1, bank.shape[0], -1)
        weights = flat.new_full((1, 1, bank.shape[0]), 1 / bank.shape[0])
        made.append(torch.baddbmm(flat.new_zeros(1, 1, 1), weights, flat, beta=0).view(bank.shape[1:]))
    return made


def _foreach(*banks):
    """All means at once, one expert after the other."""
    total = list(torch._foreach_add([bank[0] for bank in banks], [bank[1] for bank in banks]))
    for m in range(2, banks[0].shape[0]):
        torch._foreach_add_(total, [bank[m] for bank in banks])
    torch._foreach_div_(total, float(banks[0].shape[0]))
    return total


def _weighted_mean(bank, scores):
    return (bank * scores.softmax(0).view(-1, *[1] * (bank.dim() - 1))).sum(0)


def _scored_baddbmm(bank, scores):
    flat = bank.view(1, bank.shape[0], -1)
    return torch.baddbmm(flat.new_zeros(1, 1, 1), scores.softmax(0).view(1, 1, -1), flat, beta=0).view(bank.shape[1:])


def _ours_lora(backend: str):
    """As merge() of a model does: the banks' means are results, too."""

    def call(*flat):
        layers = [LoraLayer(w, a, b, SCALING) for w, a, b in _triples(flat)]
        return merge_lora_banks(layers, [(None, None)] * len(layers), backend=backend)[0]

    return call


def _lora_plain(*flat):
    return [w + SCALING * (b.mean(0) @ a.mean(0)) for w, a, b in _triples(flat)]


def _lora_baddbmm(*flat):
    weights, down, up = (torch.stack(each) for each in zip(*_triples(flat), strict=True))
    return torch.baddbmm(weights, up.mean(1), down.mean(1), alpha=SCALING).unbind(0)


def _triples(flat):
    return zip(flat[::3], flat[1::3], flat[2::3], strict=True)
