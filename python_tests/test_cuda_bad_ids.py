"""A routing id outside its bank, on the C++/CUDA backend: NaN for that row alone, and nothing read that is not there.

The ops are called below the checks of api.py, which a GPU goes without: there a wrong id is data.
"""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, DTYPES, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st

needs_cuda()

from adapter_cases import draw_adapter
from plain_lora import draw_lora

from adamix_kernels.functional import routed_adapter
from adamix_kernels.ops._checks import OutOfRangeError
from adamix_kernels.ops.routed_adapter import cuda_impl as adapter
from adamix_kernels.ops.routed_lora import cuda_impl as lora
from benchmarks.sanitize import wrong_ids

# Of int64 ids some are right once their upper half is gone.
WRONG = {torch.int32: (-1, 3, 2**31 - 1, -(2**31)), torch.int64: (-1, 3, 2**32, 2**32 + 1, -(2**62))}


def spoil(index, dtype, value, where):
    """The index in dtype with a wrong id where `where` says, and which of its rows that are."""
    index = index.to(dtype)
    wrong = torch.zeros(index.shape, dtype=torch.bool, device=index.device)
    wrong[where] = True
    return torch.where(wrong, torch.tensor(value, dtype=dtype, device=index.device), index), wrong


def rows_of(wrong, batch, tokens):
    return wrong.view(batch, -1).expand(batch, tokens)


def check_rows(got, want, bad):
    """NaN in the bad rows, every other row as if there were none."""
    assert got[bad].isnan().all()
    torch.testing.assert_close(got[~bad], want[~bad], rtol=0, atol=0)


def run_adapter(x, banks, dy, indices):
    down, down_bias, up, up_bias = banks
    out, pre = adapter.forward(x, down, down_bias, up, up_bias, *indices, None, True, "gelu")
    return out, pre, *adapter.backward(dy, x, pre, down, up, *indices, True, True, True, True, "gelu")


def check_adapter(dtype, index_dtype, value, batch, tokens, rank, kinds, side, where, banks=(3, 3)):
    (x, *weights, dy), indices = draw_adapter(DEVICE, dtype, batch, tokens, 37, rank, *banks, *kinds)
    indices = [None if i is None else i.to(index_dtype) for i in indices]
    broken = list(indices)
    broken[side], wrong = spoil(indices[side], index_dtype, value, where)
    bad = rows_of(wrong, batch, tokens)
    # What the experts learn is what they learn where the bad rows say nothing.
    quiet = dy.masked_fill(bad[..., None], 0)
    want, got = run_adapter(x, weights, quiet, indices), run_adapter(x, weights, dy, broken)
    for number in (0, 1, 2):
        check_rows(got[number], want[number], bad)
    for mine, other in zip(got[3:], want[3:], strict=True):
        torch.testing.assert_close(mine, other)
        assert mine.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("index_dtype", "value"), [(d, v) for d, values in WRONG.items() for v in values])
@pytest.mark.parametrize("side", [0, 1])
def test_an_adapter_row_with_a_wrong_id(dtype, index_dtype, value, side):
    check_adapter(dtype, index_dtype, value, 2, 19, 6, ("token", "token"), side, (1, slice(3, 7)))


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("dtype", "index_dtype", "value", "batch", "tokens", "rank", "kinds", "side", "where"),
    [
        (torch.float32, torch.int64, 2**40, 2, 19, 6, ("token", "token"), 0, (1, 3)),
        (torch.bfloat16, torch.int64, -(2**40), 2, 19, 70, ("token", "sample"), 0, (0, 18)),
        (torch.float16, torch.int32, 2**31 - 1, 3, 30, 16, ("sample", "sample"), 1, (1,)),
        (torch.float32, torch.int32, -(2**31), 5, 61, 4, ("sample", "token"), 0, (4,)),
        # Rows shared out between blocks.
        (torch.float32, torch.int64, 3, 2, 147, 2, ("token", "sample"), 0, (slice(None), slice(0, 140))),
        (torch.float32, torch.int64, -1, 2, 5, 4, ("sample", "sample"), 1, (slice(None),)),
    ],
)
def test_no_adapter_kernel_reads_beyond_a_bank(dtype, index_dtype, value, batch, tokens, rank, kinds, side, where):
    check_adapter(dtype, index_dtype, value, batch, tokens, rank, kinds, side, where)


@pytest.mark.parametrize("side", [0, 1])
def test_a_bank_of_one_has_wrong_ids_too(side):
    check_adapter(torch.float32, torch.int64, 1, 3, 7, 4, ("sample", "sample"), side, (1,), banks=(1, 1))


