"""What the tests of the Triton backends share: a spy on launches, the device."""

import contextlib
import os
from unittest import mock

import pytest
import torch

from adamix_kernels.ops import _direct

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (kernel, args, meta) -> what Triton's JIT compiles one kernel for; set where compiled kernels run on the CPU.
specialised = None


def needs_triton():
    """Skips the module that calls it where kernels can neither be interpreted nor compiled."""
    if not INTERPRET and not GPU:
        pytest.skip("set TRITON_INTERPRET=1 or have a GPU", allow_module_level=True)
    pytest.importorskip("triton")


@contextlib.contextmanager
def launches(*modules, run=True, options=None, directly=False):
    """Names of the kernels launched by those modules; run=False leaves the launching out.

    options: a list that gets every launch's constants. directly: calls past the dispatcher are made, too.
    """
    names = []

    def spy(real):
        def launch(kernel, grid, device, *args, **meta):
            names.append(kernel.fn.__name__)
            if options is not None:
                options.append(meta)
            if run:
                real(kernel, grid, device, *args, **meta)

        return launch

    with contextlib.ExitStack() as stack:
        if not directly:
            stack.enter_context(_direct.switched_off())
        for module in modules:
            stack.enter_context(mock.patch.object(module, "launch", spy(module.launch)))
        yield names
