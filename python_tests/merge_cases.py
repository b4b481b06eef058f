"""The cases that every backend of merging is compared on."""

import contextlib

import torch
from poison import poisoned_memory

import adamix_kernels as ak
from adamix_kernels.functional import merge_experts, merge_lora
from adamix_kernels.modules.adapter import merge_adapters


def experts_on(backend):
    """(bank, dy[, scores]) -> the mean and its gradients."""

    def run(bank, dy, scores=None):
        leaves = [t.detach().requires_grad_() for t in (bank, scores) if t is not None]
        with poisoned_memory(backend != "reference"):
            out = merge_experts(leaves[0], leaves[1] if scores is not None else None, backend=backend)
            return out.detach(), *torch.autograd.grad(out, leaves, dy)

    return run


def lora_on(backend, **options):
    def run(weight, lora_a, lora_b, dy):
        leaves = [t.detach().requires_grad_() for t in (weight, lora_a, lora_b)]
        with poisoned_memory(backend != "reference"):
            out = merge_lora(*leaves, backend=backend, **options)
            return out.detach(), *torch.autograd.grad(out, leaves, dy)

    return run


def lora_case(randn, groups, experts, r, fan, dtype, rows=130, features=45):
    """[weight, lora_a, lora_b, dy] and the keyword arguments of merge_lora; randn(*shape, dtype=) draws."""
    per_group, offsets = 20, tuple(43 * g for g in range(groups))
    weight = randn(*((features, rows) if fan else (rows, features)), dtype=dtype)
    tensors = weight, randn(experts, groups * r, features, dtype=dtype), randn(groups * per_group, r, dtype=dtype)
    options = dict(scaling=1.7, groups=groups, output_offsets=offsets, fan_in_fan_out=fan)
    return [*tensors, randn(*weight.shape, dtype=dtype)], options


def check_whole_model(backend, device, around_merge=contextlib.nullcontext):
    """A model's merge is that of its adapters by the reference, and unmerge brings back every bit.

    Returns what the context around the merge gave.
    """
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
    ak.adapt(model, ak.AdaMixConfig(target_modules=["0", "1", "2"], bottleneck=4, share=None)).to(device)
    adapters = [layer.adapter for layer in model]
    for adapter in adapters:
        adapter.backend = backend
        for bank in adapter.banks():
            torch.nn.init.normal_(bank)
        adapter.down_score.data.normal_()
    before = [bank.clone() for adapter in adapters for bank in adapter.banks()]
    with around_merge() as seen:
        ak.merge(model)
    for adapter in adapters:
        adapter.backend = "reference"
    for got, want in zip(model, merge_adapters(adapters), strict=True):
        for mine, theirs in zip(got.adapter.banks(), want.banks(), strict=True):
            torch.testing.assert_close(mine, theirs)
    ak.unmerge(model)
    assert all(torch.equal(a, b) for a, b in zip(before, (b for layer in model for b in layer.adapter.banks())))
    return seen
