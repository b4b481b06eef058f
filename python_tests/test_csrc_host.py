"""The emulation that runs csrc/ on the CPU sees the faults it is there for: a kernel commits them one by one."""

import pytest
from cuda_host import run_script

FAULTS = ["none", "no barrier", "no wait", "shared bounds", "global bounds", "uninitialised", "divergent", "limit"]
SCRIPT = """
import os, torch
torch.ops.load_library(os.environ["ADAMIX_CUDA_HOST"])
x = torch.randn(256)
out = torch.ops.adamix_cuda.host_selftest(x, {fault})
print("equal" if torch.equal(out, x.flip(0)) else "differs", int(out.isnan().sum()))
"""


def run(fault, variant, order="forward"):
    return run_script(SCRIPT.format(fault=FAULTS.index(fault)), variant, order)


@pytest.mark.parametrize("variant", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("order", ["forward", "reverse", "7"])
def test_a_kernel_without_fault_passes(variant, order):
    status, text = run("none", variant, order)
    assert (status, text.splitlines()[0]) == (0, "equal 0")


@pytest.mark.parametrize(
    ("fault", "variant", "words"),
    [
        ("no barrier", "tsan", "ThreadSanitizer: data race"),
        ("shared bounds", "asan", "AddressSanitizer: heap-buffer-overflow"),
        ("global bounds", "asan", "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_the_sanitiser_catches(fault, variant, words):
    status, text = run(fault, variant)
    assert status != 0
    assert words in text
    assert "selftest.cu" in text or "copies.cpp" in text


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("divergent", "for ever"),
        ("limit", "more shared memory than its launch gives"),
    ],
)
def test_the_scheduler_raises(fault, words):
    status, text = run(fault, "plain")
    assert status == 1
    assert words in text


@pytest.mark.parametrize("fault", ["no barrier", "no wait", "uninitialised"])
def test_what_nobody_wrote_reads_as_nan(fault):
    """Without a barrier, the threads that run last were not waited for, in whichever order they run."""
    for order in ("forward", "reverse"):
        status, text = run(fault, "plain", order)
        assert status == 0
        assert text.startswith("differs")
        assert int(text.split()[1]) > 0
