"""Passes in one batch: what the modules ask of the ops must be what one index for every sample gives."""

import torch

from adamix_kernels.functional import routed_adapter, routed_lora
from adamix_kernels.ops.routed_adapter.api import routed_by_pass as adapter_by_pass
from adamix_kernels.ops.routed_lora.api import routed_by_pass as lora_by_pass

BATCH, TOKENS, HIDDEN, RANK, EXPERTS, PASSES = 4, 3, 16, 4, 3, 2


def check_adapter(backend, device, residual):
    """residual: None, "x" or "other"."""
    x, other = (randn(device, BATCH, TOKENS, HIDDEN) for _ in range(2))
    shapes = (EXPERTS, RANK, HIDDEN), (EXPERTS, RANK), (1, HIDDEN, RANK), (1, HIDDEN)
    banks = [randn(device, *shape) for shape in shapes]
    index = torch.tensor([2, 0], device=device)
    added = {None: None, "x": x, "other": other}[residual]
    leaves = [x, *banks] if added is not other else [x, *banks, other]
    options = added, "gelu", backend
    whole = routed_adapter(x, *banks, each(index), None, residual=added, backend=backend)
    same(lambda: adapter_by_pass(x, *banks, index, None, PASSES, *options), whole, leaves)


def check_lora(backend, device, inplace, dropout_p):
    x, base = randn(device, BATCH, TOKENS, HIDDEN), randn(device, BATCH, TOKENS, 3 * HIDDEN)
    a, b = randn(device, EXPERTS, 2 * RANK, HIDDEN), randn(device, EXPERTS, 2 * HIDDEN, RANK)
    i, j = torch.tensor([1, 1], device=device), torch.tensor([2, 0], device=device)
    groups = 2, (0, 2 * HIDDEN)
    whole = routed_lora(
        x, a, b, each(i), each(j), base=base, scaling=0.5, groups=2, output_offsets=groups[1], dropout_p=dropout_p,
        seed=5, backend=backend,
    )  # fmt: skip

    def by_pass():
        target = base.clone() if inplace else base
        return lora_by_pass(x, a, b, i, j, PASSES, target, 0.5, *groups, dropout_p, 5, inplace, backend)

    same(by_pass, whole, [x, a, b, base])


def same(call, whole, leaves):
    """Twice: a call that plans and one that finds the plan. Sums of other splits of the rows may round otherwise."""
    gradient = torch.randn_like(whole)
    wanted = torch.autograd.grad(whole, leaves, gradient)
    for _ in range(2):
        out = call()
        torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
        # Models may add to a layer's output in place.
        torch.autograd.grad(out.add_(1.0), leaves, gradient)
        out = call()
        for got, want in zip(torch.autograd.grad(out, leaves, gradient), wanted, strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(call(), whole, rtol=1e-5, atol=1e-6)


def each(index):
    return index.repeat_interleave(BATCH // PASSES)


def randn(device, *shape):
    return torch.randn(*shape, device=device, requires_grad=True)
