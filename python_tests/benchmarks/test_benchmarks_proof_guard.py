"""What a test that hangs, or that loses the GPU, costs the tests of the GPU proof: itself alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.proof import tests as proof_tests

ROOT = Path(__file__).parents[2]
LOSING = """
import time
import benchmarks.proof.guard as guard
def test_bad():
    guard._no_answer = lambda: 'an illegal address'
    assert 1 == 2, 'a kernel'
def test_fine():
    pass
"""


@pytest.mark.parametrize(("code", "status", "words"), [
    (LOSING, 70, "the GPU no longer answers: an illegal address"),
    ("import time, benchmarks.proof.guard as g\ng.LONGEST = 0.5\ndef test_x(): time.sleep(60)\n", 71, "took over 0 s"),
])  # fmt: skip
def test_a_process_that_the_gpu_is_lost_for_ends(code, status, words, tmp_path):
    """As one of xdist's would, which another replaces."""
    test, ends = tmp_path / "test_x.py", tmp_path / "ends"
    test.write_text(code)
    environment = {**os.environ, "PYTEST_XDIST_WORKER": "gw0", "ADAMIX_GUARD_ENDS": str(ends)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", proof_tests.GUARD, str(test)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == status, done.stdout + done.stderr
    assert words in ends.read_text()


@pytest.mark.nightly
def test_a_test_that_loses_the_gpu_and_a_file_that_is_none_cost_one_each(tmp_path):
    pytest.importorskip("xdist")
    test = tmp_path / "test_x.py"
    test.write_text(LOSING)
    broken = tmp_path / "test_y.py"
    broken.write_text("import no_such_package\n")
    stage = proof_tests.stage_of_tests("tests/x", [broken, test], 60, 0.0)
    environment = {**os.environ, **stage.environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(stage.command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert proof_tests.count_tests(done.stdout) == {"FAILED": 1, "PASSED": 1}, done.stdout + done.stderr
    assert "at once: FAILED" in done.stdout
    assert "No module named 'no_such_package'" in done.stdout
    assert "the GPU no longer answers: an illegal address" in done.stdout
    # Cut off before the summary, it is named as well.
    passed, words = proof_tests.read_tests(-15, done.stdout.partition("= FAILURES =")[0])
    assert not passed
    assert "test_bad" in words
