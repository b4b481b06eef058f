"""What the tests of the C++/CUDA backend share: the device, and its kernels on the CPU, plain or under a sanitiser.

ADAMIX_CUDA_HOST=<shared object> puts the kernels on the CPU before anything is imported, as TRITON_INTERPRET=1 does
for Triton. `make test` runs test_cuda_*.py so: all of it plain; `make sanitize` what is marked `sanitize`, under
AddressSanitizer with UBSan, at night under ThreadSanitizer too.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adamix_kernels import _build, _extension

ON_HOST = _extension.on_host()
DEVICE = "cpu" if ON_HOST else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# What every launch asks of the CUDA runtime, all of it legal while a graph is captured.
EACH_LAUNCH = {"cudaGetDevice", "cudaSetDevice", "cudaLaunchKernelEx", "cudaPeekAtLastError"}
_ROOT = Path(__file__).parents[2]
_SANITISERS = {"plain": (), "asan": ("libasan.so", "libstdc++.so.6"), "tsan": ("libtsan.so", "libstdc++.so.6")}


def needs_cuda():
    """Skips the module that calls it where the kernels can run neither on a GPU nor on the CPU."""
    reason = _extension.problem()
    if reason is not None:
        pytest.skip(
            f"backend='cuda': {reason} (make test runs it on the CPU through ADAMIX_CUDA_HOST)", allow_module_level=True
        )


def host_library(variant="plain"):
    """The kernels compiled for the CPU; what is not up to date is compiled first, but not while a GPU is lent."""
    if os.environ.get("ADAMIX_GPU_PROOF"):
        pytest.skip("csrc/ is not compiled for the CPU in the time of a GPU")
    if shutil.which("g++") is None:
        pytest.skip("no g++ in $PATH")
    return _build.build_host(variant)


def runtime_calls():
    """What this thread asked of the CUDA runtime since the last call, as "name" or "name argument argument"."""
    library = ctypes.CDLL(str(_extension.library_path()))
    library.adamix_host_calls.restype = ctypes.c_char_p
    return library.adamix_host_calls().decode().splitlines()


def names(calls):
    """The names alone, of what runtime_calls() gives."""
    return {call.split()[0] for call in calls}


def environment(variant="plain", order="forward"):
    """Environment variables under which a child process runs the kernels on the CPU.

    order: in which blocks and threads run: "forward", "reverse", or a seed.
    """
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in _SANITISERS[variant]
    ]
    return {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "ADAMIX_CUDA_HOST": str(host_library(variant)),
        "ADAMIX_HOST_ORDER": order,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(_ROOT),
    }


def run_script(script, variant="plain", order="forward"):
    """Runs Python source in a child process: (exit status, everything it printed)."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(variant, order),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=_ROOT,
    )
    return done.returncode, done.stdout + done.stderr
