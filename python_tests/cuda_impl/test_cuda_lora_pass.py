"""routed_lora's backward in one pass (csrc/common/one_pass.h): the shapes that take it, on the CPU or a GPU."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, ON_HOST, needs_cuda, runtime_calls

needs_cuda()

from plain_lora import draw_lora, run_lora

from adamix_kernels.ops.routed_lora import cuda_impl
from adamix_kernels.testing import assert_in_budget
from reliability.fuzz_cuda import launch_names

HALVES = [torch.float16, torch.bfloat16]
SHAPES = {
    "few rows": dict(b_kind="sample", batch=2, tokens=70, features=256, rank=16, per_group=256),
    "A alone": dict(batch=3, tokens=40, features=256, rank=8, per_group=256),
    "many samples a block": dict(b_kind="sample", batch=13, tokens=17, features=320, rank=4, per_group=320),
    "one expert": dict(a_kind="none", batch=1, tokens=150, features=256, rank=12, per_group=256),
}
MANY = SHAPES["many samples a block"]


def check(tensors, options, dropout_p=0.0):
    runs = [run_lora(backend, tensors, options, dropout_p) for backend in ("cuda", "reference")]
    assert_in_budget(*runs, *(t for t in tensors if t is not None), multiple=2.0)


def backward(tensors, options, needs=(True, True, True), dropout_p=0.3):
    x, a, b, base, dy = tensors
    seed = torch.tensor(11, device=DEVICE) if dropout_p else None
    tail = options["a_index"], options["b_index"]
    last = options["scaling"], options["groups"], list(options["output_offsets"]), dropout_p
    _, t = cuda_impl.forward(x, a, b, *tail, base, seed, *last)
    return cuda_impl.backward(dy, x, t, a, b, *tail, seed, *needs, *last)


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=list(SHAPES))
def test_every_shape(number):
    case = list(SHAPES.values())[number]
    check(*draw_lora(DEVICE, dtype=HALVES[number % 2], **case), 0.3 if number in (0, 2) else 0.0)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", ["few rows", "many samples a block"])
def test_memory_and_barriers(case):
    check(*draw_lora(DEVICE, dtype=torch.bfloat16, **SHAPES[case]), 0.3)


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize("case", SHAPES)
def test_it_is_two_launches(case):
    tensors, options = draw_lora(DEVICE, dtype=torch.bfloat16, **SHAPES[case])
    with launch_names() as names:
        backward(tensors, options)
    assert list(names)[1:] == ["routed_lora_one_pass", "routed_lora_pass_sum"]


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize(
    "other", [dict(per_group=248), dict(rank=20), dict(rank=6), dict(a_kind="token"), dict(features=264, per_group=264)]
)
def test_other_calls_read_grad_out_twice(other):
    sizes = dict(batch=1, tokens=8, features=256, rank=8, per_group=256) | other
    tensors, options = draw_lora(DEVICE, dtype=torch.bfloat16, **sizes)
    with launch_names() as names:
        check(tensors, options, 0.3)
    assert "routed_lora_one_pass" not in names


@pytest.mark.parametrize("needs", [(True, False, True), (False, True, False), (False, False, True)])
def test_only_what_is_needed_is_computed_with_the_same_bits(needs):
    tensors, options = draw_lora(DEVICE, dtype=torch.bfloat16, **MANY)
    want, got = (backward(tensors, options, n) for n in ((True, True, True), needs))
    for mine, full, needed in zip(got, want, needs):
        assert torch.equal(mine, full if needed else full.new_empty(0))


@pytest.mark.skipif(not ON_HOST, reason="a GPU orders its threads itself")
def test_the_same_bits_in_any_order(monkeypatch):
    tensors, options = draw_lora(DEVICE, dtype=torch.bfloat16, **MANY)
    want = backward(tensors, options)
    for order in ("reverse", "2"):
        monkeypatch.setenv("ADAMIX_HOST_ORDER", order)
        assert all(torch.equal(a, b) for a, b in zip(backward(tensors, options), want))


@pytest.mark.skipif(not ON_HOST, reason="the device is pretended")
@pytest.mark.parametrize(
    "device",
    [
        {"ADAMIX_HOST_CLUSTER": "1"},
        {"ADAMIX_HOST_SHARED": "54000"},  # no room for the weights
        {"ADAMIX_HOST_MULTIPROCESSORS": "3"},
        {"ADAMIX_HOST_MULTIPROCESSORS": "8"},  # clusters of 8
    ],
)
def test_every_device(device, monkeypatch):
    for name, value in device.items():
        monkeypatch.setenv(name, value)
    check(*draw_lora(DEVICE, dtype=torch.bfloat16, **MANY), 0.3)
    runtime_calls()


def test_what_others_hold_stays_with_them():
    """Infinities in the rows of one expert, and in another's factors, reach no row and no gradient of the rest."""
    tensors, options = draw_lora(DEVICE, dtype=torch.bfloat16, **MANY)
    chosen = torch.arange(MANY["batch"], device=DEVICE)
    options |= dict(a_index=chosen % 3, b_index=chosen // 2 % 3)
    clean = backward(tensors, options)
    x, a, b, base, dy = (t.clone() for t in tensors)
    lost = (options["a_index"] == 0) | (options["b_index"] == 1)
    x[lost], dy[lost] = float("inf"), float("nan")
    a[0], a[3], b[1], b[3] = float("inf"), float("nan"), float("inf"), float("nan")
    dx, da, db = backward([x, a, b, base, dy], options)
    assert torch.equal(dx[~lost], clean[0][~lost])
    assert da[3].eq(0).all()
    assert db[3].eq(0).all()


def test_a_dropped_element_counts_nothing_whatever_it_holds():
    """x is infinite where it is dropped: dA has the bits of finite values there, and dx is zero."""
    sizes = SHAPES["few rows"]
    tensors, options = draw_lora(DEVICE, dtype=torch.bfloat16, **sizes)
    clean = backward(tensors, options)
    dropped = clean[0].eq(0)
    assert 0.25 < dropped.float().mean() < 0.35
    tensors[0] = tensors[0].masked_fill(dropped, float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(backward(tensors, options), clean))


def test_ids_outside_the_banks_are_rows_of_nan_alone():
    tensors, options = draw_lora(DEVICE, dtype=torch.float16, **MANY)
    bad = options["a_index"].clone()
    bad[1] = 77
    good = backward(tensors, options)[0]
    dx, *grads = backward(tensors, options | dict(a_index=bad))
    assert dx[1].isnan().all()
    kept = bad != 77
    assert torch.equal(dx[kept], good[kept])
    assert all(grad.isfinite().all() for grad in grads)
