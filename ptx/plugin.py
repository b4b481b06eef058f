"""`pytest -p ptx.plugin`: the package's own Triton tests run the compiled PTX, instead of the interpreter.

What the executor reports fails the test that caused it. PTX_ARCH: 10 * compute capability (80). PTX_SIZE=small: of
every test's parametrisations a few (see `chosen`), each on one of the two architectures of the gate, in turn.
PTX_RECORD: a file for a summary of the run, JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from . import host as hosts
from .gate import chosen, in_turn
from .host import summary

ARCH = int(os.environ.get("PTX_ARCH", "80"))
HOST = hosts.install(ARCH)

sys.path.insert(0, str(Path(__file__).parent.parent / "python_tests" / "support"))
import triton_spy  # noqa: E402

triton_spy.needs_triton = lambda: None
triton_spy.INTERPRET, triton_spy.GPU, triton_spy.DEVICE = True, False, "cpu"  # cases are drawn for a CPU
triton_spy.specialised = HOST.specialised

# Tests of another subject than what a kernel does: part of a name -> who looks after it.
OTHER_SUBJECTS = {
    "test_triton_fuzz.py": "python -m ptx.fuzz draws such cases",
    "test_triton_verify.py": "of the interpreter; test_ptx_verify.py is its twin",
    "any_shape": "python -m ptx.fuzz draws such cases",
    "any_size": "python -m ptx.fuzz draws such cases",
    "no_tensor_value_reaches_python": "nothing is launched",
    "tiles_cover_every_column": "nothing is launched",
    "torch_compile": "of PyTorch, not of the kernels",
    "opcheck": "of PyTorch, not of the kernels",
    "cuda_graph": "needs a GPU",
}
# Left out by the small size besides.
SEEN_ANYWAY = {
    "same_bits": "the orders of every launch are compared bit by bit",
    "it_has_the_bits": "the orders of every launch are compared bit by bit",
    "change_no_bit": "the orders of every launch are compared bit by bit",
    "only_what_is_needed": "kernels of other tests; make ptx-nightly",
    "finite_differences": "kernels of other tests; make ptx-nightly",
    "takes_two_steps": "kernels of other tests; make ptx-nightly",
    "strides_do_not": "python -m ptx.fuzz draws strides",
    "sliced": "python -m ptx.fuzz draws strides",
    "one_launch": "kernels of other tests; make ptx-nightly",
    "autocast": "kernels of other tests; make ptx-nightly",
    "unused_expert": "python -m ptx.fuzz draws unused experts",
    "infinit": "python -m ptx.fuzz draws infinities",
    "the_layer_calls_it": "kernels of other tests; make ptx-nightly",
}
# Parts of the names of parametrisations that the small size runs whatever their number: the widest tile of float32, the
# most steps of a row that registers hold, and the one test that must reach rescale_kernel.
ALSO = ("chosen-256 columns of float32", "7 held-True", "leaves_it_alone[few]")
_counts = {"run": 0, "failed": 0, "skipped": 0}
_left_out: dict[str, int] = {}


def reason_for(path: str, test: str, small: bool) -> str | None:
    """Why a test is left out in every parametrisation, or None."""
    reasons = OTHER_SUBJECTS | (SEEN_ANYWAY if small else {})
    return next((reason for part, reason in reasons.items() if part in f"{path}::{test}"), None)


def pytest_collection_modifyitems(config, items):
    small, groups, kept, dropped = os.environ.get("PTX_SIZE") == "small", {}, [], []
    before = 0
    for item in items:
        groups.setdefault((item.path.name, item.originalname), []).append(item)
    for (path, test), together in groups.items():
        reason = reason_for(path, test, small)
        take = set() if reason else chosen(len(together)) if small else set(range(len(together)))
        if small and not reason:
            take, before = in_turn(take, ARCH, before), before + len(take)
            take |= {number for number, item in enumerate(together) if any(part in item.name for part in ALSO)}
        if len(take) < len(together):
            said = reason or "further parametrisations, and what the other architecture runs: make ptx-nightly"
            _left_out[said] = _left_out.get(said, 0) + len(together) - len(take)
        for number, item in enumerate(together):
            (kept if number in take else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item in set(kept)]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    HOST.begin()
    outcome = yield
    if HOST.reports and outcome.excinfo is None:
        outcome.force_exception(AssertionError(summary(HOST.reports)))


def pytest_runtest_logreport(report):
    if report.when == "call":
        _counts["failed" if report.failed else "skipped" if report.skipped else "run"] += 1
    elif report.failed:
        _counts["failed"] += 1


def pytest_terminal_summary(terminalreporter):
    record = {
        "arch": ARCH, **_counts, "left_out": _left_out, "launches": len(HOST.launches), "variants": len(HOST.kernels),
        "kernels": sorted(HOST.reached), "compile_seconds": HOST.compile_seconds,
    }  # fmt: skip
    terminalreporter.write_line(f"sm_{ARCH}: {HOST}")
    if os.environ.get("PTX_RECORD"):
        Path(os.environ["PTX_RECORD"]).write_text(json.dumps(record))


def pytest_sessionfinish(session, exitstatus):
    if not HOST.launches and not session.config.option.collectonly:
        session.exitstatus = 5
