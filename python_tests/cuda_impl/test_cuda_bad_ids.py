"""A routing id outside its bank, on the C++/CUDA backend: an error where ids are checked, else NaN in its rows alone.

And nothing is read that is not there.
"""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, DTYPES, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st

needs_cuda()

import bad_id_cases
from adapter_cases import draw_adapter
from bad_id_cases import adapter_on, check, lora_on, quiet, spoil
from plain_lora import draw_lora
from suite_size import pairs

from adamix_kernels.ops.routed_adapter import cuda_impl as adapter
from adamix_kernels.ops.routed_lora import cuda_impl as lora
from benchmarks.sanitize import wrong_ids

KERNELS = {"routed_adapter": adapter, "routed_lora": lora}
WRONG = {torch.int32: (-1, 3, 2**31 - 1, -(2**31)), torch.int64: (-1, 3, 2**32, 2**32 + 1, -(2**62))}


@pytest.mark.parametrize(("index_dtype", "value"), bad_id_cases.WRONG)
@pytest.mark.parametrize(("case", "side"), bad_id_cases.ADAPTER_SIDES)
def test_an_adapter(case, side, index_dtype, value):
    bad_id_cases.check_adapter(adapter, DEVICE, case, side, index_dtype, value)


@pairs(case=bad_id_cases.LORAS, side=[0, 1], wrong=bad_id_cases.WRONG)
def test_a_lora(case, side, wrong):
    bad_id_cases.check_lora(lora, DEVICE, case, side, *wrong)


@pytest.mark.parametrize("value", [1, -1])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", ["sample", "token"])
@pytest.mark.parametrize("op", KERNELS)
def test_a_bank_of_one_that_is_given_an_index(op, kind, side, value):
    bad_id_cases.check_a_bank_of_one(KERNELS[op], DEVICE, op, kind, side, value)


@pytest.mark.parametrize("op", KERNELS)
def test_checked_it_is_an_error_that_names_the_id(op, monkeypatch):
    bad_id_cases.check_the_error("cuda", DEVICE, op, monkeypatch)


def check_adapter(dtype, index_dtype, value, batch, tokens, rank, kinds, side, where, banks=(3, 3)):
    """What the experts learn, and what backward is given, is as if the bad rows said nothing, whatever their dy."""
    (x, *weights, dy), indices = draw_adapter(DEVICE, dtype, batch, tokens, 37, rank, *banks, *kinds)
    indices = [None if i is None else i.to(index_dtype) for i in indices]
    broken, bad = spoil(indices, side, index_dtype, value, tokens, where)
    run = adapter_on(adapter, x, weights)
    check(run(broken, dy), run(indices, quiet(dy, bad)), bad, rows=(0, 1, 2))


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
    indices = [i.to(index_dtype) for i in (options["a_index"], options["b_index"])]
    broken, bad = spoil(indices, side, index_dtype, value, x.shape[1], where)
    run = lora_on(lora, x, a, b, base, options, dropout_p, inplace)
    check(run(broken, dy), run(indices, quiet(dy, bad)), bad, rows=(0, 1, 2))


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
