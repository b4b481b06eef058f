"""linear_adamix_loss by chunks of rows: what every backend shares around the loss of one chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ._chunk_size import pairs_a_chunk
from ._rows import rows_of, scales_of, wide_dtype
from .signatures import Linear


class Chunk(NamedTuple):
    """Losses of a chunk's rows, or their sums; the gradient of its logits [2 * rows, V], or None."""

    cross_entropy: torch.Tensor
    consistency: torch.Tensor
    d_logits: torch.Tensor | None


def linear_loss(chunk: Callable[..., Chunk], a: Linear) -> tuple[torch.Tensor, ...]:
    """(loss, cross-entropy, consistency, d_hidden, d_weight, d_bias, factor).

    chunk(a, logits, labels, counted, selected, factors, need_grad): the loss of some row pairs; logits
    [2 * rows, V] are its to overwrite, factors [2] those of both parts' gradients. chunk_rows 0: by _chunk_size.py.

    Launches a chunk on a GPU: two products, the loss, and one more where the head is trained or has a bias (the hidden
    states in a matrix); for a trained head its product, and one more where that does not add to the sum itself.

    float16 gradients are held divided by the larger of both parts' factors on a row (1/rows would underflow, a
    weight overflow): that factor, else 1, is returned, and backward applies it with the incoming gradient.
    """
    hidden, lm_head_weight, bias = a.hidden, a.lm_head_weight, a.bias
    vocab, width = lm_head_weight.shape
    counted, selected = rows_of(a.labels, a.mask, a.ignore_index)
    as_one = selected is counted
    counted = counted.reshape(-1)
    selected = counted if as_one else selected.reshape(-1)
    labels = a.labels.reshape(-1)
    pairs = hidden.reshape(2, labels.shape[0], width)
    dtype = wide_dtype(hidden.dtype)
    scales = _scales(counted, selected, a.num_items, dtype)
    factors = torch.stack([scales[0], scales[1] if a.weight == 1 else scales[1] * a.weight])
    factor = factors.amax() if hidden.dtype == torch.float16 else factors.new_ones(())
    if hidden.dtype == torch.float16:
        factors = torch.where(factor > 0, factors / factor, 0)
    chunk_rows = a.chunk_rows
    inside = a.need_weight and adds_inside(hidden.device, hidden.dtype)
    if not chunk_rows:
        sizes = labels.shape[0], vocab, width, hidden.element_size()
        chunk_rows = pairs_a_chunk(*sizes, a.need_weight, hidden.device, inside)
    # Added up at the end: one rounding a chunk, all in one direction, would be more than PyTorch errs.
    losses: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    d_hidden = torch.empty_like(pairs, memory_format=torch.contiguous_format) if a.need_hidden else hidden.new_empty(0)
    d_weight, d_bias = (hidden.new_empty(0, dtype=dtype) for _ in range(2))
    if a.need_weight:
        # Where products add, the first has nothing to add to.
        new = hidden.new_empty if inside and labels.shape[0] else hidden.new_zeros
        d_weight = new(vocab, width, dtype=dtype)
    if a.need_bias:
        d_bias = hidden.new_zeros(vocab, dtype=dtype)
    need_grad = a.need_hidden or a.need_weight or a.need_bias
    # A number in its place would be a launch for each chunk.
    apart = multiplies_apart(hidden.device)
    as_matrix = a.need_weight or bias is not None or not apart
    zero = hidden.new_zeros(()) if as_matrix else hidden
    room = _room(hidden, min(chunk_rows, labels.shape[0]), vocab) if apart else None
    for start in range(0, labels.shape[0], chunk_rows):
        part = slice(start, start + chunk_rows)
        states, x = pairs[:, part], None
        if as_matrix:
            # A masked row's hidden states may be NaN: zero them, or 0 * NaN reaches d_weight.
            x = torch.where(selected[part].unsqueeze(-1), states, zero).flatten(0, 1)
        logits = _logits(states, x, lm_head_weight, bias, room)
        out = chunk(a, logits, labels[part], counted[part], selected[part], factors, need_grad)
        for found, one in zip(losses, out[:2], strict=True):
            found.append(one.reshape(-1))
        if not need_grad:
            del x, logits, out
            continue
        assert out.d_logits is not None  # asked for
        if a.need_bias:
            d_bias += out.d_logits.sum(0, dtype=dtype)
        d_logits = out.d_logits.to(hidden.dtype)
        if a.need_hidden and apart:
            passes = d_logits.unflatten(0, (2, -1))
            torch.bmm(passes, lm_head_weight.expand(2, vocab, width), out=d_hidden[:, part])
        elif a.need_hidden:
            d_hidden[:, part] = (d_logits @ lm_head_weight).unflatten(0, (2, -1))
        if x is not None and inside:
            add_product(d_weight, d_logits.t(), x, start > 0)
        elif x is not None and a.need_weight and hidden.dtype == torch.bfloat16:
            d_weight += d_logits.t() @ x
        elif x is not None and a.need_weight:
            # float16 would overflow in a sum over many rows, before the factor makes it small.
            d_weight.addmm_(d_logits.t().to(dtype), x.to(dtype))
        # Or the next chunk's logits are made while these still live.
        del x, logits, out, d_logits
    if losses[0]:
        rows = sum(map(torch.Tensor.numel, losses[0]))
        both = torch.cat([*losses[0], *losses[1]])
        totals = both[:rows].sum(), both[rows:].sum()
    else:
        totals = factors.new_zeros(()), factors.new_zeros(())
    cross_entropy, consistency = totals[0] * scales[0], totals[1] * scales[1]
    loss = cross_entropy + (consistency if a.weight == 1 else a.weight * consistency)
    if a.need_hidden:
        d_hidden = d_hidden.view(hidden.shape)
    return loss, cross_entropy, consistency, d_hidden, d_weight, d_bias, factor


