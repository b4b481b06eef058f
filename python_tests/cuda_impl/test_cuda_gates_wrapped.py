"""Gated ops on the C++/CUDA backend inside what a training puts around them."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
from cuda_host import DEVICE, needs_cuda

needs_cuda()

from wrapped_gates import OPS, check_autocast, check_checkpointing, check_compile, check_opcheck

CHECKS = [check_autocast, check_checkpointing, check_compile, check_opcheck]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("op", OPS)
def test_what_surrounds_a_call_changes_nothing(op, check):
    check(op, "cuda", DEVICE)
