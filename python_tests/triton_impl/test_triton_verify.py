"""Interpreted kernels as a GPU's: verified, chosen for "auto", and then run."""

import pytest
import torch
from triton_spy import INTERPRET, launches
from verify_cases import apart, store
from verify_stand_ins import check_the_whole_path

from adamix_kernels.verifying import Machine

if not INTERPRET:
    pytest.skip("set TRITON_INTERPRET=1", allow_module_level=True)

from adamix_kernels.ops.merge import triton_impl

__all__ = ["apart", "store"]
MACHINE = Machine("cpu", "Triton's interpreter", 80, 108, "none", "verify_stand_ins:nothing")


def test_interpreted_kernels_are_verified_chosen_and_run(store):
    run = check_the_whole_path(MACHINE, "triton", store)
    with launches(triton_impl) as names:
        run(torch.randn(3, 37, 5))
    assert names == ["merge_experts_kernel"]
