"""Passes in one batch, on the reference."""

import pytest
from passes_cases import check_adapter, check_lora


@pytest.mark.parametrize("residual", [None, "x", "other"])
def test_adapter(residual):
    check_adapter("reference", "cpu", residual)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lora(inplace, dropout_p):
    check_lora("reference", "cpu", inplace, dropout_p)
