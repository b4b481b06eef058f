"""Calls past the dispatcher (ops/_direct.py): who takes them, and that no plan serves another call than its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from once import once
from suite_size import NIGHTLY

ROOT = Path(__file__).parents[2]


SEEN = [(1, 250), (2, 250), (3, 150, None, None, True)] if NIGHTLY else [(1, 60), (3, 50, None, None, True)]
BLIND = [("hidden", 0), ("batch", 0), ("dtype", 1), ("contiguous", 3), ("offset", 4), ("one_index", "apart")]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(exit status, output) of each, from host_calls.py in a process which no GPU and no interpreter may serve."""
    pytest.importorskip("triton")
    calls = [*SEEN, *((2, 200, *blind) for blind in BLIND)]
    folder = once(tmp_path_factory, "host_calls", lambda folder: launch(calls, folder))
    found = sorted(folder.iterdir(), key=lambda path: int(path.stem))
    names = [call if call in SEEN else call[2:] for call in calls]
    return {name: (path.suffix, path.read_text()) for name, path in zip(names, found, strict=True)}


def launch(calls, folder):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ADAMIX_CUDA_HOST")}
    paths = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(ROOT / "python_tests" / "support" / "host_calls.py"), str(folder), json.dumps(calls)],
        env={**environment, "PYTHONPATH": paths}, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("seed", SEEN)
def test_two_calls_that_differ_in_one_property_launch_what_they_launch_unplanned(seed, ended):
    status, said = ended[seed]
    assert status == ".0", said


@pytest.mark.parametrize(("changed", "trait"), BLIND)
def test_a_plan_that_does_not_see_a_trait_is_caught(changed, trait, ended):
    status, said = ended[changed, trait]
    assert status == ".1", said
    assert f": {changed}: " in said or "RuntimeError" in said
