"""LoRA modules whose frozen linear layer is computed with them (csrc/autograd/linear.cpp): the bits of Python's way."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import contextlib
import random
from unittest import mock

import pytest
import torch
from cuda_host import DEVICE, needs_cuda
from torch import nn
from watched_layers import AROUND, OF_LINEARS, agree, around, check_gradients_that_are_not_memory, watched

needs_cuda()
pytest.importorskip("transformers")

from transformers.pytorch_utils import Conv1D

from adamix_kernels.modules import RoutedLoRALinear
from adamix_kernels.ops import _node
from adamix_kernels.routing import Router, draws

# What a call depends on; the first values are usual ones.
PROPERTIES = {
    "conv": [False, True],
    "bias": [True, False],
    "dtype": [torch.float32, torch.bfloat16],
    "base_dtype": [None, torch.float32],
    "out": [12, 8],
    "groups": [1, 2],
    "share": ["up", None, "down"],
    "dropout": [0.0, 0.4],
    "level": ["batch", "sample", "token"],
    "batch": [4, 3],
    "tokens": [5, 1],
    "x": ["grad", "plain", "strided", "2D"],
    "learns": [True, False],
    "weight_learns": [False, True],
    "backend": ["cuda", "reference"],
    "around": AROUND,
    "watcher": OF_LINEARS,
    "gradient": ["dense", "expanded"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def ahead(monkeypatch):
    monkeypatch.setattr(draws, "draws_ahead", lambda device: True)


def base_layer(p):
    if p["conv"]:
        return Conv1D(p["out"], 8)
    return nn.Linear(8, p["out"], bias=p["bias"])


def build(p):
    torch.manual_seed(0)
    base = base_layer(p).to(DEVICE, p["base_dtype"] or p["dtype"])
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    groups = p["groups"]
    layer = RoutedLoRALinear.from_linear(
        base, r=2, alpha=3, num_experts=3, share=p["share"], dropout=p["dropout"], groups=groups,
        output_offsets=(0, p["out"] // 2)[:groups], router=Router(p["level"]), backend=p["backend"],
        group_features=p["out"] // 2,
    ).train()  # fmt: skip
    nn.init.normal_(layer.lora_b)
    layer.lora_a.requires_grad_(p["learns"]), layer.lora_b.requires_grad_(p["learns"])
    base.weight.requires_grad_(p["weight_learns"])
    return layer


def run(p, calls):
    """(output, whether the node was the base layer's too, gradients, the generator's next number) of a second call."""
    layer = build(p)
    shape = (p["batch"] * p["tokens"], 8) if p["x"] == "2D" else (p["batch"], p["tokens"], 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, p["dtype"])
    if p["x"] == "strided":
        x = x.repeat(1, 1, 2)[..., ::2]
    x.requires_grad_(p["x"] != "plain")
    if p["base_dtype"] not in (None, p["dtype"]):
        x = x.to(p["base_dtype"]) if p["x"] == "2D" else x
    layer.router.sides = {3: 4}  # of two calls
    with around(p["around"]), watched(layer.base, p["watcher"], calls):
        torch.manual_seed(2)
        layer.router.begin_forward()
        try:
            layer(x)  # has the experts drawn
            calls.clear()
            out = layer(x)
        except RuntimeError as error:  # a layer of another dtype
            return str(error)
        layer.router.end_forward()
        whole = len(getattr(out.grad_fn, "next_functions", ())) == 4 and out.grad_fn.next_functions[3][0] is None
        grads = []
        if out.requires_grad:
            gradient = torch.ones_like(out) if p["gradient"] == "dense" else out.new_ones(()).expand_as(out)
            leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
            grads = torch.autograd.grad(out, leaves, gradient, allow_unused=True)
    return out.detach(), whole, grads, torch.rand(2, device=DEVICE)


def usual():
    return {name: values[0] for name, values in PROPERTIES.items()}


def compare(p):
    """Whether node and base were one; the results are those without the module, and everybody who watches is told."""
    calls, expected = [], []
    with mock.patch.object(_node.NODE, "module", None):
        want = run(p, expected)
    got = run(p, calls)
    assert agree(got, want), p
    assert calls == expected, p
    return not isinstance(got, str) and got[1]


@pytest.fixture(autouse=True)
def loaded():
    run(usual(), [])
    assert _node.NODE.module is not None, "the build puts the module beside the library"


@pytest.mark.parametrize("conv", [False, True])
def test_a_frozen_layer_and_its_update_are_one_node(conv):
    variants = (
        {}, {"bias": False}, {"dtype": torch.bfloat16}, {"x": "plain"}, {"dropout": 0.4}, {"level": "sample"},
        {"gradient": "expanded"}, {"groups": 2, "share": None}, {"learns": False},
    )  # fmt: skip
    for changed in variants:
        assert compare({**usual(), "conv": conv, **changed}), changed


def test_what_is_not_plain_or_is_watched_is_called_as_it_is():
    unusual = {
        "watcher": PROPERTIES["watcher"][1:], "weight_learns": [True], "around": PROPERTIES["around"][1:],
        "x": ["strided", "2D"], "level": ["token"], "backend": ["reference"], "base_dtype": [torch.float64],
    }  # fmt: skip
    for name, values in unusual.items():
        for value in values:
            for conv in (False, True):
                assert not compare({**usual(), "conv": conv, name: value}), (name, value)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("watcher", ["function", "class's forward", "class's _call_impl", "class's __getattr__"])
def test_what_was_changed_before_it_was_recorded_is_no_original(watcher, conv, monkeypatch):
    p = {**usual(), "conv": conv, "watcher": watcher}
    assert compare({**p, "watcher": "nobody"})  # Conv1D is recorded by its first call
    kind = Conv1D if conv else nn.Linear
    original = _node.LINEARS[kind]
    recorded = (kind, "torch", torch, "addmm", True) if conv else (kind, "F", nn.functional, "linear", False)

    patch = watched

    @contextlib.contextmanager
    def recording(*given):
        with patch(*given):
            _node.keep_linear(*recorded)
            yield

    with monkeypatch.context() as patched:
        patched.setitem(globals(), "watched", recording)
        assert not compare(p)
        assert _node.LINEARS[kind] is None
    _node.keep_linear(*recorded)
    assert _node.LINEARS[kind] == original


def test_frozen_weights_of_inference_mode():
    for conv in (False, True):
        layer = build({**usual(), "conv": conv})
        for name, parameter in layer.base.named_parameters():
            with torch.inference_mode():
                made = nn.Parameter(parameter.clone(), requires_grad=False)
            layer.base._parameters[name] = made
        x = torch.randn(4, 5, 8, device=DEVICE)
        layer.router.sides = {3: 2}
        layer.router.begin_forward()
        layer(x)
        out = layer(x)
        layer.router.end_forward()
        assert out.grad_fn.name() == "RoutedLoRABackward"
        assert out.grad_fn.next_functions[3][0] is None
        assert all(torch.isfinite(t).all() for t in torch.autograd.grad(out.sum(), [layer.lora_a, layer.lora_b]))
        layer.router.sides = {3: 2}
        layer.router.begin_forward()
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            layer(x.requires_grad_())
        left = [len(drawn) for drawn in layer.router._ahead.values()]
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            layer(x)
        assert [len(drawn) for drawn in layer.router._ahead.values()] == left  # they went back
        layer.router.end_forward()


def whole_output(level, x):
    layer = build({**usual(), "level": level})
    layer.router.sides = {3: 2}
    torch.manual_seed(2)
    layer.router.begin_forward()
    layer(x)
    out = layer(x)
    layer.router.end_forward()
    return layer, out


@pytest.mark.parametrize("level", ["batch", "sample"])
def test_gradients_that_are_not_memory_of_their_own(level):
    x = torch.randn(4, 5, 8, device=DEVICE, requires_grad=True)
    layer, out = whole_output(level, x)
    assert len(out.grad_fn.next_functions) == 4
    assert out.grad_fn.next_functions[3][0] is None
    check_gradients_that_are_not_memory(out, [x, layer.lora_a, layer.lora_b])


def test_two_calls_that_differ_in_one_property():
    draw, taken = random.Random(0), 0
    for _ in range(20):
        first = {name: draw.choice(values) if draw.random() < 0.4 else values[0] for name, values in PROPERTIES.items()}
        name = draw.choice(list(PROPERTIES))
        for p in (first, {**first, name: draw.choice(PROPERTIES[name])}, first):
            taken += compare(p)
    assert taken > 5


def test_where_only_the_layer_was_computed_its_output_has_its_history():
    for conv in (False, True):
        layer = build({**usual(), "conv": conv})
        x = torch.randn(4, 5, 8, device=DEVICE, requires_grad=True)
        layer.router.sides = {3: 1}
        layer.router.begin_forward()
        layer.router._ahead[3, (2,), x.device] = [torch.tensor([0, 1], device=DEVICE)]
        layer.output_offsets = (-1,)  # the kernels refuse it
        (base,) = _node.NODE.module.lora_on_linear(layer, x)
        assert base.grad_fn.name() == "FrozenLinearBackward"
        assert torch.equal(base, layer.base(x))
        gradient = torch.randn_like(base)
        (got,) = torch.autograd.grad(base, x, gradient)
        (want,) = torch.autograd.grad(layer.base(x), x, gradient)
        assert torch.equal(got, want)
        layer.router.end_forward()
