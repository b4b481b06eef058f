"""Triton's kernels launched by the nodes in C++ (csrc/autograd/plans.cpp): what reaches the driver."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host import DEVICE, needs_cuda
from suite_size import NIGHTLY

needs_cuda()
ROOT = Path(__file__).parents[2]
SEEN = [(1, 60), (2, 60)] if NIGHTLY else [(1, 60)]


@pytest.mark.skipif(DEVICE != "cpu", reason="the driver is a stand-in")
def test_two_calls_that_differ_in_one_property_launch_what_tritons_launcher_does(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(ROOT / "python_tests" / "support" / "host_calls.py"), str(tmp_path), json.dumps(SEEN)],
        env={**environment, "PYTHONPATH": paths}, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for number, _ in enumerate(SEEN):
        (found,) = tmp_path.glob(f"{number}.*")
        assert found.suffix == ".0", found.read_text()
