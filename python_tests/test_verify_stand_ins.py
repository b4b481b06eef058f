"""Real kernels as "GPUs": interpreted, as compiled PTX, and csrc/ on the CPU are verified, chosen, and then run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_host
import pytest

HERE = Path(__file__).parent
SCRIPT = """
import json, sys, torch, verify_stand_ins
import adamix_kernels
from adamix_kernels import _auto, _backends, verifying
from adamix_kernels.verifying.machine import Job, Machine

kind, backend = sys.argv[1:]
machine = Machine("cpu", kind, 80, 108, "none", f"verify_stand_ins:{kind}")
job = Job("merge", backend, "float32", "any")
report = verifying.settle([(machine, [job])], seconds=200, one_case=100)
getattr(verify_stand_ins, kind)()
_backends._environment_problem.cache_clear() if hasattr(_backends._environment_problem, "cache_clear") else None
bank = torch.randn(3, 37, 5)
want, ran = adamix_kernels.merge_experts(bank, backend="reference"), []
module = _backends._load("merge", backend)
real = module.experts_forward
module.experts_forward = lambda *given: (ran.append(real(*given)), ran[-1])[1]
got = adamix_kernels.merge_experts(bank)
print("ANSWER", json.dumps({
    "verdicts": [[v.state, v.why, v.cases] for v in report.verdicts], "chosen": list(report.chosen.values()),
    "ran": len(ran), "error": (got - want).abs().max().item(), "launched": verify_stand_ins.launched(kind),
}))
"""


def verified(kind, backend, tmp_path, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ADAMIX_CUDA_HOST")}
    environment |= {"ADAMIX_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, backend], env=environment | variables, capture_output=True, text=True,
        timeout=500, cwd=HERE.parent,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stdout + done.stderr
    answer = json.loads(lines[-1].removeprefix("ANSWER "))
    assert answer["verdicts"] == [["right", "", 7]]
    assert answer["chosen"] == [backend]
    assert answer["ran"] == 1
    assert answer["error"] < 1e-6
    assert answer["launched"]
    assert list(tmp_path.glob("verdicts/*.json"))
    return answer


def test_interpreted_kernels(tmp_path):
    pytest.importorskip("triton")
    verified("interpreted", "triton", tmp_path, TRITON_INTERPRET="1")


def test_compiled_ptx(tmp_path):
    from ptx_programs import needs_ptx

    needs_ptx()
    verified("ptx", "triton", tmp_path)


def test_csrc_on_the_cpu(tmp_path):
    variables = cuda_host.environment()
    wanted = ("ADAMIX_CUDA_HOST", "ADAMIX_HOST_ORDER")
    verified("csrc", "cuda", tmp_path, **{name: variables[name] for name in wanted})
