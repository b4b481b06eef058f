"""routed_lora's forward in tiles of 64 rows (triton_impl/plan.py), which read the weights half as often."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

from unittest import mock

import pytest
import torch
from triton_spy import DEVICE, DTYPES, needs_triton

needs_triton()

from plain_lora import draw_lora, run_lora

from adamix_kernels.ops.routed_lora import triton_impl
from adamix_kernels.ops.routed_lora.triton_impl import plan
from adamix_kernels.testing import assert_in_budget


def heights(
    capability=90, *, kernel="lora_forward_kernel", rank=48, batch=16, tokens=512, dtype=torch.bfloat16, flat=True
):
    bank = torch.empty(4, rank, 64, dtype=dtype), torch.empty(1, 64, rank, dtype=dtype)
    index = torch.zeros(batch if flat else (batch, tokens), dtype=torch.int64)
    call = plan.make_call(batch, tokens, *bank, index, None, [0], 64)._replace(capability=capability)
    with mock.patch.object(plan, "INTERPRETING", False):
        meta, (tiles, _), _ = call.tiles(kernel, 64)
    assert tiles * meta["BLOCK_M"] >= batch * tokens
    return meta["BLOCK_M"]


def test_where_tiles_are_tall():
    assert heights() == heights(100) == heights(rank=64) == heights(batch=32, tokens=256) == 64
    assert heights(80) == heights(120) == 32  # two of them have no room in shared memory
    assert heights(kernel="lora_dx_kernel") == heights(rank=32) == heights(dtype=torch.float32) == 32
    assert heights(batch=15) == 32  # fewer than 128 programs
    assert heights(batch=64, tokens=128) == 32
    assert heights(rank=16, flat=False) == 32  # all experts' columns in one tile


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("rank", "dropout_p"), [(48, 0.0), (40, 0.3)])
def test_tall_tiles(rank, dropout_p, dtype, monkeypatch):
    monkeypatch.setattr(plan, "MIN_PROGRAMS", 2)
    monkeypatch.setattr(plan, "TALL_SPAN", 1)
    monkeypatch.setattr(plan, "may_be_tall", lambda kernel, *_: kernel == "lora_forward_kernel")
    tensors, options = draw_lora(DEVICE, batch=2, tokens=70, features=136, rank=rank, per_group=72, dtype=dtype)
    with mock.patch.object(triton_impl, "launch", side_effect=triton_impl.launch) as launched:
        runs = [run_lora(backend, tensors, options, dropout_p) for backend in ("triton", "reference")]
        assert_in_budget(*runs, *tensors, multiple=2.0)
    assert [call.kwargs["BLOCK_M"] for call in launched.call_args_list][:2] == [64, 32]
