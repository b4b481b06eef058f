"""The fuzzing of csrc's kernels on the CPU in its small size, and that it sees one that computes something else."""

# ruff: noqa: E402 (the module is skipped before it imports what draws cases)

import re
from pathlib import Path
from unittest import mock

import pytest
from cuda_host import ON_HOST, needs_cuda

needs_cuda()
if not ON_HOST:
    pytest.skip("set ADAMIX_CUDA_HOST: cases are drawn for the CPU", allow_module_level=True)

from adamix_kernels.ops import _direct
from adamix_kernels.ops.routed_lora import cuda_impl
from reliability import fuzz_cuda
from reliability.fuzz.case import check
from reliability.fuzz.run import run_cases

pytestmark = pytest.mark.filterwarnings("ignore")
_CSRC = Path(__file__).parents[2] / "csrc"


def test_every_kernel_is_reached_and_holds():
    figures = list(fuzz_cuda.run("small"))
    assert len(figures) == len(fuzz_cuda.groups()) + len(set(fuzz_cuda.KERNELS.values()))
    assert [f"{figure.about}: {figure.value}" for figure in figures if not figure.passed] == []


def test_no_kernel_of_csrc_is_left_out():
    # The adapter's resident kernels, in headers, are launched under the names of those they stand for.
    sources = [path for end in ("*/*.cu", "*/*_kernel.h") for path in _CSRC.glob(end) if path.parent.name != "host"]
    text = "".join(path.read_text() for path in sources)
    assert set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text)) == set(fuzz_cuda.KERNELS.values())


def test_a_wrong_kernel_is_found():
    lora = next(group for group in fuzz_cuda.groups() if group.about == "routed_lora")
    real = cuda_impl.forward

    def wrong(*args, **options):
        out, t = real(*args, **options)
        return out * 1.01, t

    # A direct call goes past the module's function.
    with mock.patch.object(cuda_impl, "forward", wrong), _direct.switched_off():
        outcome = run_cases("", lora.cases, lambda case: check(case, "cuda"), 100, True)
    assert "budget" in outcome.failure