def check_lora(dtype, index_dtype, value, side, where, dropout_p=0.0, inplace=False, **sizes):
    (x, a, b, base, dy), options = draw_lora(DEVICE, dtype=dtype, **sizes)
    batch, tokens, groups = *x.shape[:2], options["groups"]
    starts, per_group = options["output_offsets"], b.shape[1] // options["groups"]
    served = torch.zeros(dy.shape[2], dtype=torch.bool, device=DEVICE)
    for start in starts:
        served[start : start + per_group] = True
    seed = torch.tensor(3, device=DEVICE) if dropout_p else None
    tail = options["scaling"], groups, list(starts), dropout_p

    def run(indices, dy):
        mine = base.clone() if inplace else base
        out, t = lora.forward(x, a, b, *indices, mine, seed, *tail, inplace=inplace)
        return out, t, *lora.backward(dy, x, t, a, b, *indices, seed, True, True, True, *tail)

    indices = [i.to(index_dtype) for i in (options["a_index"], options["b_index"])]
    broken = list(indices)
    broken[side], wrong = spoil(indices[side], index_dtype, value, where)
    bad = rows_of(wrong, batch, tokens)
    want, got = run(indices, dy.masked_fill(bad[..., None], 0)), run(broken, dy)
    check_rows(got[0][..., served], want[0][..., served], bad)
    # What no group touches is the base's.
    assert torch.equal(got[0][..., ~served], want[0][..., ~served])
    check_rows(got[1], want[1], bad)
    check_rows(got[2], want[2], bad)
    for mine, other in zip(got[3:], want[3:], strict=True):
        torch.testing.assert_close(mine, other)
        assert mine.isfinite().all()


ROUTED = dict(a_kind="token", b_kind="token", tokens=21)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("index_dtype", "value"), [(d, v + (v == 3)) for d, values in WRONG.items() for v in values])
@pytest.mark.parametrize("side", [0, 1])
def test_a_lora_row_with_a_wrong_id(dtype, index_dtype, value, side):
    check_lora(dtype, index_dtype, value, side, (2, slice(0, 3)), groups=2, **ROUTED)


@pytest.mark.sanitize
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "index_dtype", "value", "options"),
    [
        (torch.float32, torch.int64, 2**40, dict(groups=2, dropout_p=0.3)),
        (torch.float16, torch.int32, -(2**31), dict(groups=3, inplace=True)),
        (torch.bfloat16, torch.int32, 2**31 - 1, dict(features=70, rank=9)),
    ],
)
def test_no_lora_kernel_reads_beyond_a_bank(dtype, index_dtype, value, options, side):
    check_lora(dtype, index_dtype, value, side, (0, slice(None)), **(ROUTED | options))
    check_lora(dtype, index_dtype, value, side, (2,), **(ROUTED | options | dict(a_kind="sample", b_kind="sample")))


@pytest.mark.parametrize("value", [-1, 3])
def test_checked_it_is_an_error_that_names_the_id(value, monkeypatch):
    monkeypatch.setenv("ADAMIX_CHECK", "1")
    (x, *banks, _), (down, up) = draw_adapter(DEVICE, torch.float32, 2, 5, 20, 4, 3, 2, "sample", "token")
    down[1] = value
    with pytest.raises(OutOfRangeError, match=f"down_index: got expert id {value}, expected 0 <= id < 3"):
        routed_adapter(x, *banks, down, up, residual=x, backend="cuda")


@settings(max_examples=25)
@given(data=st.data())
def test_any_shape_and_any_wrong_id(data):
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, tokens, rank, banks = pick(1, 4), pick(1, 40), pick(1, 40), (pick(1, 4), pick(1, 4))
    kinds = [data.draw(st.sampled_from(["sample", "token"])) for _ in range(2)]
    side, index_dtype = pick(0, 1), data.draw(st.sampled_from([torch.int32, torch.int64]))
    info = torch.iinfo(index_dtype)
    value = data.draw(st.integers(info.min, -1) | st.integers(banks[side], info.max))
    shape = (batch, tokens) if kinds[side] == "token" else (batch,)
    count = torch.Size(shape).numel()
    where = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count))).view(shape)
    dtype = data.draw(st.sampled_from(DTYPES))
    check_adapter(dtype, index_dtype, value, batch, tokens, rank, kinds, side, where, banks)


@pytest.mark.sanitize
def test_the_calls_for_compute_sanitizer_run():
    assert len(wrong_ids(torch.device(DEVICE), ["cuda"])) == 8
    assert wrong_ids(torch.device(DEVICE), ["reference"]) == []
