"""A routing id outside its bank, on every backend: an error where ids are checked, else NaN in its rows and no other.

The kernels run below the checks of api.py, which a GPU goes without: interpreted Triton with TRITON_INTERPRET=1, the
C++/CUDA kernels on the CPU with ADAMIX_CUDA_HOST, each on a GPU too.
"""

import functools
import importlib

import pytest
import torch
from adapter_cases import draw_adapter
from plain_lora import draw_lora
from poison import poisoned_memory

from adamix_kernels import _backends
from adamix_kernels.functional import routed_adapter, routed_lora
from adamix_kernels.ops._checks import OutOfRangeError

BACKENDS = ("triton", "cuda")
# Of int64 ids some are right once their upper half is gone.
WRONG = [(torch.int32, -1), (torch.int64, 3), (torch.int64, 2**32 + 1), (torch.int64, -(2**62))]
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
LORAS = {
    "samples": dict(a_kind="sample", b_kind="sample", tokens=21),
    "tokens": dict(a_kind="token", b_kind="token", tokens=21),
    "dropout": dict(a_kind="token", b_kind="sample", tokens=21, dropout_p=0.3),
    "in place": dict(a_kind="sample", b_kind="token", tokens=21, inplace=True),
    "sorted": dict(a_kind="token", b_kind="token", tokens=31, rank=70),
    "rank in chunks": dict(a_kind="sample", b_kind="token", tokens=5, rank=150),
}


