"""routed_lora's input gradient on the adapter's tiles that stay in registers (csrc/routed_adapter/resident_bwd.h): the
calls that take them, on the CPU or a GPU."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, ON_HOST, needs_cuda

needs_cuda()

from plain_lora import draw_lora, run_lora

from adamix_kernels.ops.routed_lora import cuda_impl
from adamix_kernels.testing import assert_in_budget
from reliability.fuzz_cuda import launch_names

HALVES = [torch.float16, torch.bfloat16]
SHAPES = {
    "16 rows": dict(b_kind="sample", batch=2, tokens=24, features=512, rank=48, per_group=512),
    "16 rows, tokens": dict(a_kind="token", b_kind="token", batch=1, tokens=37, features=256, rank=20, per_group=256),
    "64 rows": dict(b_kind="sample", batch=2, tokens=70, features=192, rank=48, per_group=192),
    "64 rows, tokens": dict(a_kind="token", b_kind="sample", batch=2, tokens=67, features=64, rank=20, per_group=64),
    "64 rows, rank 64": dict(a_kind="none", batch=1, tokens=130, features=64, rank=64, per_group=64),
}


def check(tensors, options):
    runs = [run_lora(backend, tensors, options) for backend in ("cuda", "reference")]
    assert_in_budget(*runs, *tensors, multiple=2.0)


def backward(tensors, options, needs=(True, True, True)):
    x, a, b, base, dy = tensors
    tail = options["a_index"], options["b_index"]
    last = options["scaling"], options["groups"], list(options["output_offsets"]), 0.0
    _, t = cuda_impl.forward(x, a, b, *tail, base, None, *last)
    return cuda_impl.backward(dy, x, t, a, b, *tail, None, *needs, *last)


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=list(SHAPES))
def test_every_shape(number, monkeypatch):
    case = list(SHAPES)[number]
    if ON_HOST:  # a multiprocessor has many rows, or few
        monkeypatch.setenv("ADAMIX_HOST_MULTIPROCESSORS", "1" if case.startswith("64") else "64")
    for dtype in HALVES:
        check(*draw_lora(DEVICE, dtype=dtype, **SHAPES[case]))


@pytest.mark.sanitize
@pytest.mark.parametrize("case", ["16 rows", "64 rows, tokens"])
def test_memory_and_barriers(case):
    check(*draw_lora(DEVICE, dtype=torch.bfloat16, **SHAPES[case]))


def test_columns_of_a_wider_gradient():
    """The columns behind and before the factor's own change nothing."""
    (x, a, b, base, dy), options = draw_lora(DEVICE, dtype=torch.bfloat16, **SHAPES["64 rows"])
    want = backward([x, a, b, base, dy], options)
    wide = torch.nn.functional.pad(dy, (8, 16), value=float("nan"))
    base = torch.nn.functional.pad(base, (8, 16))
    got = backward([x, a, b, base, wide], options | dict(output_offsets=(8,)))
    assert all(torch.equal(mine, full) for mine, full in zip(got, want))


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize(
    ("other", "dropout_p", "capability"),
    [
        (dict(), 0.0, 90),
        (dict(), 0.0, 80),
        (dict(), 0.3, 90),
        (dict(rank=16, a_kind="token"), 0.0, 90),
        (dict(rank=22), 0.0, 90),
        (dict(rank=20, groups=2), 0.0, 90),
        (dict(per_group=128), 0.0, 90),
    ],
)
def test_which_calls_take_them(other, dropout_p, capability, monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", str(capability))
    tensors, options = draw_lora(DEVICE, dtype=torch.bfloat16, **(SHAPES["64 rows"] | other))
    with launch_names() as names:
        run_lora("cuda", tensors, options, dropout_p)(*tensors)
    assert ("routed_adapter_input_grad" in names) == ((other, dropout_p, capability) == ({}, 0.0, 90))


@pytest.mark.parametrize("needs", [(True, False, True), (True, False, False), (False, True, False)])
def test_only_what_is_needed_is_computed(needs):
    tensors, options = draw_lora(DEVICE, dtype=torch.bfloat16, **SHAPES["64 rows, tokens"])
    want, got = (backward(tensors, options, n) for n in ((True, True, True), needs))
    for mine, full, needed in zip(got, want, needs):
        torch.testing.assert_close(mine, full if needed else full.new_empty(0))


@pytest.mark.parametrize("case", ["16 rows, tokens", "64 rows"])
def test_what_others_hold_stays_with_them(case):
    """Infinities in the rows of one expert, and in another's factors, reach no row of the rest; nor do wrong ids."""
    tensors, options = draw_lora(DEVICE, dtype=torch.bfloat16, **(SHAPES[case] | dict(b_kind="token")))
    a_index, b_index = options["a_index"], options["b_index"]
    clean = backward(tensors, options)
    x, a, b, base, dy = (t.clone() for t in tensors)
    lost = b_index == 2
    dy[lost] = float("inf")
    a[3], b[2], b[3] = float("nan"), float("inf"), float("nan")
    wrong = a_index.clone()
    wrong.view(-1)[1] = 77
    unserved = (wrong == 77).view(x.shape[0], -1).expand(lost.shape)
    dx, da, db = backward([x, a, b, base, dy], options | dict(a_index=wrong))
    assert torch.equal(dx[~lost & ~unserved], clean[0][~lost & ~unserved])
    assert dx[unserved].isnan().all()
    assert da[3].eq(0).all()
    assert db[3].eq(0).all()
