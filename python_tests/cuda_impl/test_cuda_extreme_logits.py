"""Gradients at logits of 1e3 and 1e4 on the C++/CUDA backend, where d rounds by more than the gradient is."""

import pytest
from cuda_host import DEVICE, needs_cuda

needs_cuda()

from extreme_logits import CASES, check  # noqa: E402


@pytest.mark.parametrize("scale", [1e3, 1e4])
@pytest.mark.parametrize("variant", CASES)
def test_gradients_err_at_most_twice_as_much_as_pytorch(variant, scale):
    check("cuda", DEVICE, variant, scale)
