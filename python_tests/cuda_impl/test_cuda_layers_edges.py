"""Layers whose calls csrc/autograd/layers.cpp makes, at the edges: a router that changes during a draw, no tokens."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import gc
from unittest import mock

import pytest
import torch
from cuda_host import DEVICE, needs_cuda
from torch import nn

needs_cuda()

from adamix_kernels.modules import AdaptedLayer, RoutedAdapter
from adamix_kernels.ops import _node
from adamix_kernels.routing import Router, draws


@pytest.fixture(autouse=True)
def ahead(monkeypatch):
    monkeypatch.setattr(draws, "draws_ahead", lambda device: True)


def build(router):
    torch.manual_seed(0)
    adapter = RoutedAdapter(12, 4, 3, router=router, backend="cuda").to(DEVICE)
    for bank in adapter.banks():
        nn.init.normal_(bank)
    return AdaptedLayer(nn.Linear(8, 12, device=DEVICE).requires_grad_(False), adapter).train()


def test_a_router_may_begin_anew_during_a_draw():
    layer, x = build(Router()), torch.randn(4, 5, 8, device=DEVICE)
    layer(x)
    router, real = layer.adapter.router, layer.adapter.router._randint
    router.sides = {3: 1}

    def drawn(*given):
        index = real(*given)
        router.end_forward()  # as another thread's forward of the same model would
        router.begin_forward()
        gc.collect()
        return index

    router._randint = drawn
    for _ in range(40):
        router.begin_forward()
        assert layer(x).shape == (4, 5, 12)
        router.end_forward()


def test_what_stands_in_a_banks_place_is_used():
    layer, x, found = build(Router()), torch.randn(4, 5, 8, device=DEVICE), []
    layer(x)
    layer.adapter.__dict__["up_weight"] = torch.zeros_like(layer.adapter.up_weight)
    layer.adapter.__dict__["up_bias"] = torch.zeros_like(layer.adapter.up_bias)
    for module in (_node.NODE.module, None):
        with mock.patch.object(_node.NODE, "module", module):
            layer.adapter.router.begin_forward()
            found.append(layer(x).detach())
            layer.adapter.router.end_forward()
    assert torch.equal(*found)
    assert torch.equal(found[0], layer.base(x))


@pytest.mark.parametrize("backend", ["cuda", "reference"])
@pytest.mark.parametrize("in_cpp", [True, False])
def test_no_tokens(backend, in_cpp):
    adapter = RoutedAdapter(12, 4, 3, backend=backend).to(DEVICE)
    adapter(torch.ones(4, 1, 12, device=DEVICE))
    x = torch.ones(4, 0, 12, device=DEVICE, requires_grad=True)
    with mock.patch.object(_node.NODE, "module", _node.NODE.module if in_cpp else None):
        adapter(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(bank.grad is None or not bank.grad.any() for bank in adapter.banks())


def test_a_negated_view_goes_pythons_way():
    adapter, x = RoutedAdapter(12, 4, 1, backend="cuda").to(DEVICE), torch.randn(4, 5, 12, device=DEVICE)
    assert torch.equal(adapter(torch._neg_view(x)), adapter(-x))


def test_a_backward_frees_the_adapters_tensors_unless_the_graph_stays():
    layer, x = build(Router()), torch.randn(4, 5, 8, device=DEVICE, requires_grad=True)
    layer(x)
    layer.adapter.router.begin_forward()
    out = layer(x)
    layer.adapter.router.end_forward()
    first, second = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.autograd.grad(out.sum(), x)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), x)
