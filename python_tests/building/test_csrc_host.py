"""The emulation that runs csrc/ on the CPU sees the faults it is there for: a kernel commits them one by one."""

import pytest
from cuda_host import run_script
from suite_size import NIGHTLY, singles

FAULTS = [
    "none",
    "no barrier",
    "no wait",
    "shared bounds",
    "global bounds",
    "uninitialised",
    "divergent",
    "limit",
    "own limit",
]
SCRIPT = """
import os, torch
torch.ops.load_library(os.environ["ADAMIX_CUDA_HOST"])
x = torch.randn(256)
out = torch.ops.adamix_cuda.host_selftest(x, {fault}, 0)
print("equal" if torch.equal(out, x.flip(0)) else "differs", int(out.isnan().sum()))
"""


def run(fault, variant, order="forward"):
    return run_script(SCRIPT.format(fault=FAULTS.index(fault)), variant, order)


@singles(variant=["plain", *["asan", "tsan"] * NIGHTLY], order=["forward", "reverse", "7"])
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
@pytest.mark.nightly
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


THREADS = """
import os, threading, torch
torch.ops.load_library(os.environ["ADAMIX_CUDA_HOST"])
x, errors = torch.randn(256), []
def run(more):
    for _ in range(20):
        try:
            assert torch.equal(torch.ops.adamix_cuda.host_selftest(x, {fault}, more), x.flip(0))
        except RuntimeError as error:
            errors.append(str(error))
threads = [threading.Thread(target=run, args=(more,)) for more in (60_000, 190_000)]
[t.start() for t in threads]
[t.join() for t in threads]
print(len(errors), set(errors))
"""


def test_two_threads_may_launch_a_kernel_with_two_sizes():
    status, text = run_script(THREADS.format(fault=FAULTS.index("none")))
    assert (status, text.splitlines()[-1]) == (0, "0 set()"), text


def test_a_limit_for_each_launch_is_undone_by_another_thread():
    """What launches did before: the emulated driver refuses it as the real one does."""
    status, text = run_script(THREADS.format(fault=FAULTS.index("own limit")))
    count, errors = text.splitlines()[-1].split(" ", 1)
    assert status == 0
    assert int(count) > 0
    assert errors == "{'invalid argument'}"
