"""RoutedLoRALinear adds its update to its base layer's output in place, where nobody can notice."""

import copy
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from transformers.pytorch_utils import Conv1D

from adamix_kernels import RoutedLoRALinear, Router
from adamix_kernels.ops.routed_lora.api import routed_by_pass


def assert_same(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class _Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class _Identity(nn.Identity):
    in_features = out_features = 12


def _patched():
    layer = nn.Linear(12, 12)
    layer.forward = layer.forward
    return layer


def _hooked(register):
    layer = nn.Linear(12, 12)
    getattr(layer, register)(lambda *given: None)
    return layer


PLAIN = {
    "linear": lambda: nn.Linear(12, 12),
    "linear without bias": lambda: nn.Linear(12, 12, bias=False),
    "conv1d": lambda: Conv1D(12, 12),
}
OTHER = {
    "linear and relu": lambda: nn.Sequential(nn.Linear(12, 12), nn.ReLU()),
    "identity": _Identity,
    "subclass": lambda: _Doubled(12, 12),
    "own forward": _patched,
    "forward hook": lambda: _hooked("register_forward_hook"),
    "backward hook": lambda: _hooked("register_full_backward_hook"),
    "backward pre-hook": lambda: _hooked("register_full_backward_pre_hook"),
}


def adapted(base, **options):
    torch.manual_seed(0)
    layer = RoutedLoRALinear(base, 12, 12, 2, 4, 3, dropout=0.2, groups=2, output_offsets=(0, 8), group_features=4,
                             **options)  # fmt: skip
    nn.init.normal_(layer.lora_b)
    return layer


def run(layer, shape, inplace=None, dtype=torch.float32):
    """(output in training, gradients, output in evaluation, whether base was overwritten); inplace: overrides."""
    seen = []

    def spy(*args):
        *given, asked, backend, consumed = args
        seen.append(asked)
        return routed_by_pass(*given, asked if inplace is None else inplace, backend, consumed)

    with mock.patch("adamix_kernels.modules.lora.routed_by_pass", spy):
        torch.manual_seed(1)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        before = x.detach().clone()
        out = layer.train()(x)
        out.sin().sum().backward()
        with torch.no_grad():
            evaluated = layer.eval()(x)
    assert torch.equal(x, before)
    return (out, x.grad, layer.lora_a.grad, layer.lora_b.grad, evaluated), seen


@pytest.mark.parametrize("level", ["batch", "sample", "token"])
@pytest.mark.parametrize("shape", [(4, 5, 12), (4, 12), (4, 2, 3, 12)])
@pytest.mark.parametrize("name", PLAIN)
def test_a_linear_layers_output_is_overwritten(name, shape, level):
    layer = adapted(PLAIN[name](), router=Router(level))
    want, _ = run(copy.deepcopy(layer), shape, inplace=False)
    got, seen = run(layer, shape)
    assert seen == [True, True]
    assert_same(got, want)


@pytest.mark.parametrize("name", OTHER)
def test_any_other_bases_output_is_not(name):
    layer = adapted(OTHER[name]())
    want, _ = run(copy.deepcopy(layer), (4, 5, 12), inplace=False)
    got, seen = run(layer, (4, 5, 12))
    assert seen == [False, False]
    assert_same(got, want)


def test_nor_is_one_that_a_hook_of_all_layers_sees():
    layer, kept = adapted(nn.Linear(12, 12)), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, out: kept.append((out, out.clone())))
    try:
        run(layer, (4, 5, 12))
    finally:
        handle.remove()
    assert len(kept) >= 4
    assert all(torch.equal(out, then) for out, then in kept)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_under_autocast_and_in_other_dtypes(dtype, autocast):
    layer = adapted(nn.Linear(12, 12, dtype=dtype), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want, _ = run(copy.deepcopy(layer), (4, 5, 12), inplace=False, dtype=dtype)
        got, seen = run(layer, (4, 5, 12), dtype=dtype)
    assert seen == [True, True]
    assert_same(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer(reentrant):
    layer = adapted(nn.Linear(12, 12))
    want, _ = run(copy.deepcopy(layer), (4, 5, 12), inplace=False)
    torch.manual_seed(1)
    x = torch.randn(4, 5, 12, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer.train(), x, use_reentrant=reentrant).sin().sum().backward()
    assert_same((x.grad, layer.lora_a.grad, layer.lora_b.grad), want[1:4])


def test_a_compiled_layer():
    torch._dynamo.reset()
    layer = adapted(nn.Linear(12, 12))
    want, _ = run(copy.deepcopy(layer), (4, 5, 12))
    compiled = torch.compile(layer.train(), fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    x = torch.randn(4, 5, 12, requires_grad=True)
    compiled(x).sin().sum().backward()
    assert_same((x.grad, layer.lora_a.grad, layer.lora_b.grad), want[1:4])
