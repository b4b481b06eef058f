"""Draws of a whole forward in one launch, as on a GPU: torch.randint is called once, and recomputed layers agree."""

import copy

import pytest
import torch
from tiny import batch_for, tiny_bert

from adamix_kernels import AdaMixConfig, adapt
from adamix_kernels.routing import Router, draws


@pytest.fixture
def drawn(monkeypatch):
    """(calls of the generator, the index of each draw) since it was cleared, draws going ahead as on a GPU."""
    calls, indices = [], []
    randint, draw = Router._randint, Router.draw

    def counted(self, *args):
        calls.append(args)
        return randint(self, *args)

    def noted(self, *args):
        index = draw(self, *args)
        if index is not None:
            indices.append(index.tolist())
        return index

    monkeypatch.setattr(draws, "draws_ahead", lambda device: True)
    monkeypatch.setattr(Router, "_randint", counted)
    monkeypatch.setattr(Router, "draw", noted)
    return calls, indices


def build(routing="batch", **options):
    return adapt(
        tiny_bert(3, dropout=0.1), AdaMixConfig(bottleneck=4, num_experts=3, routing=routing, **options)
    ).train()


def run(model, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    batch = {name: value for name, value in batch_for(model, 4, 5).items() if name != "labels"}
    return model(**batch).logits


@pytest.mark.parametrize(("share", "sides"), [("up", 1), (None, 2)])
@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_one_launch_for_all_layers_and_each_its_own_draw(routing, share, sides, drawn):
    calls, indices = drawn
    model = build(routing, share=share)
    layers = len(model.adamix.paths)
    for _ in range(2):
        calls.clear()
        indices.clear()
        run(model)
        assert len(calls) == 1
        assert len(indices) == layers * sides
        assert {i for index in indices for i in index} <= {0, 1, 2}
    seen = set()
    for _ in range(8):
        indices.clear()
        run(model)
        seen |= set(map(str, indices))
    assert len(seen) >= 3


def test_a_seed_decides_a_forward_whatever_ran_before(drawn):
    calls, _ = drawn
    model = build()
    want = run(model, 3)
    run(model)
    assert torch.equal(run(model, 3), want)
    # What a forward that failed had drawn is not used by the next; nor is there anything ahead outside of forwards.
    handle = model.classifier.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model)
    handle.remove()
    assert torch.equal(run(model, 3), want)
    layer = model.get_submodule(model.adamix.paths[0])
    calls.clear()
    for _ in range(3):
        layer(torch.randn(4, 5, layer.weight.shape[1]))
    assert len(calls) == 3
    # A copy draws for itself, and a model in evaluation draws nothing.
    assert torch.equal(run(copy.deepcopy(model), 3), want)
    calls.clear()
    run(model.eval())
    assert not calls


def test_ranks_shift_what_is_drawn_ahead(drawn):
    _, indices = drawn
    model = build()
    first, second = [], []
    for rank, kept in ((0, first), (1, second)):
        model.adamix.router.rank = rank
        indices.clear()
        run(model, 5)
        kept += indices
    assert second == [[(i + 1) % 3 for i in index] for index in first]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_draw_their_own_and_the_same_again(reentrant, drawn):
    calls, indices = drawn
    model = build("sample")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    layers = len(model.adamix.paths)
    torch.manual_seed(2)
    # Two forwards before one backward: what the second drew is not what the first's layers are recomputed with.
    (run(model).sum() + run(model).sum()).backward()
    assert len(calls) == len(indices) == 4 * layers
    assert sorted(indices[: 2 * layers]) == sorted(indices[2 * layers :])
    assert len(set(map(str, indices))) > 2
