"""What Triton compiles, run as PTX on the CPU, as a GPU's kernels: verified, chosen for "auto", and then run."""

import os
import subprocess
import sys
from pathlib import Path

from ptx_programs import needs_ptx

needs_ptx()

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch, verify_stand_ins
from adamix_kernels.verifying import Machine
from adamix_kernels.verifying.verdicts import Store

machine = Machine("cpu", "PTX on a CPU", 80, 108, "none", "verify_stand_ins:ptx")
host = verify_stand_ins.ptx()
run = verify_stand_ins.check_the_whole_path(machine, "triton", Store())
assert not host.reached
run(torch.randn(3, 37, 5))
assert host.reached == {"merge_experts_kernel"}, host.reached
print("ran", len(host.launches))
"""


def test_compiled_kernels_are_verified_chosen_and_run(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ADAMIX_CUDA_HOST")}
    places = os.pathsep.join([str(ROOT / "python_tests" / "support"), str(ROOT)])
    environment |= {"ADAMIX_CACHE": str(tmp_path), "PYTHONPATH": places}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=500, cwd=ROOT
    )
    assert done.stdout.endswith("ran 1\n"), done.stdout + done.stderr
    assert list(tmp_path.glob("verdicts/*.json"))
