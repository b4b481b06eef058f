"""A routing id outside its bank, on the Triton backend: an error where ids are checked, else NaN in its rows alone."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import pytest
from triton_spy import DEVICE, needs_triton

needs_triton()

import bad_id_cases
from suite_size import pairs, singles

from adamix_kernels.ops.routed_adapter import triton_impl as adapter
from adamix_kernels.ops.routed_lora import triton_impl as lora

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
KERNELS = {"routed_adapter": adapter, "routed_lora": lora}


@singles(case=bad_id_cases.ADAPTER_SIDES, wrong=bad_id_cases.WRONG)
def test_an_adapter(case, wrong):
    bad_id_cases.check_adapter(adapter, DEVICE, *case, *wrong)


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
    bad_id_cases.check_the_error("triton", DEVICE, op, monkeypatch)
