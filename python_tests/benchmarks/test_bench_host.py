"""`python -m benchmarks.run host`: nothing is launched; a call costs what it should, with room for a busy machine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Adds a call may cost: twice its goal, as another process may have the caches.
MOST = {
    ("triton", "routed_adapter, forward"): 36,
    ("triton", "routed_adapter, forward with grad"): 56,
    ("triton", "routed_adapter, forward + backward"): 170,
    ("triton", "routed_lora, forward"): 36,
    ("triton", "routed_lora, forward + backward"): 170,
    ("triton", "routed_adapter, dense gates, forward + backward"): 600,
    ("triton", "routed_lora, top-2 of 4 gates, forward + backward"): 600,
    ("triton", "adamix_loss 64x2, forward"): 70,
    ("triton", "adamix_loss 64x2, forward + backward"): 150,
    ("triton", "consistency_loss 32x2, forward + backward"): 150,
    ("cuda", "routed_adapter, forward"): 27,
    ("cuda", "routed_adapter, forward with grad"): 48,
    ("cuda", "routed_adapter, forward + backward"): 150,
    ("cuda", "routed_lora, forward"): 32,
    ("cuda", "routed_lora, forward + backward"): 150,
    ("cuda", "routed_adapter, dense gates, forward + backward"): 600,
    ("cuda", "routed_lora, top-2 of 4 gates, forward + backward"): 600,
    ("cuda", "adamix_loss 64x2, forward"): 70,
    ("cuda", "adamix_loss 64x2, forward + backward"): 150,
    ("cuda", "consistency_loss 32x2, forward + backward"): 150,
}


def measured(backend, **environment):
    """{call: adds} of a small run; its launches are checked by the benchmark itself."""
    given = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ADAMIX_CUDA_HOST")} | environment
    paths = os.pathsep.join([str(ROOT), *filter(None, [given.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "host", "--rounds", "41", "--steps", "3", "--backends", backend],
        env={**given, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = re.findall(rf"^{backend} +(\S.*?)  +([\d.]+)", done.stdout, re.MULTILINE)
    steps = re.findall(
        rf"^{backend} +a step of (.+): our calls (-?\d+) adds, the rest (\d+): ", done.stdout, re.MULTILINE
    )
    for name, ours, rest in steps:
        # A few rounds on a busy machine tell the size alone, and vary by more than our calls cost.
        assert abs(int(ours)) < 3 * int(rest), name
    assert len(steps) in (0, 2)
    return {name: float(adds) for name, adds in lines}, done.stderr


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler in $PATH")
def test_triton():
    pytest.importorskip("triton")
    check("triton", measured("triton")[0])


def test_cuda():
    if shutil.which("g++") is None:
        pytest.skip("no g++ in $PATH")
    from adamix_kernels import _build

    check("cuda", measured("cuda", ADAMIX_CUDA_HOST=str(_build.build_host("plain")), ADAMIX_HOST_IDLE="1")[0])


def test_a_backend_that_cannot_be_measured_is_left_out_with_the_reason():
    rows, said = measured("cuda")
    assert not rows
    assert "ADAMIX_CUDA_HOST" in said


def check(backend, adds):
    wanted = {name: most for (of, name), most in MOST.items() if of == backend}
    assert wanted.keys() <= adds.keys()
    assert not {name: adds[name] for name, most in wanted.items() if not 1 < adds[name] < most}
