"""linear_adamix_loss on C++/CUDA with the products that a GPU gets, and logits with room between their rows."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
from cuda_host import DEVICE, DTYPES, needs_cuda

needs_cuda()

from linear_cases import as_on_a_gpu, check_products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("train_head", "with_bias"), [(False, False), (True, False), (True, True)])
def test_the_products_of_a_gpu_give_what_the_whole_logits_give(train_head, with_bias, dtype, monkeypatch):
    as_on_a_gpu(monkeypatch)
    check_products("cuda", DEVICE, train_head, with_bias, dtype)
