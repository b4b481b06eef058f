"""Backwards in one pass on a V100 (csrc/common/held_pass.h), of routed_adapter and routed_lora, on the CPU."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, ON_HOST, needs_cuda

needs_cuda()

from adapter_cases import draw_adapter, run_adapter
from plain_lora import draw_lora, run_lora

from adamix_kernels.ops.routed_adapter import cuda_impl as adapters
from adamix_kernels.ops.routed_lora import cuda_impl as loras
from adamix_kernels.testing import assert_in_budget
from reliability.fuzz_cuda import launch_names

pytestmark = pytest.mark.skipif(not ON_HOST, reason="the device is pretended")

# batch, tokens, H, r, experts down and up, routing down and up
ADAPTERS = {
    "few rows": (2, 70, 256, 16, 3, 2, "sample", "sample"),
    "one side": (3, 40, 256, 8, 3, 1, "sample", None),
    "many samples a block": (13, 17, 320, 8, 3, 2, "sample", "sample"),
    "one expert": (1, 150, 256, 16, 1, 1, None, None),
    "an expert a sample": (12, 16, 256, 8, 12, 1, "sample", None),
    "all columns": (1, 120, 1024, 16, 1, 2, None, "sample"),
}
LORAS = {
    "few rows": dict(b_kind="sample", batch=2, tokens=70, features=256, rank=16, per_group=256),
    "A alone": dict(batch=3, tokens=40, features=256, rank=8, per_group=256),
    "many samples a block": dict(b_kind="sample", batch=13, tokens=17, features=320, rank=8, per_group=320),
    "one expert": dict(a_kind="none", batch=1, tokens=150, features=256, rank=16, per_group=256),
}
MANY = "many samples a block"


@pytest.fixture(autouse=True)
def _volta(monkeypatch):
    for name, value in {"CAPABILITY": "70", "SHARED": "98304", "MULTIPROCESSORS": "4"}.items():
        monkeypatch.setenv(f"ADAMIX_HOST_{name}", value)


def adapter(case, bias=True, dtype=torch.float16):
    return draw_adapter(DEVICE, dtype, *ADAPTERS[case], None, bias)


def check_adapter(case, residual="input", activation="gelu", bias=True):
    tensors, indices = adapter(case, bias)
    runs = [run_adapter(backend, tensors, indices, residual, activation) for backend in ("cuda", "reference")]
    with launch_names() as names:
        assert_in_budget(*runs, *(t for t in tensors if t is not None), multiple=2.0)
    assert "held_one_pass" in names


def check_lora(case, dropout_p=0.0):
    tensors, options = draw_lora(DEVICE, dtype=torch.float16, **LORAS[case])
    runs = [run_lora(backend, tensors, options, dropout_p) for backend in ("cuda", "reference")]
    with launch_names() as names:
        assert_in_budget(*runs, *(t for t in tensors if t is not None), multiple=2.0)
    assert "held_one_pass" in names


def adapter_backward(tensors, indices, needs=(True, True, True)):
    x, *banks, dy = tensors
    _, pre = adapters.forward(x, *banks, *indices, None, True, "gelu")
    return adapters.backward(dy, x, pre, banks[0], banks[2], *indices, *needs, True, "gelu")


def lora_backward(tensors, options, needs=(True, True, True), dropout_p=0.3):
    x, a, b, base, dy = tensors
    seed = torch.tensor(11) if dropout_p else None
    tail = options["a_index"], options["b_index"]
    last = options["scaling"], options["groups"], list(options["output_offsets"]), dropout_p
    _, t = loras.forward(x, a, b, *tail, base, seed, *last)
    return loras.backward(dy, x, t, a, b, *tail, seed, *needs, *last)


@pytest.mark.parametrize("case", ADAPTERS)
def test_the_adapter(case):
    check_adapter(case)


@pytest.mark.parametrize(("residual", "activation", "bias"), [("none", "silu", True), ("other", "relu", False)])
def test_the_adapter_with_other_residuals(residual, activation, bias):
    check_adapter("few rows", residual, activation, bias)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("case", LORAS)
def test_lora(case, dropout_p):
    check_lora(case, dropout_p)


@pytest.mark.sanitize
def test_memory_and_barriers():
    check_adapter(MANY)
    check_lora(MANY, 0.3)


@pytest.mark.parametrize("multiprocessors", ["1", "3"])
def test_long_walks(multiprocessors, monkeypatch):
    """A block goes through samples of several experts, and comes back to one it had."""
    monkeypatch.setenv("ADAMIX_HOST_MULTIPROCESSORS", multiprocessors)
    check_adapter(MANY)
    check_lora(MANY, 0.3)


def test_it_is_two_launches():
    with launch_names() as names:
        adapter_backward(*adapter("few rows"))
        lora_backward(*draw_lora(DEVICE, dtype=torch.float16, **LORAS["few rows"]))
    assert list(names)[1:3] == ["held_one_pass", "routed_adapter_pass_sum"]
    assert list(names)[4:] == ["held_one_pass", "routed_lora_pass_sum"]


@pytest.mark.parametrize(
    ("other", "dtype"),
    [(dict(rank=4), torch.float16), (dict(), torch.bfloat16), (dict(features=192, per_group=192), torch.float16)],
)
def test_other_calls_go_in_two_passes(other, dtype):
    sizes = LORAS["few rows"] | other
    with launch_names() as names:
        lora_backward(*draw_lora(DEVICE, dtype=dtype, **sizes))
    assert names
    assert not any("one_pass" in name for name in names)


def test_too_little_shared_memory_is_two_passes(monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_SHARED", "65536")
    with launch_names() as names:
        adapter_backward(*adapter("all columns"))
    assert names
    assert not any("one_pass" in name for name in names)


@pytest.mark.parametrize("needs", [(True, False, True), (False, True, False), (False, False, True)])
def test_only_what_is_needed_is_computed_with_the_same_bits(needs):
    for backward, drawn, parts in (
        (adapter_backward, adapter(MANY), (needs[0], *needs[1:2] * 2, *needs[2:] * 2)),
        (lora_backward, draw_lora(DEVICE, dtype=torch.float16, **LORAS[MANY]), needs),
    ):
        want, got = (backward(*drawn, which) for which in ((True, True, True), needs))
        for mine, full, needed in zip(got, want, parts):
            assert torch.equal(mine, full if needed else full.new_empty(0))


@pytest.mark.parametrize("order", ["reverse", "2"])
def test_the_same_bits_in_any_order(order, monkeypatch):
    drawn, other = adapter(MANY), draw_lora(DEVICE, dtype=torch.float16, **LORAS[MANY])
    want = *adapter_backward(*drawn), *lora_backward(*other)
    monkeypatch.setenv("ADAMIX_HOST_ORDER", order)
    got = *adapter_backward(*drawn), *lora_backward(*other)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_what_others_hold_stays_with_them():
    """Infinities in the rows of one expert, and in another's weights, reach no row and no gradient of the rest."""
    batch, tokens, hidden, r, *_ = ADAPTERS[MANY]
    tensors, _ = draw_adapter(DEVICE, torch.float16, batch, tokens, hidden, r, 4, 4, "sample", "sample")
    number = torch.arange(batch)
    indices = [number % 3, number // 2 % 3]
    clean = adapter_backward(tensors, indices)
    x, *banks, dy = (t.clone() for t in tensors)
    lost = (indices[0] == 0) | (indices[1] == 1)
    x[lost], dy[lost] = float("inf"), float("nan")
    for bank in banks[:2]:
        bank[0], bank[3] = float("inf"), float("nan")
    for bank in banks[2:]:
        bank[1], bank[3] = float("inf"), float("nan")
    dx, *grads = adapter_backward([x, *banks, dy], indices)
    assert torch.equal(dx[~lost], clean[0][~lost])
    assert all(grad[3].eq(0).all() for grad in grads)
    # Of expert 1 down and 2 up no row is lost.
    assert all(torch.equal(grad[1], whole[1]) for grad, whole in zip(grads[:2], clean[1:3]))
    assert all(torch.equal(grad[2], whole[2]) for grad, whole in zip(grads[2:], clean[3:]))


def test_strides_and_short_ids():
    tensors, indices = adapter(MANY)
    want = adapter_backward(tensors, indices)
    x, *banks, dy = tensors
    batch, tokens, hidden = x.shape
    wide = [torch.zeros(batch, tokens + 1, hidden + 64, dtype=x.dtype) for _ in range(2)]
    views = [memory[:, 1:, 64:].copy_(t) for memory, t in zip(wide, (x, dy))]
    got = adapter_backward([views[0], *banks, views[1]], [index.int() for index in indices])
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_a_dropped_element_counts_nothing_whatever_it_holds():
    """x is infinite where it is dropped: dA has the bits of finite values there, and dx is zero."""
    tensors, options = draw_lora(DEVICE, dtype=torch.float16, **LORAS["few rows"])
    clean = lora_backward(tensors, options)
    dropped = clean[0].eq(0)
    assert 0.25 < dropped.float().mean() < 0.35
    tensors[0] = tensors[0].masked_fill(dropped, float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(lora_backward(tensors, options), clean))


def test_ids_outside_the_banks_are_rows_of_nan_alone():
    tensors, indices = adapter(MANY)
    bad = indices[0].clone()
    bad[1], bad[-1] = 77, 77
    good = adapter_backward(tensors, indices)[0]
    dx, *grads = adapter_backward(tensors, [bad, indices[1]])
    kept = bad != 77
    assert dx[~kept].isnan().all()
    assert torch.equal(dx[kept], good[kept])
    assert all(grad.isfinite().all() for grad in grads)
