"""backend="cuda" where torch has no memory left: the words by which a caller knows that a smaller batch may do."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, needs_cuda

needs_cuda()

from adamix_kernels import functional as F
from adamix_kernels.ops import _direct

# torch's, of a CPU and of a GPU; those of one before 2.13 are not to be had, and the library says the GPU's.
WORDS = "can't allocate memory| out of memory."


@pytest.mark.parametrize("directly", [True, False])
def test_a_result_that_finds_no_memory_says_so(directly, monkeypatch):
    monkeypatch.setattr(_direct, "_switched_off", int(not directly))
    x = torch.zeros(8, device=DEVICE).expand(1, 2**30, 8)
    a, b = torch.zeros(1, 1, 8, device=DEVICE), torch.zeros(1, 2**20, 1, device=DEVICE)
    with pytest.raises(RuntimeError, match=WORDS) as raised:
        F.routed_lora(x, a, b, None, None, backend="cuda")
    # A RuntimeError, as torch's stable interface to C++ hands on no type: what accelerate's find_executable_batch_size
    # and transformers' auto_find_batch_size look for.
    memory = pytest.importorskip("accelerate.utils.memory")
    assert memory.should_reduce_batch_size(raised.value)
    assert memory.should_reduce_batch_size(RuntimeError("CUDA out of memory. Tried to allocate (2, 3) elements"))


def test_a_copy_that_finds_no_memory_says_so():
    one = torch.zeros(1, device=DEVICE)
    x, a, b = one.expand(1, 2**20, 2**30), one.expand(1, 1, 2**30), torch.zeros(1, 4, 1, device=DEVICE)
    with pytest.raises(RuntimeError, match=WORDS):
        F.routed_lora(x, a, b, None, None, backend="cuda")
