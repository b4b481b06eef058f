"""Random calls of routed_lora and routed_adapter with gates."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from adamix_kernels.functional import routed_adapter, routed_lora
from adamix_kernels.ops._dropout import keep_mask

from ..numerics import plain
from .case import Case
from .draws import FINITE, MANY, VALUES, Draw, Sizes
from .loras import offsets_of

_FORMS = ("dense, sample", "dense, token", "chosen, sample", "chosen, token", "chosen, token")


def _gates(d: Draw, banks: tuple[int, int], batch: int, tokens: int):
    """(gates, index of the first side, of the second): of a drawn form, with 0 to 3 slots where experts are chosen."""
    # A bank of one with an index, and two of them: what their slots weigh is summed before the op.
    form = "chosen, token" if max(banks) > 4 and d.flag() else d.choose(_FORMS)
    if form.startswith("dense") and min(banks) not in (1, max(banks)):
        form = form.replace("dense", "chosen")
    lead = (batch,) if "sample" in form else (batch, tokens)
    slots, indices = max(banks), [None, None]
    if form.startswith("chosen"):
        slots = d.choose((1, 2, 2, 3, 0))
        wanted = [experts > 1 or d.flag() for experts in banks]
        wanted[1] = wanted[1] or not any(wanted)
        names = ("first index", "second index")
        for side, (experts, name) in enumerate(zip(banks, names, strict=True)):
            indices[side] = d.ids(name, experts, *lead, slots) if wanted[side] else None
        if None not in indices and banks[0] == banks[1] and d.mostly():
            indices[1] = indices[0]  # one index in memory: slots may be sorted by it
    half = d.dtype == torch.float16
    values = ("normal", "normal", "zeros") if half else ("normal", "normal", "zeros", "huge", "tiny", "one huge")
    dtype = d.choose((d.dtype, torch.float32))
    d.said.append(form)
    return d.tensor("gates", *lead, slots, values=values, dtype=dtype, huge=1e2), *indices


def _unused(index: torch.Tensor | None, experts: int, rows: int, chosen: bool) -> torch.Tensor:
    """Which experts no slot of any row names: bool [experts]."""
    unused = torch.full((experts,), rows == 0 or (chosen and experts > 1))
    if rows and chosen and experts > 1:
        unused[index.long().reshape(-1)] = False
    return unused


@st.composite
def gated_lora_cases(draw, dtypes, sizes: Sizes, whole: bool = False, many: bool = False) -> Case:
    """whole: features, columns and ranks that fill pieces of 16 bytes. many: experts that no single tile holds."""
    d = Draw(draw, dtypes)
    batch, tokens = d.size(sizes.batch), d.size(sizes.tokens) + sizes.more_rows
    features, r, per_group = d.size(sizes.features), d.size(sizes.rank), d.size(sizes.features)
    banks = d.choose(((4, 4), (3, 3), (1, 4), (4, 1), (3, 4), (1, 1)))
    groups = d.choose((1, 1, 2, 3))
    if many:
        banks, r = tuple(MANY[0] if experts == 4 else experts for experts in banks), MANY[1]
    offsets, width = offsets_of(d, groups, per_group)
    if whole:
        features, r, per_group, width = 8 * features, 4 * r, 8 * per_group, 8 * width
        offsets = tuple(8 * offset for offset in offsets)
    with_base, dropout_p, mix = d.flag(), d.choose((0, 0, 0.3)), d.choose(("outputs", "weights"))
    if many and whole:
        banks, mix = (9, 9), "outputs"  # of rank 32: most such slots may be sorted
        d.mostly_aligned()
    seed, scaling = d.choose((0, -1, 11)), d.choose((1, 1.7, -0.25, 0, "each"))
    inplace = with_base and d.flag()
    width = width if with_base else max(offsets) + per_group
    if scaling == "each":
        experts = banks[0] if banks[1] == 1 else banks[1]
        scaling = torch.rand(experts, generator=d.generator) + 0.5
    layouts = {"layouts": ("contiguous", "misaligned")} if inplace else {}
    gates, i, j = _gates(d, banks, batch, tokens)
    tensors = (
        d.tensor("x", batch, tokens, features, values=VALUES if r else FINITE),
        d.tensor("lora_a", banks[0], groups * r, features, values=FINITE),
        d.tensor("lora_b", banks[1], groups * per_group, r, values=FINITE),
        d.tensor("base", batch, tokens, width, **layouts) if with_base else None,
        gates,
    )
    d.said.append(f"{mix}, groups {groups}, offsets {offsets}, dropout {dropout_p} seed {seed}, {scaling=}, {inplace=}")
    keep, rows = None, batch * tokens
    if dropout_p:
        keep = keep_mask(torch.tensor(seed), rows, features, dropout_p).view(batch, tokens, features)

    def op(backend, x, lora_a, lora_b, base, gates):
        options = dict(scaling=scaling, groups=groups, output_offsets=offsets, dropout_p=dropout_p, seed=seed)
        options |= dict(base=base.clone() if inplace else base, inplace=inplace, gates=gates, mix=mix)
        return (routed_lora(x, lora_a, lora_b, i, j, **options, backend=backend),)

    def definition(x, lora_a, lora_b, base, gates):
        base = x.new_zeros(batch, tokens, width) if base is None else base
        own = scaling.to(x.dtype) if isinstance(scaling, torch.Tensor) and x.dtype == torch.float64 else scaling
        gates = gates.sum(-1, keepdim=True) if banks == (1, 1) else gates
        return (
            plain.gated_lora(x, lora_a, lora_b, base, gates, (i, j), own, groups, offsets, keep, dropout_p, mix),
        )  # fmt: skip

    chosen = i is not None or j is not None
    return Case(
        "gated_lora", tensors, op, definition, d.incoming(batch, tokens, width), d.said,
        integers=tuple(t for t in (i, j) if t is not None),
        unused=[(1, _unused(i, banks[0], rows, chosen)), (2, _unused(j, banks[1], rows, chosen))],
    )  # fmt: skip


@st.composite
def gated_adapter_cases(draw, dtypes, sizes: Sizes, whole: bool = False, many: bool = False) -> Case:
    """whole: features in whole pieces of 64, ranks of 4. many: experts that no single tile holds."""
    d = Draw(draw, dtypes)
    batch, tokens = d.size(sizes.batch), d.size(sizes.tokens) + sizes.more_rows
    hidden, r = d.size(sizes.features), d.size(sizes.rank)
    banks = d.choose(((4, 4), (3, 3), (1, 4), (4, 1), (3, 4), (1, 1)))
    if many:
        banks, r = tuple(MANY[0] if experts == 4 else experts for experts in banks), MANY[1]
    if whole:
        batch, hidden, r = max(1, batch), 64 * d.integer(1, 3), 4 * d.integer(1, 4)
        d.mostly_aligned()
    residual, mix = d.choose(("none", "input", "other")), d.choose(("outputs", "weights"))
    if many and whole:
        banks, r, mix = (MANY[0], MANY[0]), 2 * r, "outputs"  # most such slots may be sorted
    out = hidden if whole or residual == "input" else d.choose((hidden, d.size(sizes.features)))
    activation = d.choose(tuple(plain.ACTIVATIONS))
    gates, i, j = _gates(d, banks, batch, tokens)
    tensors = (
        d.tensor("x", batch, tokens, hidden, values=VALUES if r and activation is None else FINITE),
        d.tensor("down_weight", banks[0], r, hidden, values=FINITE),
        d.tensor("down_bias", banks[0], r, values=FINITE) if d.flag() else None,
        d.tensor("up_weight", banks[1], out, r, values=FINITE),
        d.tensor("up_bias", banks[1], out, values=FINITE) if d.flag() else None,
        d.tensor("residual", batch, tokens, out) if residual == "other" else None,
        gates,
    )
    d.said.append(f"{mix}, activation {activation}, residual {residual}")

    def op(backend, x, down_weight, down_bias, up_weight, up_bias, other, gates):
        options = dict(residual=x if residual == "input" else other, activation=activation, gates=gates, mix=mix)
        return (routed_adapter(x, down_weight, down_bias, up_weight, up_bias, i, j, **options, backend=backend),)

    def definition(x, down_weight, down_bias, up_weight, up_bias, other, gates):
        down_bias = x.new_zeros(down_weight.shape[:2]) if down_bias is None else down_bias
        up_bias = x.new_zeros(up_weight.shape[:2]) if up_bias is None else up_bias
        added = x if residual == "input" else other
        exact = x.dtype == torch.float64 != d.dtype
        gates = gates.sum(-1, keepdim=True) if banks == (1, 1) else gates
        banks_of = down_weight, down_bias, up_weight, up_bias
        return (plain.gated_adapter(x, *banks_of, gates, (i, j), added, activation, exact, mix),)

    chosen, rows = i is not None or j is not None, batch * tokens
    return Case(
        "gated_adapter", tensors, op, definition, d.incoming(batch, tokens, out), d.said,
        integers=tuple(t for t in (i, j) if t is not None),
        unused=[
            (position, _unused(index, experts, rows, chosen))
            for position, index, experts in ((1, i, banks[0]), (2, i, banks[0]), (3, j, banks[1]), (4, j, banks[1]))
            if tensors[position] is not None
        ],
    )  # fmt: skip
