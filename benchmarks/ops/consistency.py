"""The losses against the formula, torch.compile of it, Liger's KLDiv and JSD, and fla's fused_kl_div."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from adamix_kernels import adamix_loss, consistency_loss, linear_adamix_loss

from .. import sizes
from ..models.original import symmetric_kl
from ..sizes import LossSize
from .cases import Case, Contender, Draw, Inputs, bind, compiled, of, ours

# Rows of the check against float64, which holds many copies of [rows, V].
CHECKED_ROWS = 128


def cases(which: str, device: torch.device) -> Iterator[Case]:
    """adamix_loss (sizes.LOSS), consistency_loss (CONSISTENCY), linear_adamix_loss (HEAD), and to be counted alone the
    inplace loss whose gradient another incoming one comes to (RESCALED). KL targets are constants."""
    smoke = which == "smoke"
    for size in sizes.LOSS[which]:
        yield _loss_case("adamix_loss", size, _doubled, _loss, _loss_contenders(device, smoke=smoke))
    for size in sizes.CONSISTENCY[which]:
        yield _loss_case("consistency_loss", size, _pair, symmetric_kl, _consistency_contenders(device, smoke=smoke))
    for size in sizes.HEAD[which]:
        yield _head_case(size, device, smoke=smoke)
    for size in sizes.RESCALED if which == "count" else ():
        yield _rescaled_case(size, device)


def _loss_case(op: str, size: LossSize, make, plain, contenders) -> Case:
    logits = 2.0 * size.rows * size.vocab * getattr(torch, size.dtype).itemsize
    return Case(
        op=op,
        shape=size.words,
        dtype=getattr(torch, size.dtype),
        make=functools.partial(make, size, size.rows),
        make_check=functools.partial(make, size, min(CHECKED_ROWS, size.rows)),
        plain=plain,
        contenders=contenders,
        # Both rows read once; their gradients written once.
        traffic={"forward": logits, "backward": logits, "both": 2 * logits},
    )


def _rescaled_case(size: LossSize, device: torch.device) -> Case:
    """The forward wrote the gradient of an incoming one of 1: the backward reads it and writes its multiple."""
    return replace(
        _loss_case("consistency_rescale", size, _scaled, _loss, ours("consistency", device, _ours_inplace)),
        traffic={"backward": 2 * 2.0 * size.rows * size.vocab * getattr(torch, size.dtype).itemsize},
    )


def _head_case(size: LossSize, device: torch.device, *, smoke: bool) -> Case:
    itemsize = getattr(torch, size.dtype).itemsize
    moved = float(itemsize * (2 * size.rows * size.hidden + size.vocab * size.hidden))
    products = 2.0 * 2 * size.rows * size.hidden * size.vocab
    return Case(
        op="linear_adamix_loss",
        shape=size.words,
        dtype=getattr(torch, size.dtype),
        make=functools.partial(_hidden, size, size.rows),
        make_check=functools.partial(_hidden, size, min(CHECKED_ROWS, size.rows)),
        plain=head_formula,
        contenders=[
            *ours("consistency", device, _ours_head),
            of("unfused", _unfused),
            of("formula", head_formula),
            compiled("compile_formula", head_formula, smoke=smoke),
            Contender("fla_fused_kl_div_x2", _fla),
        ],
        # Hidden states and head read, the gradient of the hidden states written.
        traffic={"forward": moved, "both": moved + 2.0 * size.rows * size.hidden * itemsize},
        operations={"forward": products, "both": 2 * products},
    )


def _doubled(size: LossSize, rows: int, draw: Draw) -> Inputs:
    return Inputs((draw.normal(2 * rows, size.vocab, scale=2.0),), (draw.index(size.vocab, rows),))


def _scaled(size: LossSize, rows: int, draw: Draw) -> Inputs:
    return replace(_doubled(size, rows, draw), grad=torch.tensor(2.0**10))


def _pair(size: LossSize, rows: int, draw: Draw) -> Inputs:
    return Inputs(tuple(draw.normal(rows, size.vocab, scale=2.0) for _ in range(2)))


def _hidden(size: LossSize, rows: int, draw: Draw) -> Inputs:
    head = draw.normal(size.vocab, size.hidden, scale=2 * size.hidden**-0.5)
    return Inputs((draw.normal(2 * rows, size.hidden),), (head, draw.index(size.vocab, rows)))


def _loss_contenders(device: torch.device, *, smoke: bool) -> list[Contender]:
    return [
        *ours("consistency", device, lambda backend: lambda z, y: adamix_loss(z, y, backend=backend).loss),
        of("formula", _loss),
        compiled("compile_formula", _loss, smoke=smoke),
        Contender("liger_kldiv_x2", lambda: _with_cross_entropy(_liger_kl()), graph=False),
    ]


def _consistency_contenders(device: torch.device, *, smoke: bool) -> list[Contender]:
    return [
        *ours("consistency", device, lambda backend: functools.partial(consistency_loss, backend=backend)),
        of("formula", symmetric_kl),
        compiled("compile_formula", symmetric_kl, smoke=smoke),
        # Liger's backwards read a value on the CPU (torch.equal): no CUDA graph holds them.
        Contender("liger_kldiv_x2", lambda: bind(_liger_kl()), graph=False),
        Contender("liger_jsd_x2", _liger_jsd, plain=_jsd, graph=False),
    ]


def _loss(logits, labels):
    first, second = logits.chunk(2)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(first.to(wide), labels) + symmetric_kl(first, second)


def head_formula(hidden, head, labels):
    return _loss(F.linear(hidden, head), labels)


def _unfused(hidden, head, labels):
    """Our loss on logits that are held in full."""
    return adamix_loss(F.linear(hidden, head), labels).loss


def _ours_inplace(backend: str):
    return lambda logits, labels: adamix_loss(logits.clone(), labels, inplace=True, backend=backend).loss


def _ours_head(backend: str):
    return lambda hidden, head, labels: linear_adamix_loss(hidden, head, labels, backend=backend).loss


def _jsd(a, b):
    """Half of the Jensen-Shannon divergence for each side's gradient: another formula, over the same rows."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return 0.5 * (_half_jsd(a.to(wide), b.to(wide).detach()) + _half_jsd(b.to(wide), a.to(wide).detach()))