def multiplies_apart(device: torch.device) -> bool:
    """Whether both passes are a batch of two products, which copies no rows; a CPU takes one product of all rows."""
    return device.type != "cpu"


# By device and dtype, what was asked once.
_ADDS: dict[tuple[torch.device, torch.dtype], bool] = {}


def adds_inside(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add_product` serves: CUDA, of a torch whose addmm takes a sum of float32 with factors of 16 bits.

    Asked at the first call, which waits for the GPU. While a graph is captured that cannot be: a first call there
    keeps the sum beside its product, and the next one outside asks.
    """
    if device.type != "cuda" or dtype.itemsize != 2:
        return False
    key = device, dtype
    if key not in _ADDS:
        if _capturing(device):
            return False
        _ADDS[key] = _adds_rightly(device, dtype)
    return _ADDS[key]


def _capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _adds_rightly(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add_product` takes such a product and gives, to the bit, sums that 16 bits cannot hold."""
    n = torch.arange(8, dtype=torch.float32)
    left, right, unit = 16 * n[:, None] + n + 1, n * n - n[:, None], 2.0**-14
    total, turned = torch.full_like(left, torch.nan, device=device), (left.t() * unit).contiguous().to(device, dtype)
    try:
        add_product(total, torch.eye(8, dtype=dtype, device=device), torch.ones_like(turned), False)
        add_product(total, turned.t(), right.to(device, dtype), True)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(total.cpu(), 1 + unit * (left @ right))


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, adds: bool) -> None:
    """total += left @ right in one product, total of float32, the factors of 16 bits; = where it does not add."""
    torch.addmm(total, left, right, beta=int(adds), out_dtype=torch.float32, out=total)


def _scales(
    counted: torch.Tensor, selected: torch.Tensor, num_items: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of scales_of, in few launches: one over a number of rows is infinite for none, whose scale is 0."""
    if num_items is not None:
        first, second = scales_of(counted, selected, num_items, dtype).unbind()
        return first, second
    first = counted.sum(dtype=dtype).reciprocal_().nan_to_num_(posinf=0.0)
    return first, first if selected is counted else selected.sum(dtype=dtype).reciprocal_().nan_to_num_(posinf=0.0)


def _room(hidden: torch.Tensor, pairs: int, vocab: int) -> torch.Tensor:
    """Logits [2 * pairs, V] for every chunk; rows begin at multiples of 128 bytes, or products would crawl."""
    return hidden.new_empty(2 * pairs, -(-vocab // 64) * 64)[:, :vocab]


def _logits(
    states: torch.Tensor,
    x: torch.Tensor | None,
    lm_head_weight: torch.Tensor,
    bias: torch.Tensor | None,
    room: torch.Tensor | None,
) -> torch.Tensor:
    """[2 * rows, V] from states [2, rows, D] or, where given, from x [2 * rows, D]; in `room`, if any."""
    if room is None:
        assert x is not None
        return torch.nn.functional.linear(x, lm_head_weight, bias)
    logits = room[: 2 * states.shape[1]]
    if x is None:
        head = lm_head_weight.t().expand(2, *lm_head_weight.t().shape)
        torch.bmm(states, head, out=logits.unflatten(0, (2, -1)))
    elif bias is None:
        torch.mm(x, lm_head_weight.t(), out=logits)
    else:
        torch.addmm(bias, x, lm_head_weight.t(), out=logits)
    return logits
