"""Adapters computed with the frozen linear layer before them (csrc/autograd/layers.cpp): the bits of Python's way."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import copy
import random
from unittest import mock

import pytest
import torch
from cuda_host import DEVICE, needs_cuda
from torch import nn
from torch.utils.checkpoint import checkpoint
from watched_layers import (
    AROUND,
    OF_LINEARS,
    OF_MODULES,
    agree,
    around,
    check_gradients_that_are_not_memory,
    watched,
)

needs_cuda()
pytest.importorskip("transformers")

from transformers.pytorch_utils import Conv1D

from adamix_kernels.modules import AdaptedLayer, RoutedAdapter
from adamix_kernels.modules.lora import may_overwrite
from adamix_kernels.ops import _node
from adamix_kernels.routing import Router, draws


class Own(RoutedAdapter):
    def forward(self, x, residual=None):
        return 2 * super().forward(x, residual)


# What a call depends on; the first values are usual ones.
PROPERTIES = {
    "conv": [False, True],
    "bias": [True, False],
    "dtype": [torch.float32, torch.bfloat16],
    "banks": [None, torch.float32],
    "base_dtype": [None, torch.float64],
    "features": [12, 8],
    "adapter": [RoutedAdapter, Own],
    "activation": ["gelu", None, "relu"],
    "share": ["up", None, "down"],
    "level": ["batch", "sample", "token"],
    "batch": [4, 3],
    "tokens": [5, 1],
    "x": ["grad", "plain", "strided", "2D"],
    "learns": [True, False],
    "weight_learns": [False, True],
    "backend": ["cuda", "reference"],
    "around": AROUND,
    "watcher": OF_LINEARS,
    "adapter_watcher": OF_MODULES,
    "called": ["x", "input=x"],
    "gradient": ["dense", "expanded"],
}


@pytest.fixture(autouse=True)
def ahead(monkeypatch):
    monkeypatch.setattr(draws, "draws_ahead", lambda device: True)


def usual():
    return {name: values[0] for name, values in PROPERTIES.items()}


def build(p):
    torch.manual_seed(0)
    features = p["features"]
    base = Conv1D(features, 8) if p["conv"] else nn.Linear(8, features, bias=p["bias"])
    base = base.to(DEVICE, p["base_dtype"] or p["dtype"]).requires_grad_(False)
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    may_overwrite(base, torch.empty(0), torch.empty(0))  # notes transformers' Conv1D
    adapter = p["adapter"](
        features, 4, 3, p["share"], p["activation"], router=Router(p["level"]), backend=p["backend"],
        dtype=p["banks"] or p["dtype"], device=DEVICE,
    )  # fmt: skip
    for bank in adapter.banks():
        nn.init.normal_(bank).requires_grad_(p["learns"])
    base.weight.requires_grad_(p["weight_learns"])
    return AdaptedLayer(base, adapter).train()


class Spy:
    """The module of nodes; whole: whether its last call of an AdaptedLayer gave all of it."""

    def __init__(self, module):
        self.module, self.whole = module, False

    def __getattr__(self, name):
        return getattr(self.module, name)

    def adapter_on_linear(self, *given):
        made = self.module.adapter_on_linear(*given)
        self.whole = isinstance(made, torch.Tensor)
        return made


def called(layer, x, how="x"):
    return layer(x) if how == "x" else layer(input=x) if isinstance(layer.base, nn.Linear) else layer(x=x)


def run(p, calls, module):
    """(output, whether one node made it, gradients, the generator's next number) of a second call."""
    layer, spy = build(p), None if module is None else Spy(module)
    shape = (p["batch"] * p["tokens"], 8) if p["x"] == "2D" else (p["batch"], p["tokens"], 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, p["dtype"])
    if p["x"] == "strided":
        x = x.repeat(*[1] * (x.dim() - 1), 2)[..., ::2]
    x.requires_grad_(p["x"] != "plain")
    router = layer.adapter.router
    router.sides = {3: 4}  # of two calls
    with (
        mock.patch.object(_node.NODE, "module", spy),
        around(p["around"]),
        watched(layer.base, p["watcher"], calls),
        watched(layer.adapter, p["adapter_watcher"], calls),
    ):
        torch.manual_seed(2)
        router.begin_forward()
        try:
            called(layer, x, p["called"])  # has the experts drawn
            calls.clear()
            if spy is not None:
                spy.whole = False
            out = called(layer, x, p["called"])
        except RuntimeError as error:  # a layer of another dtype
            return str(error)
        router.end_forward()
        grads = []
        if out.requires_grad:
            gradient = torch.ones_like(out) if p["gradient"] == "dense" else out.new_ones(()).expand_as(out)
            leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
            grads = torch.autograd.grad(out, leaves, gradient, allow_unused=True)
    return out.detach(), spy is not None and spy.whole, grads, torch.rand(2, device=DEVICE)


@pytest.fixture(autouse=True, scope="module")
def module():
    with mock.patch.object(draws, "draws_ahead", return_value=True):
        run(usual(), [], None)  # what serves such calls is found out
    found = _node._load()
    assert found is not None, "the build puts the module beside the library"
    return found


def compare(p, module):
    """Whether layer and adapter were one; the results are Python's, and everybody who watches is told."""
    calls, expected = [], []
    want = run(p, expected, None)
    got = run(p, calls, module)
    assert agree(got, want), p
    assert calls == expected, p
    return not isinstance(got, str) and got[1]


@pytest.mark.parametrize("conv", [False, True])
def test_a_frozen_layer_and_its_adapter_are_one_node(conv, module):
    variants = (
        {}, {"bias": False}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "banks": torch.float32},
        {"x": "plain"}, {"level": "sample"}, {"gradient": "expanded"}, {"share": None}, {"share": "down"},
        {"learns": False}, {"activation": None}, {"features": 8}, {"batch": 3}, {"tokens": 1},
    )  # fmt: skip
    for changed in variants:
        assert compare({**usual(), "conv": conv, **changed}, module), changed


