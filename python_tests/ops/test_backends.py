"""Selection of a backend, and what backends() says."""

import os
import subprocess
import sys

import pytest
import torch

import adamix_kernels
from adamix_kernels import _backends


def _call(backend):
    x = torch.ones(2, 3, 4)
    down, up = torch.ones(1, 2, 4), torch.ones(1, 4, 2)
    return adamix_kernels.routed_adapter(x, down, None, up, None, None, None, backend=backend)


def test_every_backend_reports_a_state_and_a_reason():
    states = adamix_kernels.backends()
    assert set(states) == {"reference", "triton", "cuda"}
    assert states["reference"].usable
    assert set(states["reference"].ops) == set(_backends.OPS)
    for name, state in states.items():
        assert state.name == name
        assert state.reason


def test_triton_is_not_called_usable_where_nothing_can_run_it():
    code = "import adamix_kernels; s = adamix_kernels.backends()['triton']; print(s.usable, s.reason)"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("False "), done.stdout + done.stderr
    assert "triton" in done.stdout.lower()


def test_auto_on_the_cpu_is_the_reference():
    assert torch.equal(_call("auto"), _call("reference"))
    module = _backends.select("routed_adapter", "auto", "cpu", torch.float32)
    assert module.__name__ == "adamix_kernels.ops.routed_adapter.reference"


@pytest.mark.parametrize("op", _backends.OPS)
def test_auto_takes_no_kernel_that_was_not_verified_here(op):
    module = _backends.select(op, "auto", "cuda", torch.float16)
    assert module.__name__ == f"adamix_kernels.ops.{op}.reference"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_an_explicit_request_is_refused_with_its_reason_never_replaced(backend):
    with pytest.raises(
        adamix_kernels.BackendUnavailableError, match=f"backend='{backend}' cannot serve routed_adapter.*: ."
    ):
        _call(backend)


def test_an_unknown_backend_names_the_argument():
    with pytest.raises(ValueError, match="backend: got 'fast', expected one of"):
        _call("fast")


def test_selection_happens_while_tracing_too():
    compiled = torch.compile(lambda: _call("cuda"), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="cannot serve routed_adapter"):
        compiled()