def kernels(backend, op):
    """(the module with that op's kernels, the device they run on); skips where they cannot run."""
    for device in ("cuda", "cpu"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        problem = _backends._problem(op, backend, torch.device(device), torch.float32)
        if problem is None:
            name = {"triton": "triton_impl", "cuda": "cuda_impl"}[backend]
            return importlib.import_module(f"adamix_kernels.ops.{op}.{name}"), device
    pytest.skip(f"backend={backend!r}: {problem}")


def spoil(index, dtype, value):
    """(the index in dtype with wrong ids in its second sample's first half, which entries those are)."""
    wrong = torch.zeros(index.shape, dtype=torch.bool, device=index.device)
    wrong[(1, slice(0, max(1, index.shape[-1] // 2))) if index.dim() == 2 else 1] = True
    index = index.to(dtype)
    return torch.where(wrong, torch.tensor(value, dtype=dtype, device=index.device), index), wrong


def check(got, want, bad, rows, banks):
    """Of got[:rows] the bad rows are NaN and the others as in want; got[banks:] are finite and as in want."""
    for mine, other in zip(got[:rows], want[:rows], strict=True):
        assert mine[bad].isnan().all()
        assert torch.equal(mine[~bad], other[~bad])
    for mine, other in zip(got[banks:], want[banks:], strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("index_dtype", "value"), WRONG)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter(backend, case, side, index_dtype, value):
    module, device = kernels(backend, "routed_adapter")
    tokens, r, *kinds = ADAPTERS[case]
    if kinds[side] is None:
        pytest.skip("that side has one expert")
    dtype = torch.float32 if side else torch.bfloat16
    (x, *banks, dy), indices = draw_adapter(device, dtype, 3, tokens, 37, r, 3, 3 if kinds[1] else 1, *kinds)
    broken = list(indices)
    broken[side], wrong = spoil(indices[side], index_dtype, value)
    bad = wrong.view(3, -1).expand(3, tokens)
    # Of a row that is lost no gradient comes back.
    dy = dy.masked_fill(bad[..., None], 0)

    def run(indices):
        with poisoned_memory():
            out, pre = module.forward(x, *banks, *indices, None, True, "gelu")
            dx, *grads = module.backward(dy, x, pre, banks[0], banks[2], *indices, True, True, True, True, "gelu")
        return out, dx, *grads

    check(run(broken), run(indices), bad, 2, 2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("index_dtype", "value"), WRONG)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("case", LORAS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lora(backend, case, side, index_dtype, value):
    module, device = kernels(backend, "routed_lora")
    sizes = dict(LORAS[case])
    dropout_p, inplace = sizes.pop("dropout_p", 0.0), sizes.pop("inplace", False)
    dtype = torch.float32 if side else torch.bfloat16
    (x, a, b, base, dy), options = draw_lora(device, dtype=dtype, **sizes)
    batch, tokens = x.shape[:2]
    groups, starts, per_group = options["groups"], options["output_offsets"], b.shape[1] // options["groups"]
    served = torch.zeros(dy.shape[2], dtype=torch.bool, device=device)
    for start in starts:
        served[start : start + per_group] = True
    indices = [options["a_index"], options["b_index"]]
    broken = list(indices)
    # Whatever the bank's size, 3 and 2**32 + 1 must be wrong ids of it.
    broken[side], wrong = spoil(indices[side], index_dtype, value if value != 3 else (a, b)[side].shape[0])
    bad = wrong.view(batch, -1).expand(batch, tokens)
    dy = dy.masked_fill(bad[..., None], 0)
    seed = torch.tensor(3, device=device) if dropout_p else None
    tail = options["scaling"], groups, list(starts), dropout_p

    def run(indices):
        mine = base.clone() if inplace else base
        with poisoned_memory():
            out, t = module.forward(x, a, b, *indices, mine, seed, *tail, inplace=inplace)
            dx, *grads = module.backward(dy, x, t, a, b, *indices, seed, True, True, True, *tail)
        assert torch.equal(out[..., ~served], base[..., ~served])
        return out[..., served], dx, *grads

    check(run(broken), run(indices), bad, 2, 2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [1, -1])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", ["sample", "token"])
@pytest.mark.parametrize("op", ["routed_adapter", "routed_lora"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bank_of_one_that_is_given_an_index(backend, op, kind, side, value):
    """0 is then its one right id."""
    module, device = kernels(backend, op)
    right = torch.zeros((3, 19) if kind == "token" else (3,), dtype=torch.int64, device=device)
    broken, wrong = spoil(right, torch.int64, value)
    bad = wrong.view(3, -1).expand(3, 19)
    if op == "routed_adapter":
        (x, *banks, dy), _ = draw_adapter(device, torch.float32, 3, 19, 37, 6, 1, 1, None, None)
    else:
        (x, *banks, base, dy), options = draw_lora(device, "none", "none", dtype=torch.float32, tokens=19)
        tail = options["scaling"], 1, [0], 0.0
    dy = dy.masked_fill(bad[..., None], 0)

    def run(index):
        indices = [index if side == s else None for s in (0, 1)]
        with poisoned_memory():
            if op == "routed_adapter":
                out, pre = module.forward(x, *banks, *indices, None, True, "gelu")
                down, _, up, _ = banks
                dx, *grads = module.backward(dy, x, pre, down, up, *indices, True, True, True, True, "gelu")
            else:
                out, t = module.forward(x, *banks, *indices, base, None, *tail)
                dx, *grads = module.backward(dy, x, t, *banks, *indices, None, True, True, True, *tail)
        return out, dx, *grads

    want = run(right)
    torch.testing.assert_close(want, run(None))
    check(run(broken), want, bad, 2, 2)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("op", ["routed_adapter", "routed_lora"])
def test_checked_it_is_an_error_that_names_the_id(op, backend, monkeypatch):
    """On the CPU always, on a GPU with ADAMIX_CHECK=1."""
    monkeypatch.setenv("ADAMIX_CHECK", "1")
    device = kernels(backend, op)[1] if backend != "reference" else "cpu"
    if op == "routed_adapter":
        (x, *banks, _), (index, other) = draw_adapter(device, torch.float32, 2, 5, 20, 4, 3, 2, "sample", "token")
        call, name, expected = functools.partial(routed_adapter, x, *banks), "down_index", 3
    else:
        (x, a, b, base, _), options = draw_lora(device, dtype=torch.float32, tokens=5)
        index, other = options.pop("a_index"), options.pop("b_index")
        call, name, expected = functools.partial(routed_lora, x, a, b, base=base, **options), "a_index", a.shape[0]
    for value in (-1, expected):
        index[1] = value
        with pytest.raises(OutOfRangeError, match=f"{name}: got expert id {value}, expected 0 <= id < {expected}"):
            call(index, other, backend=backend)
