"""Weight gradients of tiles in the order of their experts (csrc/common/sample_grads.h), of both routed ops: the shapes
that take them, on the CPU or a GPU."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, ON_HOST, needs_cuda, runtime_calls

needs_cuda()

from adapter_cases import draw_adapter, run_adapter
from plain_lora import draw_lora, run_lora

from adamix_kernels.ops.routed_adapter import cuda_impl as adapter
from adamix_kernels.ops.routed_lora import cuda_impl as lora
from adamix_kernels.testing import assert_in_budget
from reliability.fuzz_cuda import launch_names

HALVES = [torch.float16, torch.bfloat16]
# batch, tokens, H, r, experts down and up, routing down and up
ADAPTERS = {
    "48 ranks": (5, 70, 128, 48, 3, 2, "sample", "sample"),
    "24 ranks": (3, 33, 128, 24, 3, 1, "sample", None),
    "64 ranks": (1, 300, 128, 64, 1, 1, None, None),
    "two blocks a side": (2, 40, 256, 32, 1, 2, None, "sample"),
}
LORAS = {
    "48 ranks": dict(b_kind="sample", batch=5, tokens=70, features=128, rank=48, per_group=128),
    "A alone": dict(batch=2, tokens=33, features=256, rank=24, per_group=256),
}


def check(tensors, indices, residual="input", activation="gelu"):
    runs = [run_adapter(backend, tensors, indices, residual, activation) for backend in ("cuda", "reference")]
    assert_in_budget(*runs, *(t for t in tensors if t is not None), multiple=2.0)


def check_lora(tensors, options, dropout_p=0.3):
    runs = [run_lora(backend, tensors, options, dropout_p) for backend in ("cuda", "reference")]
    assert_in_budget(*runs, *(t for t in tensors if t is not None), multiple=2.0)


def drawn(case="48 ranks", dtype=torch.bfloat16):
    return draw_adapter(DEVICE, dtype, *ADAPTERS[case])


def backward(tensors, indices, needs=(True, True, True), residual=True):
    x, *banks, dy = tensors
    _, pre = adapter.forward(x, *banks, *indices, None, residual, "gelu")
    return adapter.backward(dy, x, pre, banks[0], banks[2], *indices, *needs, residual, "gelu")


def backward_lora(tensors, options, needs=(True, True, True), dropout_p=0.3):
    x, a, b, base, dy = tensors
    seed = torch.tensor(11, device=DEVICE) if dropout_p else None
    tail = options["a_index"], options["b_index"]
    last = options["scaling"], options["groups"], list(options["output_offsets"]), dropout_p
    _, t = lora.forward(x, a, b, *tail, base, seed, *last)
    return lora.backward(dy, x, t, a, b, *tail, seed, *needs, *last)


@pytest.mark.parametrize("number", range(len(ADAPTERS)), ids=list(ADAPTERS))
def test_adapters(number):
    check(*drawn(list(ADAPTERS)[number], HALVES[number % 2]), "input", (None, "gelu")[number % 2])


@pytest.mark.parametrize("number", range(len(LORAS)), ids=list(LORAS))
def test_loras(number):
    tensors, options = draw_lora(DEVICE, dtype=HALVES[number % 2], **list(LORAS.values())[number])
    check_lora(tensors, options, 0.3 if number == 0 else 0.0)


@pytest.mark.sanitize
def test_memory_and_barriers():
    check(*drawn())
    check_lora(*draw_lora(DEVICE, dtype=torch.bfloat16, **LORAS["48 ranks"]))


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
def test_it_is_two_launches():
    for case in ("24 ranks", "64 ranks"):
        with launch_names() as names:
            backward(*drawn(case))
        assert list(names)[1:] == ["routed_adapter_input_grad", "sample_grads", "sample_sum"]
    with launch_names() as names:
        backward_lora(*draw_lora(DEVICE, dtype=torch.bfloat16, **LORAS["A alone"]))
    assert list(names)[2:] == ["sample_grads", "sample_sum"]


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize(
    "case",
    [
        (2, 40, 64, 48, 2, 1, "sample", None),  # columns
        (2, 40, 128, 20, 2, 1, "sample", None),  # ranks that are no 16 bytes
        (1, 40, 128, 48, 2, 1, "token", None),
        (3, 31, 128, 48, 2, 1, "sample", None),  # samples of less than half a tile
        (2, 40, 128, 48, 2, 1, "sample", None, 256),
        (2, 40, 128, 48, 65, 1, "sample", None),  # experts to sort by
    ],
)
def test_other_calls_do_without(case):
    with launch_names() as names:
        backward(*draw_adapter(DEVICE, torch.bfloat16, *case), residual=False)
    assert "sample_grads" not in names


def test_only_what_is_needed_is_computed():
    """Shares are of all blocks, so a side alone has more of them, and other bits."""
    tensors, indices = drawn("24 ranks")
    want = backward(tensors, indices)
    for needs in ((True, False, True), (False, True, False), (False, False, True)):
        got = backward(tensors, indices, needs)
        for mine, full, needed in zip(got, want, (needs[0], *needs[1:2] * 2, *needs[2:] * 2)):
            torch.testing.assert_close(mine, full if needed else full.new_empty(0))


@pytest.mark.skipif(not ON_HOST, reason="a GPU orders its threads itself")
def test_the_same_bits_in_any_order(monkeypatch):
    given = drawn()
    want = backward(*given)
    for order in ("reverse", "2"):
        monkeypatch.setenv("ADAMIX_HOST_ORDER", order)
        assert all(torch.equal(a, b) for a, b in zip(backward(*given), want))


@pytest.mark.skipif(not ON_HOST, reason="the device is pretended")
@pytest.mark.parametrize("multiprocessors", [1, 9, 20])
def test_every_number_of_shares(multiprocessors, monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_MULTIPROCESSORS", str(multiprocessors))
    check(*drawn())
    runtime_calls()


def test_samples_of_experts_that_are_not_there_and_experts_without_samples():
    """A sample with a wrong id counts nothing, whatever it holds, and an unused expert's gradient is zero."""
    (x, *banks, dy), (down, up) = drawn()
    down, up = torch.tensor([2, 0, 2, 77, 0], device=DEVICE), torch.tensor([1, 1, 1, 0, 1], device=DEVICE)
    kept = down != 77
    clean = backward([x[kept], *banks, dy[kept]], (down[kept], up[kept]))
    x, dy = x.clone(), dy.clone()
    x[~kept], dy[~kept] = float("inf"), float("nan")
    dx, *grads = backward([x, *banks, dy], (down, up))
    assert dx[~kept].isnan().all()
    assert torch.equal(dx[kept], clean[0])
    for mine, want in zip(grads, clean[1:]):
        torch.testing.assert_close(mine, want)
    assert all(grad[1].eq(0).all() for grad in grads[:2])
    assert all(grad[0].eq(0).all() for grad in grads[2:])