def test_what_is_not_plain_or_is_watched_is_called_as_it_is(module):
    unusual = {
        "watcher": OF_LINEARS[1:], "adapter_watcher": OF_MODULES[1:], "weight_learns": [True], "around": AROUND[1:],
        "x": ["strided", "2D"], "level": ["token"], "backend": ["reference"], "base_dtype": [torch.float64],
        "adapter": [Own], "called": ["input=x"],
    }  # fmt: skip
    for name, values in unusual.items():
        for value in values:
            for conv in (False, True):
                assert not compare({**usual(), "conv": conv, name: value}, module), (name, value)


def test_two_calls_that_differ_in_one_property(module):
    draw, taken = random.Random(1), 0
    for _ in range(20):
        first = {name: draw.choice(values) if draw.random() < 0.3 else values[0] for name, values in PROPERTIES.items()}
        name = draw.choice(list(PROPERTIES))
        for p in (first, {**first, name: draw.choice(PROPERTIES[name])}, first):
            taken += compare(p, module)
    assert taken > 5


@pytest.mark.parametrize("watcher", ["class's forward", "class's _call_impl", "class's __getattr__"])
def test_a_class_that_was_changed_before_it_was_recorded_is_no_original(watcher):
    original, adapter = _node.ADAPTERS[RoutedAdapter], build(usual()).adapter
    with watched(adapter, watcher, []):
        _node.keep_adapter(RoutedAdapter)
        assert _node.ADAPTERS[RoutedAdapter] is None
    _node.keep_adapter(RoutedAdapter)
    assert _node.ADAPTERS[RoutedAdapter] == original


def whole(p, x, module):
    """(the layer, its output by one node for x), of a second call."""
    layer = build(p)
    layer.adapter.router.sides = {3: 2}
    with mock.patch.object(_node.NODE, "module", module):
        layer.adapter.router.begin_forward()
        layer(x)
        out = layer(x)
        layer.adapter.router.end_forward()
    return layer, out


def rand_x(grad=True):
    return torch.randn(4, 5, 8, device=DEVICE, requires_grad=grad)


@pytest.mark.parametrize("level", ["batch", "sample"])
@pytest.mark.parametrize("conv", [False, True])
def test_gradients_that_are_not_memory_of_their_own(conv, level, module):
    x = rand_x()
    layer, out = whole({**usual(), "level": level, "conv": conv}, x, module)
    assert out.grad_fn.name() == "RoutedAdapterBackward"
    assert out.grad_fn.next_functions[0][0].variable is x
    check_gradients_that_are_not_memory(out, [x, *layer.adapter.banks()])


