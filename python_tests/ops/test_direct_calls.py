"""Calls past the dispatcher (ops/_direct.py): who takes them, and that no plan serves another call than its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    """host_calls.py in a process of its own, which no GPU and no interpreter may serve: (exit status, output)."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ADAMIX_CUDA_HOST")}
    paths = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(ROOT / "python_tests" / "support" / "host_calls.py"), *map(str, arguments)],
        env={**environment, "PYTHONPATH": paths}, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("seed", [1, 2])
def test_two_calls_that_differ_in_one_property_launch_what_they_launch_unplanned(seed):
    status, said = run(seed, 250)
    assert status == 0, said


@pytest.mark.parametrize(
    ("changed", "trait"),
    [("hidden", 0), ("batch", 0), ("dtype", 1), ("contiguous", 3), ("offset", 4), ("one_index", "apart")],
)
def test_a_plan_that_does_not_see_a_trait_is_caught(changed, trait):
    status, said = run(2, 200, changed, trait)
    assert status == 1, said
    assert f": {changed}: " in said or "RuntimeError" in said
