"""Gated ops on the Triton backend inside what a training puts around them."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
from triton_spy import DEVICE, INTERPRET, needs_triton

needs_triton()

from wrapped_gates import OPS, check_autocast, check_checkpointing, check_compile, check_opcheck

CHECKS = [check_autocast, check_checkpointing, check_compile, check_opcheck]


@pytest.mark.skipif(not INTERPRET, reason="what surrounds a launch is the same")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("op", OPS)
def test_what_surrounds_a_call_changes_nothing(op, check):
    check(op, "triton", DEVICE)