@pytest.mark.parametrize("conv", [False, True])
def test_frozen_weights_of_inference_mode(conv, module):
    layer = build({**usual(), "conv": conv})
    for name, parameter in layer.base.named_parameters():
        with torch.inference_mode():
            made = nn.Parameter(parameter.clone(), requires_grad=False)
        layer.base._parameters[name] = made
    router, x = layer.adapter.router, rand_x(grad=False)
    router.sides = {3: 2}
    with mock.patch.object(_node.NODE, "module", module):
        router.begin_forward()
        layer(x)
        out = layer(x)
        router.end_forward()
        assert out.grad_fn.name() == "RoutedAdapterBackward"
        assert out.grad_fn.next_functions[0][0] is None
        assert all(torch.isfinite(t).all() for t in torch.autograd.grad(out.sum(), layer.adapter.banks()))
        router.begin_forward()
        layer(x)
        (left,) = [len(drawn) for drawn in router._ahead.values()]
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            layer(x.requires_grad_())
        assert [len(drawn) for drawn in router._ahead.values()] == [left]  # they went back
        router.end_forward()


def test_a_weight_that_changes_before_the_backward_is_noticed(module):
    layer, out = whole(usual(), rand_x(), module)
    layer.base.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_output_may_be_written_and_a_graph_is_used_twice(module):
    x = rand_x()
    layer, out = whole(usual(), x, module)
    leaves, gradient = [x, *layer.adapter.banks()], torch.randn_like(out)
    out.mul_(1)
    first = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
    again = torch.autograd.grad(out, leaves, gradient.requires_grad_(), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again[0].sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_draws_as_it_did(reentrant, module):
    x, results = rand_x(), []
    for loaded in (module, None):
        layer = build(usual())
        router, spy = layer.adapter.router, None if loaded is None else Spy(loaded)
        router.sides = {3: 1}
        with mock.patch.object(_node.NODE, "module", spy):
            torch.manual_seed(3)
            router.begin_forward()
            out = checkpoint(layer, x, use_reentrant=reentrant)
            router.end_forward()
            results.append((out.detach(), *torch.autograd.grad(out.sum(), [x], retain_graph=True)) if not reentrant
                           else (out.detach(), by_backward(out, x)))  # fmt: skip
        assert spy is None or not spy.whole
    assert all(torch.equal(a, b) for a, b in zip(*results))


def by_backward(out, x):
    x.grad = None
    out.sum().backward()
    return x.grad


def test_where_only_the_layer_was_computed_its_adapter_goes_on(module):
    for conv in (False, True):
        run({**usual(), "conv": conv}, [], None)  # what serves it may be forgotten after so many kinds of calls
        layer, x = build({**usual(), "conv": conv}), rand_x()
        router = layer.adapter.router
        router.sides = {3: 1}
        router.begin_forward()
        router._ahead[3, (2,), x.device] = [torch.tensor([0, 7], device=DEVICE)]  # no such expert
        (base,) = module.adapter_on_linear(layer, x)
        assert base.grad_fn.name() == "FrozenLinearBackward"
        assert torch.equal(base, layer.base(x))
        assert [t.tolist() for t in router._ahead[3, (2,), x.device]] == [[0, 7]]
        gradient = torch.randn_like(base)
        (got,) = torch.autograd.grad(base, x, gradient)
        (want,) = torch.autograd.grad(layer.base(x), x, gradient)
        assert torch.equal(got, want)
        with mock.patch.object(_node.NODE, "module", module), pytest.raises(IndexError, match="index"):
            layer(x)
        router.end_forward()


def test_copies_and_functional_calls_use_what_they_are_given(module):
    x, other, results = rand_x(), {}, []
    layer, _ = whole(usual(), x, module)
    for name, p in layer.named_parameters():
        other[name] = (p.detach() + 1).requires_grad_(p.requires_grad)
    twin = copy.deepcopy(layer)
    twin.load_state_dict({name: p.detach() for name, p in other.items()})
    with mock.patch.object(_node.NODE, "module", Spy(module)) as spy:
        for part, call in ((layer, lambda: torch.func.functional_call(layer, other, (x,))), (twin, lambda: twin(x))):
            part.adapter.router.begin_forward()
            part.adapter.router._ahead[3, (2,), x.device] = [torch.tensor([0, 2], device=DEVICE)]
            results.append(call())
            part.adapter.router.end_forward()
            assert spy.whole
    assert torch.equal(*results)
