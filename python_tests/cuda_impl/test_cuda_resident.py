"""routed_adapter's tiles that stay in registers or shared memory, and its backward in one pass
(csrc/routed_adapter/resident_tile.h, held_fwd.h, one_pass.h): the shapes that take them, on the CPU or a GPU."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, ON_HOST, needs_cuda, runtime_calls

needs_cuda()

from adapter_cases import draw_adapter, run_adapter

from adamix_kernels.ops.routed_adapter import cuda_impl
from adamix_kernels.testing import assert_in_budget
from reliability.fuzz_cuda import launch_names

HALVES = [torch.float16, torch.bfloat16]
# batch, tokens, H, r, experts down and up, routing down and up
TILES = {
    "16 rows": (1, 37, 256, 12, 3, 2, "token", "token"),
    "16 rows, rank 48": (2, 24, 512, 48, 2, 1, "sample", None),
    "32 rows": (3, 96, 128, 16, 3, 2, "sample", "sample"),
    "32 rows, rank 4": (2, 71, 384, 4, 2, 1, "token", None),
    "32 rows, tokens": (1, 140, 128, 8, 4, 3, "token", "token"),
    "64 rows": (2, 70, 192, 48, 2, 2, "sample", "sample"),
    "64 rows, tokens": (1, 100, 64, 20, 3, 2, "token", "sample"),
    "64 rows, rank 64": (1, 130, 64, 64, 1, 1, None, None),
}
ONE_PASS = {
    "few rows": (2, 70, 256, 16, 3, 2, "sample", "sample"),
    "one side": (3, 40, 256, 8, 3, 1, "sample", None),
    "many samples a block": (13, 17, 320, 4, 3, 2, "sample", "sample"),
    "one expert": (1, 150, 256, 4, 1, 1, None, None),
    "an expert a sample": (12, 16, 256, 8, 12, 1, "sample", None),
}
# Of a GPU without these products.
HELD = {
    "rank 16": (2, 50, 128, 16, 3, 2, "sample", "sample"),
    "rank 24, tokens": (1, 67, 144, 24, 3, 2, "token", "sample"),
    "rank 64": (2, 31, 272, 64, 1, 2, None, "sample"),
    "too wide": (1, 33, 1536, 8, 2, 1, "sample", None),
}


def check(tensors, indices, residual="input", activation="gelu"):
    runs = [run_adapter(backend, tensors, indices, residual, activation) for backend in ("cuda", "reference")]
    assert_in_budget(*runs, *(t for t in tensors if t is not None), multiple=2.0)


@pytest.mark.parametrize("number", range(len(TILES | ONE_PASS)), ids=list(TILES | ONE_PASS))
def test_every_tile(number):
    case = list((TILES | ONE_PASS).values())[number]
    check(*draw_adapter(DEVICE, HALVES[number % 2], *case))


@pytest.mark.parametrize("residual", ["none", "other"])
@pytest.mark.parametrize("case", ["32 rows", "64 rows", "few rows"])
def test_every_residual(case, residual):
    check(*draw_adapter(DEVICE, torch.bfloat16, *(TILES | ONE_PASS)[case]), residual, "silu")


def test_a_residual_that_begins_where_x_does_is_not_x():
    (x, *banks), indices = draw_adapter(DEVICE, torch.bfloat16, *TILES["32 rows"])
    banks = banks[:4]
    for of, other in ((x, x[:, :1].expand_as(x)), (x[:, ::2], x[:, :48])):
        want = cuda_impl.forward(of, *banks, *indices, other.clone(), False, "gelu")[0]
        assert torch.equal(cuda_impl.forward(of, *banks, *indices, other, False, "gelu")[0], want)


@pytest.mark.parametrize("case", ["32 rows", "many samples a block"])
def test_without_biases(case):
    check(*draw_adapter(DEVICE, torch.float16, *(TILES | ONE_PASS)[case], None, False), "input", "relu")


@pytest.mark.sanitize
@pytest.mark.parametrize("case", ["32 rows, tokens", "64 rows", "few rows", "many samples a block"])
def test_memory_and_barriers(case):
    check(*draw_adapter(DEVICE, torch.bfloat16, *(TILES | ONE_PASS)[case]))


def backward(x, banks, dy, indices, needs=(True, True, True), activation="gelu"):
    _, pre = cuda_impl.forward(x, *banks, *indices, None, True, activation)
    return cuda_impl.backward(dy, x, pre, banks[0], banks[2], *indices, *needs, True, activation)


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize("case", ONE_PASS)
def test_one_pass_is_two_launches(case):
    (x, *banks, dy), indices = draw_adapter(DEVICE, torch.bfloat16, *ONE_PASS[case])
    with launch_names() as names:
        backward(x, banks, dy, indices)
    assert list(names) == ["routed_adapter_forward", "routed_adapter_one_pass", "routed_adapter_pass_sum"]


@pytest.mark.parametrize("needs", [(True, False, True), (False, True, False), (False, False, True)])
def test_only_what_is_needed_is_computed_with_the_same_bits(needs):
    (x, *banks, dy), indices = draw_adapter(DEVICE, torch.bfloat16, *ONE_PASS["many samples a block"])
    want, got = (backward(x, banks, dy, indices, n) for n in ((True, True, True), needs))
    for mine, full, needed in zip(got, want, (needs[0], *needs[1:2] * 2, *needs[2:] * 2)):
        assert torch.equal(mine, full if needed else x.new_empty(0))


@pytest.mark.skipif(not ON_HOST, reason="a GPU orders its threads itself, and has the clusters it has")
@pytest.mark.parametrize("setting", [("ADAMIX_HOST_ORDER", "reverse"), ("ADAMIX_HOST_ORDER", "2")])
def test_the_same_bits_in_any_order(setting, monkeypatch):
    (x, *banks, dy), indices = draw_adapter(DEVICE, torch.bfloat16, *ONE_PASS["many samples a block"])
    want = backward(x, banks, dy, indices)
    monkeypatch.setenv(*setting)
    assert all(torch.equal(a, b) for a, b in zip(backward(x, banks, dy, indices), want))


@pytest.mark.skipif(not ON_HOST, reason="the device is pretended")
@pytest.mark.parametrize(
    "device",
    [
        {"ADAMIX_HOST_CLUSTER": "1"},
        {"ADAMIX_HOST_CLUSTER_RUN": "1", "ADAMIX_HOST_MULTIPROCESSORS": "8"},
        {"ADAMIX_HOST_CAPABILITY": "80", "ADAMIX_HOST_SHARED": "166912"},
        {"ADAMIX_HOST_SHARED": "52000"},  # no room for the weights
        {"ADAMIX_HOST_MULTIPROCESSORS": "3"},
        {"ADAMIX_HOST_MULTIPROCESSORS": "8"},  # clusters of 8, whose blocks hold sums of several experts
        {"ADAMIX_HOST_MULTIPROCESSORS": "8", "ADAMIX_HOST_CLUSTER": "2"},
    ],
)
def test_every_device(device, monkeypatch):
    for name, value in device.items():
        monkeypatch.setenv(name, value)
    check(*draw_adapter(DEVICE, torch.bfloat16, *ONE_PASS["many samples a block"]))
    runtime_calls()


@pytest.mark.skipif(not ON_HOST, reason="the device is pretended")
def test_sm_75_has_these_products_of_float16(monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", "75")
    monkeypatch.setenv("ADAMIX_HOST_SHARED", "65536")
    check(*draw_adapter(DEVICE, torch.float16, *TILES["32 rows"]))


@pytest.mark.skipif(not ON_HOST, reason="the device is pretended")
@pytest.mark.parametrize("residual", ["input", "none", "other"])
@pytest.mark.parametrize("case", HELD)
def test_a_v100_holds_tiles_in_shared_memory(case, residual, monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", "70")
    monkeypatch.setenv("ADAMIX_HOST_SHARED", "98304")
    with launch_names() as names:
        check(*draw_adapter(DEVICE, torch.float16, *HELD[case]), residual)
    assert ("routed_adapter_held_forward" in names) == (case != "too wide")


@pytest.mark.parametrize("case", ["32 rows, tokens", "64 rows", "many samples a block"])
def test_infinite_weights_of_one_expert_do_not_reach_rows_of_another(case):
    """Bit for bit what finite weights there give; an expert that serves nobody gets exactly zero."""
    batch, tokens, hidden, r, _, _, kind, _ = (TILES | ONE_PASS)[case]
    tensors, (chosen, _) = draw_adapter(DEVICE, torch.bfloat16, batch, tokens, hidden, r, 4, 4, kind, kind)
    number = torch.arange(chosen.numel(), device=DEVICE).view(chosen.shape)
    indices = [number % 3, number // 2 % 3]
    clean = run_adapter("cuda", tensors, indices)(*tensors)
    poisoned = [t.clone() for t in tensors]
    for bank in poisoned[1:5]:
        bank[0], bank[3] = float("inf"), float("nan")  # expert 3 serves no row
    got = run_adapter("cuda", tensors, indices)(*poisoned)
    theirs = ((indices[0] != 0) & (indices[1] != 0)).view(batch, -1).expand(batch, tokens)
    for mine, before in zip(got[:2], clean[:2]):
        assert torch.equal(mine[theirs], before[theirs])
    for grad in got[2:]:
        assert grad[3].eq(0).all()


@pytest.mark.parametrize("case", ["32 rows, tokens", "64 rows", "many samples a block"])
def test_ids_outside_the_banks_are_rows_of_nan_alone(case):
    tensors, indices = draw_adapter(DEVICE, torch.float16, *(TILES | ONE_PASS)[case])
    x, *banks, dy = tensors
    bad = indices[0].clone()
    bad.view(-1)[1] = 77
    lost = (bad == 77).view(x.shape[0], -1).expand(x.shape[:2])
    out, pre = cuda_impl.forward(x, *banks, bad, indices[1], None, True, "gelu")
    good = cuda_impl.forward(x, *banks, *indices, None, True, "gelu")[0]
    assert out[lost].isnan().all()
    assert torch.equal(out[~lost], good[~lost])
    dx, *grads = cuda_impl.backward(dy, x, pre, banks[0], banks[2], bad, indices[1], True, True, True, True, "gelu")
    assert dx[lost].isnan().all()
    assert dx[~lost].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
