"""Calls of the routed ops with ids outside their banks, below the checks of api.py: a GPU goes without those."""

import functools

import pytest
import torch
from adapter_cases import draw_adapter
from plain_lora import draw_lora
from poison import poisoned_memory
from suite_size import NIGHTLY

from adamix_kernels.functional import routed_adapter, routed_lora
from adamix_kernels.ops._checks import OutOfRangeError

# Of int64 ids some are right once their upper half is gone.
WRONG = [(torch.int32, -1), (torch.int64, 2**32 + 1)]
WRONG += [(torch.int64, 3), (torch.int64, -(2**62))] if NIGHTLY else []
# (tokens, r, kinds of both indices): one expert a tile, tiles of many experts, rows sorted by expert.
ADAPTERS = {
    "samples": (19, 6, "sample", "sample"),
    "tokens": (19, 6, "token", "token"),
    "mixed": (19, 6, "sample", "token"),
    "few tokens": (3, 4, "sample", "token"),
    "sorted": (19, 70, "token", "token"),
    "one side sorted": (19, 70, "token", "sample"),
    "shared up": (37, 16, "sample", None),
}
# Which of both indices may be wrong.
ADAPTER_SIDES = [(case, side) for case, (_, _, *kinds) in ADAPTERS.items() for side in (0, 1) if kinds[side]]
LORAS = {
    "samples": dict(a_kind="sample", b_kind="sample", tokens=21),
    "tokens": dict(a_kind="token", b_kind="token", tokens=21),
    "dropout": dict(a_kind="token", b_kind="sample", tokens=21, dropout_p=0.3),
    "in place": dict(a_kind="sample", b_kind="token", tokens=21, inplace=True),
    "sorted": dict(a_kind="token", b_kind="token", tokens=31, rank=70),
    "rank in chunks": dict(a_kind="sample", b_kind="token", tokens=5, rank=150),
}