def test_what_others_hold_stays_with_them():
    """Infinities in the rows of one expert, and in another's weights, reach no gradient of the rest."""
    tensors, options = draw_lora(DEVICE, dtype=torch.bfloat16, **LORAS["48 ranks"])
    options |= {name: torch.tensor([0, 1, 0, 2, 1], device=DEVICE) for name in ("a_index", "b_index")}
    clean = backward_lora(tensors, options)
    x, a, b, base, dy = (t.clone() for t in tensors)
    lost = options["a_index"] == 0
    x[lost], dy[lost], a[3], b[3] = float("inf"), float("nan"), float("nan"), float("inf")
    dx, da, db = backward_lora([x, a, b, base, dy], options)
    assert torch.equal(dx[~lost], clean[0][~lost])
    for mine, want in ((da, clean[1]), (db, clean[2])):
        assert torch.equal(mine[1:], want[1:])


def test_a_dropped_element_counts_nothing_whatever_it_holds():
    tensors, options = draw_lora(DEVICE, dtype=torch.bfloat16, **LORAS["48 ranks"])
    clean = backward_lora(tensors, options)
    dropped = clean[0].eq(0)
    assert 0.25 < dropped.float().mean() < 0.35
    tensors[0] = tensors[0].masked_fill(dropped, float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(backward_lora(tensors, options), clean))