def _half_jsd(a, b):
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    middle = torch.logaddexp(log_a, log_b) - 0.6931471805599453
    terms = log_a.exp() * (log_a - middle) + log_b.exp() * (log_b - middle)
    return 0.5 * terms.sum(-1).mean()


def _with_cross_entropy(consistency):
    def call(logits, labels):
        first, second = logits.chunk(2)
        return F.cross_entropy(first.float(), labels) + consistency(first, second)

    return bind(call)


def _liger_kl():
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def call(a, b):
        log_a, log_b = a.log_softmax(-1, dtype=torch.float32), b.log_softmax(-1, dtype=torch.float32)
        return 0.5 * (kl(log_a, log_b.detach()) + kl(log_b, log_a.detach()))

    return call


def _liger_jsd():
    from liger_kernel.transformers.jsd import LigerJSD

    jsd = LigerJSD(beta=0.5)

    def call(a, b):
        log_a, log_b = a.log_softmax(-1, dtype=torch.float32), b.log_softmax(-1, dtype=torch.float32)
        return 0.5 * (jsd(log_a, log_b.detach()) + jsd(log_b, log_a.detach()))

    return bind(call)


def _fla():
    from fla.modules.fused_kl_div import fused_kl_div_loss

    def call(hidden, head, labels):
        first, second = hidden.chunk(2)
        cross_entropy = F.cross_entropy(F.linear(first, head).float(), labels)
        a_from_b = fused_kl_div_loss(first, second.detach(), head, head)
        b_from_a = fused_kl_div_loss(second, first.detach(), head, head)
        return cross_entropy + 0.5 * (a_from_b + b_from_a)

    return bind(call)
