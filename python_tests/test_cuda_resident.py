"""routed_adapter's tiles that stay in registers (csrc/routed_adapter/resident_tile.h), on the CPU or a GPU."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, needs_cuda

needs_cuda()

from adapter_cases import draw_adapter, run_adapter

from adamix_kernels.testing import assert_in_budget

HALVES = [torch.float16, torch.bfloat16]
# batch, tokens, H, r, experts down and up, routing down and up; the tile that serves: rows, columns a warp
SHAPES = {
    "16 rows": (2, 21, 256, 16, 3, 2, "sample", "sample"),
    "16 rows, rank 48": (2, 24, 512, 48, 2, 1, "sample", None),
    "32 rows": (3, 96, 128, 16, 3, 2, "sample", "sample"),
    "32 rows, rank 4": (2, 71, 384, 4, 2, 1, "sample", None),
    "32 rows, tokens": (1, 140, 128, 8, 4, 3, "token", "token"),
    "64 rows": (2, 70, 192, 48, 2, 2, "sample", "sample"),
    "64 rows, tokens": (1, 100, 64, 20, 3, 2, "token", "sample"),
    "one pass": (3, 40, 256, 8, 3, 1, "sample", None),
    "one pass, many samples a block": (11, 17, 320, 16, 3, 2, "sample", "sample"),
    "one pass, one expert": (1, 150, 256, 4, 1, 1, None, None),
    "64 rows, rank 64": (1, 130, 64, 64, 1, 1, None, None),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", SHAPES)
def test_every_tile(case, dtype):
    tensors, indices = draw_adapter(DEVICE, dtype, *SHAPES[case])
    runs = [run_adapter(backend, tensors, indices, "input", "gelu") for backend in ("cuda", "reference")]
    assert_in_budget(*runs, *(t for t in tensors if t is not None), multiple=2.0)
