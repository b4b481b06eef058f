"""Random calls of consistency_loss, adamix_loss (regression too) and linear_adamix_loss."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from adamix_kernels.functional import adamix_loss, consistency_loss, linear_adamix_loss

from . import loss_definitions as by_definition
from .case import Case
from .draws import INF, LAYOUTS, NAN, Draw, Sizes, lay_out

# "closed": a class that is -inf in both passes, as a masked vocabulary has it.
LOGITS = ("normal", "normal", "normal", "zeros", "huge", "tiny", "one huge", "closed", "closed", "infinity", "nan")
WEIGHTS = (1.0, 1, 0.0, 0.3, 20.0, 1e-4)
_MASKS = ("none", "any", "any", "all", "nothing")
INCOMING = (1.0, 1.0, -1.0, 0.0, 1024.0, 1e-3)


@st.composite
def consistency_cases(draw, dtypes, sizes: Sizes) -> Case:
    d = Draw(draw, dtypes)
    rows, classes = _rows(d, sizes), d.integer(1, sizes.classes)
    reduction, detach = d.choose(("batchmean", "sum", "none")), d.flag()
    mask = _mask(d, rows, _MASKS)
    inplace = reduction != "none" and d.flag()
    kind, plain_layouts = d.choose(LOGITS), ("contiguous", "misaligned")
    options = dict(values=_simple(kind), huge=_huge(d), layouts=plain_layouts if inplace else LAYOUTS)
    a, b = (d.tensor(name, *rows, classes, **options) for name in ("logits_a", "logits_b"))
    a, b = _close(d, kind, a, b)
    _spoil(d, kind, mask, a)
    d.said.append(f"{kind}, {reduction}, {detach=}, {inplace=}")
    shape = rows if reduction == "none" else ()
    incoming = _wide_randn(d, shape) if shape else _scalar(d)

    def op(backend, a, b):
        if inplace:
            a, b = a.clone(), b.clone()
        options = dict(mask=mask, detach_target=detach, reduction=reduction, inplace=inplace)
        return (consistency_loss(a, b, **options, backend=backend),)

    def jittered(generator, a, b):
        return (by_definition.consistency(a, b, mask, detach, reduction, generator),)

    integers = () if mask is None else (mask,)
    return _case("consistency_loss", (a, b), op, jittered, incoming, d, integers, wide=True)


@st.composite
def adamix_cases(draw, dtypes, sizes: Sizes) -> Case:
    d = Draw(draw, dtypes)
    rows = (d.size(sizes.batch), *_rows(d, sizes, 2))
    if d.integer(0, 5) == 0:
        return _regression(d, rows)
    classes = d.integer(1, sizes.classes)
    labels, mask, options = _options(d, rows, classes)
    inplace = options["inplace"] = d.flag()
    kind = d.choose(LOGITS)
    layouts = {"layouts": ("contiguous", "misaligned")} if inplace else {}
    logits = d.tensor("logits", 2 * rows[0], *rows[1:], classes, values=_simple(kind), huge=_huge(d), **layouts)
    half = rows[0]
    a, b = _close(d, kind, logits[:half], logits[half:])
    if kind == "closed":
        logits = torch.cat([a, b])
    _spoil(d, kind, mask, logits[:half])
    d.said.append(kind)

    def op(backend, logits):
        if inplace:
            logits = logits.clone()
        return adamix_loss(logits, labels, mask=mask, **options, backend=backend)

    def jittered(generator, logits):
        return by_definition.adamix(logits, labels, mask, **options, jitter=generator)

    integers = tuple(t for t in (labels, mask) if t is not None)
    return _case("adamix_loss", (logits,), op, jittered, _scalar(d), d, integers, wide=True)


def _regression(d: Draw, rows: tuple[int, ...]) -> Case:
    last, detach, mask = d.choose(((), (1,))), d.flag(), _mask(d, rows)
    weight, num_items = d.choose(WEIGHTS), _num_items(d)
    predictions = d.tensor("logits", 2 * rows[0], *rows[1:], *last)
    labels = d.randn(*rows, dtype=d.choose((d.dtype, torch.float32, torch.float64)))
    if mask is not None:
        labels[~mask.bool()] = NAN
    d.said.append(f"regression, labels {labels.dtype}, weight {weight}, {detach=}, num_items {num_items}")

    def op(backend, predictions):
        options = dict(weight=weight, mask=mask, num_items=num_items, detach_target=detach)
        return adamix_loss(predictions, labels, **options, backend="auto" if backend != "reference" else backend)

    def definition(predictions):
        one_a_row = predictions.squeeze(-1) if last else predictions
        return by_definition.regression(one_a_row, labels, mask, weight, num_items, detach)

    return Case("adamix_loss", (predictions,), op, definition, _scalar(d), d.said, wide=True, integers=(labels,))


@st.composite
def linear_cases(draw, dtypes, sizes: Sizes) -> Case:
    d = Draw(draw, dtypes)
    rows = (d.size(sizes.batch), *_rows(d, sizes, 2))
    classes, width = d.integer(1, sizes.classes), d.size(sizes.features)
    labels, mask, options = _options(d, rows, classes)
    chunk_rows = d.choose((None, 1, 2, 3, 1000))
    # Not all of them tiny: in the gradient of the bias both passes' rows then cancel to the last digits of 16 bits.
    values = ("normal", "normal", "zeros", "one huge", "nan")
    hidden = d.tensor("hidden", 2 * rows[0], *rows[1:], width, values=values)
    weight = d.tensor("lm_head_weight", classes, width, values=("normal", "normal", "zeros", "tiny", "one huge"))
    counted = (labels != options["ignore_index"]) & (
        torch.ones(rows, dtype=torch.bool) if mask is None else mask.bool()
    )
    # Without a labelled row both passes cancel in the bias's gradient, to what the order of a sum leaves.
    bias = d.tensor("bias", classes, values=("normal", "zeros")) if counted.any() and d.flag() else None
    _spoil(d, "linear", mask, hidden[: rows[0]])
    d.said.append(f"chunk_rows {chunk_rows}")

    def op(backend, hidden, weight, bias):
        return linear_adamix_loss(
            hidden, weight, labels, bias=bias, mask=mask, chunk_rows=chunk_rows, **options, backend=backend
        )

    def jittered(generator, hidden, weight, bias):
        return by_definition.linear(hidden, weight, bias, labels, mask, **options, jitter=generator)

    integers = tuple(t for t in (labels, mask) if t is not None)
    return _case("linear_adamix_loss", (hidden, weight, bias), op, jittered, _scalar(d), d, integers)


def _case(name, tensors, op, jittered, incoming, d: Draw, integers, wide=False) -> Case:
    def definition(*given):
        return jittered(None, *given)

    return Case(name, tensors, op, definition, incoming, d.said, wide=wide, integers=integers, jittered=jittered)


def _rows(d: Draw, sizes: Sizes, most: int = 3) -> tuple[int, ...]:
    if sizes.more_rows:
        return (d.size(sizes.tokens) + sizes.more_rows,)
    return tuple(d.size(sizes.tokens) for _ in range(d.integer(0, most)))


def _mask(d: Draw, rows, kinds=_MASKS) -> torch.Tensor | None:
    """None, or which rows count: any of them, all, none; bool or integers, in any layout."""
    kind = d.choose(kinds)
    if kind == "none":
        return None
    share = {"any": 0.6, "all": 2.0, "nothing": -1.0}[kind]
    mask = torch.rand(rows, generator=d.generator) < share
    mask = mask.to(d.choose((torch.bool, torch.int64, torch.uint8)))
    d.said.append(f"mask {kind} {mask.dtype}")
    return mask.t().contiguous().t() if mask.dim() == 2 else mask


def _num_items(d: Draw) -> int | torch.Tensor | None:
    return d.choose((None, None, 0, 3, 1000, torch.tensor(5), torch.tensor(2.5)))


def _options(d: Draw, rows, classes: int):
    """(labels, mask, the keyword arguments both losses share)."""
    ignore = d.choose((-100, -100, 0, -1))
    labels = torch.randint(classes, rows, generator=d.generator)
    labels[torch.rand(rows, generator=d.generator) < d.choose((0.0, 0.3, 1.1))] = ignore
    labels = lay_out(labels.to(d.choose((torch.int32, torch.int64))), d.choose(("contiguous", "strided", "transposed")))
    mask = _mask(d, rows)
    if mask is not None:
        labels[~mask.bool()] = d.choose((0, ignore, 10**6, -7))
    options = dict(
        weight=d.choose(WEIGHTS), ignore_index=ignore, label_smoothing=d.choose((0.0, 0.0, 0.1, 1.0)),
        num_items=_num_items(d), detach_target=d.flag(),
    )  # fmt: skip
    d.said.append(f"labels {tuple(rows)} {labels.dtype} {labels.flatten()[:4].tolist()}, {options}")
    return labels, mask, options


def _simple(kind: str) -> tuple[str]:
    return ("normal" if kind == "closed" else kind,)


def _close(d: Draw, kind: str, a: torch.Tensor, b: torch.Tensor):
    """Some classes closed in both passes, one open at least; new tensors."""
    classes = a.shape[-1]
    if kind != "closed":
        return a, b
    closed = torch.rand(classes, generator=d.generator) < 0.5
    closed[d.integer(0, classes - 1)] = False
    return a.masked_fill(closed, -INF), b.masked_fill(closed, -INF)


def _spoil(d: Draw, kind: str, mask: torch.Tensor | None, first: torch.Tensor) -> None:
    """NaN in the rows that do not count, of pass 1; no result may show it."""
    if mask is None or kind == "nan" or not d.flag() or 0 in first.stride():
        return
    first[~mask.bool()] = NAN
    d.said.append("NaN behind the mask")


def _huge(d: Draw) -> float:
    """The definition in float64 is no more exact than float64's own result where logits are large."""
    return 1e4 if d.dtype != torch.float64 else 30.0


def _scalar(d: Draw) -> torch.Tensor:
    value = d.choose(INCOMING)
    d.said.append(f"incoming {value}")
    return torch.tensor(value, dtype=torch.float64 if d.dtype == torch.float64 else torch.float32)


def _wide_randn(d: Draw, shape) -> torch.Tensor:
    dtype = torch.float64 if d.dtype == torch.float64 else torch.float32
    return lay_out(d.randn(*shape, dtype=dtype), d.choose(("contiguous", "transposed", "expanded", "strided")))
