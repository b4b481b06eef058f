"""Random draws of a Router, and random batches to be doubled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from adamix_kernels import double_batch
from adamix_kernels.models.doubling import split_passes
from adamix_kernels.routing import LEVELS, Router


@dataclass
class Drawn:
    router: Router
    experts: int
    batch: int
    tokens: int
    training: bool
    seed: int


@st.composite
def draws(draw) -> Drawn:
    router = Router(draw(st.sampled_from(LEVELS)), draw(st.integers(1, 3)))
    router.eval_level = draw(st.sampled_from(LEVELS))
    router.rank = draw(st.sampled_from((None, 0, 1, 7)))
    size = st.integers(0, 6)
    numbers = draw(st.integers(1, 9)), draw(size), draw(size)
    return Drawn(router, *numbers, draw(st.booleans()), draw(st.integers(0, 2**32 - 1)))


def check_draw(case: Drawn) -> None:
    """Ids of experts there are, of the level's shape, the same from the same seed, one a pass at batch level."""
    router, experts, batch = case.router, case.experts, case.batch
    index, again = (_drawn(case) for _ in range(2))
    if experts == 1:
        assert index is None, f"{case}: an index for one expert"
        return
    level = router.level if case.training else router.eval_level
    wanted = (batch, case.tokens) if level == "token" else (batch,)
    assert index.shape == wanted, f"{case}: {tuple(index.shape)}, not {wanted}"
    assert index.dtype == torch.int64, f"{case}: {index.dtype}"
    assert torch.equal(index, again), f"{case}: other ids from the same seed"
    assert ((index >= 0) & (index < experts)).all(), f"{case}: {index}"
    passes = router.passes_in(batch, case.training)
    assert (passes == 0) == (level != "batch"), f"{case}: {passes} passes"
    if level == "batch" and batch:
        rows = index.view(passes, -1)
        assert rows.eq(rows[:, :1]).all(), f"{case}: several experts in a pass"


def _drawn(case: Drawn) -> torch.Tensor | None:
    torch.manual_seed(case.seed)
    return case.router.draw(case.experts, case.batch, case.tokens, torch.device("cpu"), case.training)


@st.composite
def batches(draw) -> tuple[int, object]:
    """(B, nested containers of tensors with and without a batch axis)."""
    size = draw(st.integers(0, 4))
    tensor = st.lists(st.integers(0, 3), max_size=2).map(lambda rest: torch.randn(size, *rest))
    other = st.sampled_from((torch.tensor(1.0), torch.ones(size + 1, 2), None, 3, "text"))
    leaf = tensor | other
    nested = st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner), max_leaves=4)
    values = draw(st.dictionaries(st.sampled_from(("a", "b", "head_mask", "labels")), nested, max_size=3))
    values["input_ids"] = torch.arange(size * 2).view(size, 2)
    return size, values


def check_doubling(case: tuple[int, object]) -> None:
    """Two equal halves of every batched tensor, everything else as it was, and split_passes takes them apart again."""
    size, values = case
    doubled = double_batch(values)
    first, second = split_passes(doubled, size)
    pairs = zip(_leaves(values), _leaves(doubled), _leaves(first), _leaves(second), strict=True)
    for (name, before), (_, both), (_, one), (_, two) in pairs:
        batched = isinstance(before, torch.Tensor) and before.dim() and len(before) == size and name != "head_mask"
        if not batched:
            assert both is before, f"{case}: {name} was touched"
            continue
        assert torch.equal(both, torch.cat([before, before])), f"{case}: {name} is not doubled"
        assert torch.equal(one, before), f"{case}: pass 1 of {name}"
        assert torch.equal(two, before), f"{case}: pass 2 of {name}"


def _leaves(value, name=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, name or key)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, name)
    else:
        yield name, value
