"""The weight gradients of routed_lora by sample on the Triton backend: who sums which samples, and where to."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

from unittest import mock

import pytest
import torch
from triton_spy import DEVICE, needs_triton

needs_triton()

from adamix_kernels.ops.routed_lora.triton_impl import plan, weights
from adamix_kernels.testing import assert_in_budget

EXPERTS, BATCH, TOKENS, FEATURES, RANK, SCALING = 8, 9, 17, 20, 4, 1.7
ROUTES = {
    "one each": [7, 0, 3, 1, 6, 2, 5, 4, 7],
    "one for all": [3] * 9,
    "pairs": [2, 5, 2, 5, 0, 0, 7, 3, 7],
    "uneven": [1, 1, 1, 6, 1, 6, 1, 1, 4],
}
# weights.ROWS bounds what a program sums.
MOST = weights.ROWS // TOKENS


@pytest.fixture(params=[(4, 2), (16, 2), (16, 16)], ids=lambda p: f"window {p[0]}, {p[1]} a program")
def sizes(request, monkeypatch):
    """(window, samples of a program) that the kernels get."""
    monkeypatch.setattr(weights, "WINDOW", request.param[0])
    monkeypatch.setattr(weights, "MAX_SAMPLES", request.param[1])
    monkeypatch.setattr(weights, "MIN_TILES", 16)
    return request.param[0], min(request.param[1], MOST)


def draw(dtype=torch.float32):
    """x, dy, dt, t."""
    generator = torch.Generator().manual_seed(0)
    columns = FEATURES, 7, RANK, RANK
    return [torch.randn(BATCH, TOKENS, n, generator=generator).to(dtype).to(DEVICE) for n in columns]


def kernels(route, b_route=None, fill=float("nan")):
    """A function of x, dy, dt, t that gives dA and dB, and the planes of A; memory that nobody writes holds fill."""
    planes = []

    def memory(like, *shape, dtype=None):
        planes.append(torch.full(shape, fill, dtype=dtype or like.dtype, device=like.device))
        return planes[-1]

    def run(x, dy, dt, t):
        planes.clear()
        da = torch.full((EXPERTS, RANK, FEATURES), fill, dtype=x.dtype, device=x.device)
        db = torch.full((EXPERTS if b_route else 1, 7, RANK), fill, dtype=x.dtype, device=x.device)
        index = [None if ids is None else torch.tensor(ids, device=DEVICE) for ids in (route, b_route)]
        call = plan.make_call(BATCH, TOKENS, da, db, *index, [0], 7)
        with mock.patch.object(weights, "memory", memory):
            weights.weight_grads(x, dy, dt, t, None, da, db, 0, 1.0, SCALING, call)
        return da, db

    return run, planes


def plain(route, b_route=None):
    """The same by one product a sample."""

    def run(x, dy, dt, t):
        da = torch.stack([g.mT @ z for g, z in zip(dt, x)])
        db = torch.stack([g.mT @ z for g, z in zip(dy, t)]) * SCALING
        sums = x.new_zeros(EXPERTS, RANK, FEATURES), x.new_zeros(EXPERTS if b_route else 1, 7, RANK)
        for grads, ids, parts in zip(sums, (route, b_route or [0] * BATCH), (da, db)):
            grads.index_add_(0, torch.tensor(ids, device=DEVICE), parts)
        return sums

    return run


@pytest.mark.parametrize("route", ROUTES)
def test_every_route(route, sizes):
    window, share = sizes
    route = ROUTES[route]
    run, planes = kernels(route, fill=1e30)
    tensors = draw()
    assert_in_budget(run, plain(route), *tensors, multiple=2.0)
    da, _ = run(*tensors)
    assert da[[m for m in range(EXPERTS) if m not in route]].eq(0).all()
    # A plane is written where one program has not all samples of an expert, and nowhere else.
    (of_a,) = (plane for plane in planes if plane.shape[1:] == da.shape[1:])
    windows = [route[at : at + window] for at in range(0, BATCH, window)]
    counts = [ids.count(m) for ids in windows for m in set(ids)]
    shares = -(-window // share)
    assert len(of_a) == (len(windows) * EXPERTS * shares if EXPERTS * shares < window else BATCH)
    written = of_a.ne(1e30).flatten(1)
    assert int(written.any(1).sum()) == sum(-(-n // share) for n in counts if n > share or len(windows) > 1)
    assert written.any(1).eq(written.all(1)).all()


def test_both_sides_in_half_precision_and_the_same_bits_twice(sizes):
    route, b_route = ROUTES["uneven"], ROUTES["pairs"]
    run, _ = kernels(route, b_route)
    tensors = draw(torch.bfloat16)
    assert_in_budget(run, plain(route, b_route), *tensors, multiple=2.0)
    assert all(torch.equal(one, two) for one, two in zip(run(*tensors), run(*tensors)))


def test_wide_blocks_of_the_sum_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(weights, "MAX_SAMPLES", 2)
    run, _ = kernels(ROUTES["uneven"])
    tensors = draw()
    want, _ = run(*tensors)
    monkeypatch.setattr(weights, "WIDE_SUM_BLOCK", 64)
    monkeypatch.setattr(weights, "MIN_PROGRAMS", 1)
    with mock.patch.object(weights, "launch", side_effect=weights.launch) as launched:
        assert torch.equal(run(*tensors)[0], want)
    assert launched.call_args.kwargs["BLOCK"] == 64


def test_a_wrong_id_reaches_no_gradient():
    right, tensors = ROUTES["pairs"], draw()
    want, _ = kernels(right)[0](*tensors)
    for wrong in (EXPERTS, -1):
        da, _ = kernels([wrong if m == 3 else m for m in right])[0](*tensors)
        assert da[3].eq(0).all()
        others = [m for m in range(EXPERTS) if m != 3]
        assert torch.equal(da[others], want[others])
