"""What the tests of verification share: a cache folder of their own, a child that finds the stand-ins, or none."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from verify_stand_ins import FAULTS, PLAIN

from adamix_kernels import _auto, verifying
from adamix_kernels.verifying import prover, verdicts
from adamix_kernels.verifying.machine import Job
from adamix_kernels.verifying.verdicts import Store

HERE = Path(__file__).parent
ADAPTER = Job("routed_adapter", "triton", "float32", "narrow")


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A cache folder, a table and warnings of the test's own; the child finds the stand-ins."""
    monkeypatch.setenv("ADAMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADAMIX_AUTO", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    monkeypatch.setattr(verifying, "_told", set())
    monkeypatch.setattr(verdicts, "_warned", set())
    before = _auto.freeze({})
    yield
    _auto.restore(before)


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def faults(monkeypatch):
    """faults({"op backend dtype shape": name}) for the processes that verify."""
    return lambda given: monkeypatch.setenv(FAULTS, json.dumps(given))


@pytest.fixture
def no_child(monkeypatch):
    """A test in which no process may be started."""
    monkeypatch.setattr(prover.Child, "__enter__", lambda self: pytest.fail("a process was started"))


def right(job=ADAPTER, **changes):
    """A verdict that was reached, on the plain stand-in."""
    return replace(verdicts.verdict(job, PLAIN, verdicts.RIGHT, cases=3), **changes)