def spoil(indices, side, dtype, value, tokens, where=None):
    """(both indices, one of them in dtype and with wrong ids; which rows [B, tokens] that spoils).

    where: which of its entries are wrong; by default the second sample's, of a token's index its first half.
    """
    index, broken = indices[side].to(dtype), list(indices)
    if where is None:
        where = (1, slice(0, max(1, index.shape[-1] // 2))) if index.dim() == 2 else 1
    wrong = torch.zeros(index.shape, dtype=torch.bool, device=index.device)
    wrong[where] = True
    broken[side] = torch.where(wrong, torch.tensor(value, dtype=dtype, device=index.device), index)
    return broken, wrong.view(len(index), -1).expand(-1, tokens)


def adapter_on(kernels, x, banks):
    """A function of both indices and dy: (out, what backward is given, dx, the banks' gradients...)."""

    def run(indices, dy):
        with poisoned_memory():
            out, pre = kernels.forward(x, *banks, *indices, None, True, "gelu")
            grads = kernels.backward(dy, x, pre, banks[0], banks[2], *indices, True, True, True, True, "gelu")
        return out, pre, *grads

    return run


def lora_on(kernels, x, a, b, base, options, dropout_p=0.0, inplace=False):
    """As `adapter_on`; of out the columns that a group adds to, the others being the base's."""
    groups, starts, per_group = options["groups"], options["output_offsets"], b.shape[1] // options["groups"]
    served = torch.zeros(base.shape[2], dtype=torch.bool, device=base.device)
    for start in starts:
        served[start : start + per_group] = True
    seed = torch.tensor(3, device=base.device) if dropout_p else None
    tail = options["scaling"], groups, list(starts), dropout_p

    def run(indices, dy):
        mine = base.clone() if inplace else base
        with poisoned_memory():
            out, t = kernels.forward(x, a, b, *indices, mine, seed, *tail, inplace=inplace)
            grads = kernels.backward(dy, x, t, a, b, *indices, seed, True, True, True, *tail)
        assert torch.equal(out[..., ~served], base[..., ~served])
        return out[..., served], t, *grads

    return run


def check(got, want, bad, rows=(0, 2)):
    """Of got[number] for `rows` the bad rows are NaN, the others as in want; the banks' gradients are finite, and as in
    want."""
    for number in rows:
        assert got[number][bad].isnan().all()
        assert torch.equal(got[number][~bad], want[number][~bad])
    for mine, other in zip(got[3:], want[3:], strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other)


def quiet(dy, bad):
    """Of a row that is lost no gradient comes back."""
    return dy.masked_fill(bad[..., None], 0)


def check_adapter(kernels, device, case, side, index_dtype, value):
    tokens, r, *kinds = ADAPTERS[case]
    dtype = torch.float32 if side else torch.bfloat16
    (x, *banks, dy), indices = draw_adapter(device, dtype, 3, tokens, 37, r, 3, 3 if kinds[1] else 1, *kinds)
    broken, bad = spoil(indices, side, index_dtype, value, tokens)
    run, dy = adapter_on(kernels, x, banks), quiet(dy, bad)
    check(run(broken, dy), run(indices, dy), bad)


def check_lora(kernels, device, case, side, index_dtype, value):
    sizes = dict(LORAS[case])
    more = {name: sizes.pop(name) for name in ("dropout_p", "inplace") if name in sizes}
    dtype = torch.float32 if side else torch.bfloat16
    (x, a, b, base, dy), options = draw_lora(device, dtype=dtype, **sizes)
    indices = [options["a_index"], options["b_index"]]
    # Whatever the bank's size, 3 and 2**32 + 1 must be wrong ids of it.
    value = value if value != 3 else (a, b)[side].shape[0]
    broken, bad = spoil(indices, side, index_dtype, value, x.shape[1])
    run, dy = lora_on(kernels, x, a, b, base, options, **more), quiet(dy, bad)
    check(run(broken, dy), run(indices, dy), bad)


def check_a_bank_of_one(kernels, device, op, kind, side, value):
    """That is given an index all the same: 0 is then its one right id."""
    if op == "routed_adapter":
        (x, *banks, dy), nothing = draw_adapter(device, torch.float32, 3, 19, 37, 6, 1, 1, None, None)
        run = adapter_on(kernels, x, banks)
    else:
        (x, *banks, base, dy), options = draw_lora(device, "none", "none", dtype=torch.float32, tokens=19)
        nothing, run = [options["a_index"], options["b_index"]], lora_on(kernels, x, *banks, base, options)
    right = list(nothing)
    right[side] = torch.zeros((3, 19) if kind == "token" else (3,), dtype=torch.int64, device=device)
    broken, bad = spoil(right, side, torch.int64, value, 19)
    dy = quiet(dy, bad)
    want = run(right, dy)
    torch.testing.assert_close(want, run(nothing, dy))
    check(run(broken, dy), want, bad)


def check_the_error(backend, device, op, monkeypatch):
    """On the CPU always, on a GPU with ADAMIX_CHECK=1."""
    monkeypatch.setenv("ADAMIX_CHECK", "1")
    if op == "routed_adapter":
        (x, *banks, _), (index, other) = draw_adapter(device, torch.float32, 2, 5, 20, 4, 3, 2, "sample", "token")
        call, name, expected = functools.partial(routed_adapter, x, *banks, residual=x), "down_index", 3
    else:
        (x, a, b, base, _), options = draw_lora(device, dtype=torch.float32, tokens=5)
        index, other = options.pop("a_index"), options.pop("b_index")
        call, name, expected = functools.partial(routed_lora, x, a, b, base=base, **options), "a_index", a.shape[0]
    for value in (-1, expected):
        index[1] = value
        with pytest.raises(OutOfRangeError, match=f"{name}: got expert id {value}, expected 0 <= id < {expected}"):
            call(index, other, backend=backend)
