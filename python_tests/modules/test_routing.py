"""The router's draws."""

import pytest
import torch

from adamix_kernels.routing import Router

CPU = torch.device("cpu")


def draw(router, experts=4, batch=8, tokens=5, training=True):
    return router.draw(experts, batch, tokens, CPU, training)


def test_shapes_and_ranges_per_level():
    assert draw(Router("batch")).shape == (8,)
    assert draw(Router("sample")).shape == (8,)
    assert draw(Router("token")).shape == (8, 5)
    for level in ("batch", "sample", "token"):
        seen = torch.cat([draw(Router(level)).flatten() for _ in range(60)])
        assert seen.dtype == torch.int64
        assert seen.unique().tolist() == [0, 1, 2, 3]


def test_a_bank_of_one_needs_no_index_and_no_random_number():
    state = torch.get_rng_state()
    assert draw(Router(), experts=1) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_draw_is_constant_within_a_pass_and_independent_between_passes():
    draws = torch.stack([draw(Router("batch", passes=2)) for _ in range(400)])
    assert (draws[:, :4] == draws[:, :1]).all()
    assert (draws[:, 4:] == draws[:, 4:5]).all()
    same = (draws[:, 0] == draws[:, 4]).float().mean()
    assert 0.15 < same < 0.35
    odd = torch.stack([draw(Router("batch", passes=2), batch=7) for _ in range(50)])
    assert (odd == odd[:, :1]).all()
    three = draw(Router("batch", passes=4))
    assert (three.view(4, 2) == three.view(4, 2)[:, :1]).all()


def test_draws_are_uniform():
    counts = torch.bincount(torch.cat([draw(Router("sample")) for _ in range(1000)]), minlength=4)
    assert (counts - 2000).abs().max() < 4 * (8000 * 0.25 * 0.75) ** 0.5


def test_ranks_that_share_a_seed_draw_different_experts():
    drawn = []
    for rank in range(4):
        router = Router("batch")
        router.rank = rank
        torch.manual_seed(5)
        drawn.append(torch.stack([draw(router) for _ in range(20)]))
    for a in range(4):
        for b in range(a):
            assert (drawn[a] != drawn[b]).all()


def test_the_draw_follows_the_global_generator():
    torch.manual_seed(3)
    first = [draw(Router("token")) for _ in range(3)]
    torch.manual_seed(3)
    assert all(torch.equal(a, draw(Router("token"))) for a in first)


def test_when_merged_experts_serve():
    router = Router()
    assert router.uses_merged(training=False, learning=False)
    assert not router.uses_merged(training=True, learning=False)
    assert router.uses_merged(training=True, learning=True)
    router.force_merged = True
    assert router.uses_merged(training=True, learning=False)
    router.experts = torch.tensor(1)
    assert not router.uses_merged(training=False, learning=False)
    router = Router()
    router.eval_level = "token"
    assert not router.uses_merged(training=False, learning=False)
    assert draw(router, training=False).shape == (8, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(level="best"), "level: got 'best'"),
        (dict(passes=0), "passes: got 0"),
        (dict(passes=1.5), "passes: got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Router(**arguments)
