"""Ranks beyond what Triton's adapter kernels hold whole: refused, or the reference's, before the forward."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import pytest
import torch
from triton_spy import DEVICE, launches, needs_triton

needs_triton()

from adamix_kernels import BackendUnavailableError, _auto, routed_adapter, routed_lora
from adamix_kernels.ops import _direct
from adamix_kernels.ops._routed_plan import MAX_WIDTH
from adamix_kernels.ops.gated_adapter import triton_impl as gated_impl
from adamix_kernels.ops.gated_adapter.triton_impl import by_rows
from adamix_kernels.ops.routed_adapter import triton_impl as routed_impl

HIDDEN = 16


def adapter(r, gated):
    draw = torch.Generator().manual_seed(0)
    shapes = (1, 16, HIDDEN), (2, r, HIDDEN), (2, r), (2, HIDDEN, r), (2, HIDDEN)
    leaves = [(0.1 * torch.randn(shape, generator=draw)).to(DEVICE).requires_grad_() for shape in shapes]
    index = None if gated else torch.tensor([1], device=DEVICE)
    gates = torch.tensor([[0.25, 0.75]], device=DEVICE) if gated else None

    def call(backend):
        return routed_adapter(*leaves, index, index, residual=leaves[0], gates=gates, backend=backend)

    return call, leaves


def results(case, backend):
    call, leaves = case
    out = call(backend)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


@pytest.fixture
def chosen():
    ops = ("routed_adapter", "gated_adapter")
    device = torch.empty(0, device=DEVICE).device
    before = _auto.freeze({
        (op, device, torch.float32, shape): "triton" for op in ops for shape in _auto.SHAPES[op]
    })  # fmt: skip
    _direct.forget_all()  # what another test has planned is not made again
    yield
    _auto.restore(before)


@pytest.mark.parametrize("gated", [False, True])
def test_the_widest_adapter_runs_and_the_next_is_refused_or_the_references(gated, chosen):
    want = results(adapter(MAX_WIDTH, gated), "reference")
    with launches(routed_impl, gated_impl, by_rows, directly=True) as names:
        got = results(adapter(MAX_WIDTH, gated), "auto")
    assert names
    for one, expected in zip(got, want, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
    case = adapter(MAX_WIDTH + 1, gated)
    with pytest.raises(
        BackendUnavailableError, match=r"r, in units of 16: got 272, expected at most 256 .*a smaller rank"
    ):
        case[0]("triton")
    with launches(routed_impl, gated_impl, by_rows, directly=True) as names:
        got = results(case, "auto")
    assert all(torch.equal(a, b) for a, b in zip(got, results(case, "reference"), strict=True))
    assert not names


def test_lora_of_any_rank_is_served_in_parts():
    draw = torch.Generator().manual_seed(0)
    x, a, b = (
        0.1 * torch.randn(shape, generator=draw) for shape in ((1, 16, HIDDEN), (1, 272, HIDDEN), (1, HIDDEN, 272))
    )
    x, a, b = (t.to(DEVICE) for t in (x, a, b))
    got, want = (routed_lora(x, a, b, None, None, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
