"""csrc/ on the CPU as a GPU's kernels: verified, chosen for "auto", and then run."""

import pytest
import torch
from cuda_host import ON_HOST, needs_cuda, runtime_calls
from verify_cases import apart, store
from verify_stand_ins import check_the_whole_path

from adamix_kernels.verifying import Machine

needs_cuda()
if not ON_HOST:
    pytest.skip("a stand-in for a GPU is a CPU: set ADAMIX_CUDA_HOST", allow_module_level=True)
__all__ = ["apart", "store"]
MACHINE = Machine("cpu", "csrc/ on a CPU", 80, 108, "none", "verify_stand_ins:nothing")


def test_kernels_on_the_cpu_are_verified_chosen_and_run(store):
    run = check_the_whole_path(MACHINE, "cuda", store)
    runtime_calls()
    run(torch.randn(3, 37, 5))
    assert any(call.startswith("cudaLaunchKernelEx") for call in runtime_calls())
