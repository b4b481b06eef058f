"""A routing id outside its bank, on the reference backend: always an error. The kernels' tests are beside theirs."""

import bad_id_cases
import pytest


@pytest.mark.parametrize("op", ["routed_adapter", "routed_lora"])
def test_checked_it_is_an_error_that_names_the_id(op, monkeypatch):
    bad_id_cases.check_the_error("reference", "cpu", op, monkeypatch)
