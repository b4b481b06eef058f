"""Modules whose call in training is made in C++ (csrc/autograd/layers.cpp): the bits of Python's way, and when not."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import contextlib

import pytest
import torch
from cuda_host import DEVICE, needs_cuda
from tiny import batch_for, tiny_bert, tiny_gpt2

needs_cuda()

from adamix_kernels import AdaMixConfig, adapt, use_experts
from adamix_kernels.ops import _node
from adamix_kernels.routing import Router, draws

KINDS = {
    "adapter": (tiny_bert, dict(method="adapter", bottleneck=4, num_experts=3)),
    "adapter, both sides, sample": (
        tiny_bert, dict(method="adapter", bottleneck=4, num_experts=3, share=None, routing="sample")
    ),
    "lora": (tiny_gpt2, dict(method="lora", r=4, num_experts=3, dropout=0.3)),
    "lora, both sides": (tiny_gpt2, dict(method="lora", r=4, num_experts=3, share=None, dropout=0.0)),
    "lora, bfloat16": (tiny_gpt2, dict(method="lora", r=4, num_experts=3, dropout=0.0)),
}  # fmt: skip


class Spy:
    """The module of nodes, which notes whether layers were served; `off`: none is."""

    def __init__(self, module):
        self._module, self.served, self.off = module, [], False

    def __getattr__(self, name):
        real = getattr(self._module, name)
        whole = name.endswith("_on_linear")
        if not whole and not name.endswith("_layer"):
            return real

        def noted(*given):
            made = None if self.off else real(*given)
            if not whole or made is not None:  # else the layer alone is asked next
                self.served.append(made is not None and type(made) is not tuple)
            return made

        return noted


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.setattr(draws, "draws_ahead", lambda device: True)
    _node._load()
    made = Spy(_node._load())
    monkeypatch.setattr(_node.NODE, "module", made)
    monkeypatch.setattr(_node, "_load", lambda: made)
    return made


def build(kind):
    tiny, config = KINDS[kind]
    torch.manual_seed(0)
    model = tiny().to(DEVICE, torch.bfloat16 if "bfloat16" in kind else torch.float32)
    model = adapt(model, AdaMixConfig(**config), backend="cuda").train()
    for name, p in model.named_parameters():
        if name.endswith(("lora_b", "up_bias", "down_bias")):
            torch.nn.init.normal_(p)
    step(model)  # what serves is found out
    return model


def step(model, spy=None, around=contextlib.nullcontext):
    """(loss, gradients, the generator's next number); of spy only what this step does."""
    if spy is not None:
        spy.served.clear()
    torch.manual_seed(5)
    model.zero_grad()
    batch = {name: t.to(DEVICE) for name, t in batch_for(model, 4, 5).items()}
    with around():
        loss = model(**batch).loss
        if loss.requires_grad:
            loss.backward()
    grads = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    return [loss.detach(), *grads, torch.rand(2, device=DEVICE)]


def assert_same(got, want):
    assert all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_bits_of_pythons_way_and_draws_the_same(kind, spy):
    model = build(kind)
    got = step(model, spy)
    # The first layer of a forward has all layers' experts drawn.
    assert spy.served == [True] * len(model.adamix.paths)
    spy.off = True
    assert_same(step(model), got)


def chosen(model):
    return use_experts(model, torch.tensor([0, 1, 2, 0], device=DEVICE))


class OwnRouter(Router):
    def draw_sides(self, experts, rows, training, paired):
        passes, first, second = super().draw_sides(experts, rows, training, paired)
        return passes, None if first is None else (first + 1) % 3, second


def own_router(model):
    model.adamix.router.__class__ = OwnRouter


def merged_scores(model):
    for name, p in model.named_parameters():
        if name.endswith("_score"):
            p.requires_grad_(True)


UNUSUAL = {
    "token level": lambda model: setattr(model.adamix.router, "level", "token"),
    "a router of its own class": own_router,
    "merge scores that learn": merged_scores,
    "switched off": lambda model: setattr(model.adamix.router, "enabled", False),
    "merged in training": lambda model: setattr(model.adamix.router, "force_merged", True),
    "evaluation": lambda model: model.eval(),
}
AROUND = {
    "no gradients": torch.no_grad,
    "hooks of saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "autocast": lambda: torch.autocast(DEVICE, torch.bfloat16),
}


@pytest.mark.parametrize("name", [*UNUSUAL, *AROUND])
@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_what_is_unusual_goes_pythons_way(kind, name, spy):
    model = build(kind)
    UNUSUAL.get(name, lambda model: None)(model)
    around = AROUND.get(name, contextlib.nullcontext)
    got = step(model, spy, around)
    assert len(spy.served) == len(model.adamix.paths)
    assert not any(spy.served)
    spy.off = True
    assert_same(step(model, around=around), got)


def test_chosen_experts_and_reads_of_the_base_are_seen(spy):
    model = build("lora")
    layer = model.get_submodule(model.adamix.paths[-1])
    got = step(model, spy, lambda: chosen(model))
    assert not any(spy.served)
    spy.off = True
    assert_same(step(model, around=lambda: chosen(model)), got)
    spy.off = False
    # A hook that keeps the base layer's output finds it as it was.
    seen = []
    layer.base.register_forward_hook(lambda module, given, out: seen.append((out, out.detach().clone())))
    step(model, spy)
    assert spy.served[-1]
    assert torch.equal(*seen[0])
    layer.backend = "reference"
    step(model, spy)
    assert not spy.served[-1]
    with pytest.raises(ValueError, match="x: got shape"):
        layer(torch.zeros(2, 3, 5, device=DEVICE))


def test_what_is_overwritten_keeps_its_history(spy):
    # A view whose version moved has as_strided's, whose backward copies the whole gradient.
    model = build("lora")
    layer = model.get_submodule(model.adamix.paths[-1])
    seen = []
    layer.base.weight.requires_grad_(True)  # else base and update are one node
    layer.base.register_forward_hook(lambda module, given, out: None)
    handle = layer.register_forward_hook(lambda module, given, out: seen.append(out.grad_fn))
    step(model, spy)  # a hook on the base: beside it
    layer.base._forward_hooks.clear()
    step(model, spy)
    handle.remove()
    assert spy.served[-1]
    names = [[before.name() for before, _ in grad_fn.next_functions] for grad_fn in seen]
    assert names[0] == names[1]
    assert names[1][-1] == "ViewBackward0"


def test_draws_that_were_taken_for_a_call_that_fails_go_back(spy):
    model = build("lora, both sides")
    router, layer = model.adamix.router, model.get_submodule(model.adamix.paths[0])
    router.begin_forward()
    spy.served.clear()
    x = torch.randn(4, 5, layer.in_features, device=DEVICE)
    layer(x)
    (left,) = router._ahead.values()
    before = list(left)
    layer.output_offsets = (1,) * layer.groups  # groups that overlap: the kernels refuse them
    with pytest.raises(ValueError, match="output_offsets"):
        layer(x)
    assert spy.served == [True, False]
    assert [id(t) for t in left] == [id(t) for t in before[: len(left)]]
    router.end_forward()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_fsdp2_has_the_bits_of_pythons_way(kind, spy, tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("no FSDP2 in this torch")
    model = build(kind)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh(DEVICE, (1,))
        for block in model.bert.encoder.layer if kind == "adapter" else model.transformer.h:
            fsdp.fully_shard(block, mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        results = []
        for spy.off in (False, True):
            loss, *grads, drawn = step(model)
            results.append([loss, *(g if g is None else g.full_tensor() for g in grads), drawn])
    finally:
        torch.distributed.destroy_process_group()
    assert_same(*results)
