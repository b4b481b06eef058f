"""Passes in one batch on the C++/CUDA backend: on a GPU, or its kernels on the CPU (see cuda_host.py)."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
from cuda_host import DEVICE, needs_cuda

needs_cuda()

from passes_cases import check_adapter, check_lora


@pytest.mark.parametrize("residual", [None, "x", "other"])
def test_adapter(residual):
    check_adapter("cuda", DEVICE, residual)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lora(inplace, dropout_p):
    check_lora("cuda", DEVICE, inplace, dropout_p)
