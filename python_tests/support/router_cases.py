"""What the tests of every backend of router_gates share: the definition, and what must hold of all."""

import torch
from poison import poisoned_memory
from torch.nn import functional as F

from adamix_kernels.routing import LinearRouter, balance_loss, router_gates, z_loss
from adamix_kernels.testing import assert_in_budget

# (leading axes, H, M, top_k, bias, weight in float32)
SIZES = [
    ((2, 5), 64, 8, 2, False, True),
    ((33,), 37, 5, None, True, False),
    ((3, 1), 9, 3, 1, True, True),
    ((1,), 130, 256, 5, False, False),
    ((2, 20), 24, 17, 16, True, False),
    ((4,), 8, 1, 1, False, True),
    ((0, 3), 8, 4, 2, False, True),
    ((3,), 0, 4, 2, True, False),
]


def drawn(lead, features, experts, bias, wide, dtype, whole=False, device="cpu"):
    """x, weight and bias; whole: small integers, whose logits every dtype holds exactly, with many ties."""
    generator = torch.Generator().manual_seed(1)

    def one(*shape, scale=1.0):
        if whole:
            return torch.randint(-1, 2, shape, generator=generator).double()
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    other = dtype if dtype == torch.float64 or not wide else torch.float32
    weight = one(experts, features, scale=max(1, features) ** -0.5)
    made = one(*lead, features).to(dtype), weight.to(other), one(experts).to(other) if bias else None
    return tuple(t if t is None else t.to(device) for t in made)


def definition(x, weight, bias, top_k, index=None):
    """Plain PyTorch in x's dtype; index: what was chosen, else the largest logits, of equal ones the first."""
    logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    logits = logits.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if top_k is None or top_k == weight.shape[0]:
        return logits.softmax(-1), None, logits
    if index is None:
        ids = torch.arange(weight.shape[0], dtype=torch.float64, device=x.device)
        key = logits.detach().double() * 1024 - ids  # of whole numbers alone
        index = key.topk(top_k).indices
    chosen = logits.softmax(-1).gather(-1, index)
    return chosen / chosen.sum(-1, keepdim=True), index, logits


def check_forward_and_gradients(backend, dtype, lead, features, experts, top_k, bias, wide, device="cpu"):
    """Within the budget of same-dtype PyTorch, of gates and logits and all gradients; x in rows that lie apart."""
    x, weight, b = drawn(lead, features, experts, bias, wide, dtype, device=device)
    given = [t for t in (x, weight, b) if t is not None]
    index = router_gates(x, weight, b, top_k=top_k, backend=backend).indices
    grads = [torch.randn(*lead, n, generator=torch.Generator().manual_seed(n)).to(device) for n in (
        experts if index is None else top_k, experts)]  # fmt: skip

    def run(call, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        strided = torch.stack([leaves[0], leaves[0]], -1)[..., 0]
        gates, _, logits = call(strided, *leaves[1:], *[None] * (b is None))
        loss = sum((out * grad).sum() for out, grad in zip((gates, logits), grads, strict=True))
        return gates, logits, *torch.autograd.grad(loss, leaves)

    with poisoned_memory():
        assert_in_budget(
            lambda *t: run(lambda *a: router_gates(*a, top_k=top_k, backend=backend), *t),
            lambda *t: run(lambda *a: definition(*a, top_k, index), *t), *given, multiple=3.0,
        )  # fmt: skip


def check_choice(backend, dtype, device="cpu"):
    """Of whole numbers every backend gives the logits and the ids of the definition, ties and all; twice alike."""
    for lead, features, experts, top_k, bias, wide in SIZES:
        tensors = drawn(lead, features, experts, bias, wide, dtype, whole=True, device=device)
        gates, index, logits = router_gates(*tensors, top_k=top_k, backend=backend)
        want = definition(*tensors, top_k)
        assert torch.equal(logits, want[2])
        assert (index is None) == (want[1] is None)
        assert index is None or (torch.equal(index, want[1]) and index.dtype == torch.int64)
        torch.testing.assert_close(gates, want[0])
        again = router_gates(*tensors, top_k=top_k, backend=backend)
        assert torch.equal(gates, again.gates)
        assert gates.dtype == logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def check_not_finite(backend, device="cpu"):
    """A NaN makes its row's gates NaN, where it is chosen; ids stay experts; other rows keep their bits."""
    x, weight, _ = drawn((4, 6), 40, 6, False, False, torch.float32, device=device)
    for bad, where in ((float("nan"), "x"), (float("inf"), "x"), (float("nan"), "weight"), (-float("inf"), "weight")):
        a, w = x.clone(), weight.clone()
        (a[1, 2] if where == "x" else w[3])[5] = bad
        for top_k in (None, 2, 5):
            got = router_gates(a, w, top_k=top_k, backend=backend)
            want = router_gates(a, w, top_k=top_k, backend="reference")
            assert torch.equal(got.gates.isnan(), want.gates.isnan())
            if top_k:
                assert torch.equal(got.indices, want.indices)
                assert got.indices.sort(-1).values.diff().min() > 0
            if where == "x":
                clean = router_gates(x, w, top_k=top_k, backend=backend).gates
                keep = torch.ones(4, 6, dtype=torch.bool, device=device)
                keep[1, 2] = False
                assert torch.equal(got.gates[keep], clean[keep])


def check_module(backend, device="cpu"):
    """LinearRouter through the op: the reference path's gates, losses and gradients."""
    torch.manual_seed(0)
    router = LinearRouter(16, 6, 2, balance=True, z=True).to(device).train()
    router.weight.data.mul_(20)
    x, mask = torch.randn(2, 7, 16, device=device, requires_grad=True), torch.ones(2, 7, device=device)
    mask[1, 4:] = 0
    made = []
    for router.backend in ("reference", backend):
        gates, index = router(x, mask)
        loss = (gates * torch.arange(2.0, device=device)).sum() + router.last.balance + router.last.z
        made.append((gates, index, router.last.balance, router.last.z, *torch.autograd.grad(
            loss, [x, router.weight])))  # fmt: skip
    for got, want in zip(*made, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def check_compile(backend, device="cpu"):
    """One graph, whatever the batch; the module too. Under autocast x takes its dtype."""
    weight = torch.randn(4, 8, device=device, requires_grad=True)
    router = LinearRouter(8, 4, 2, balance=True).to(device).train()
    router.backend = backend

    def call(x):
        gates, index, logits = router_gates(x, weight, top_k=2, backend=backend)
        found = router(x)
        return gates.square().sum() + balance_loss(logits.softmax(-1), index) + z_loss(logits) + found.gates.sum()

    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=count, fullgraph=True, dynamic=True)
    for rows in (3, 4, 5):
        x = torch.randn(rows, 2, 8, device=device)
        torch.testing.assert_close(compiled(x), call(x))
        torch.testing.assert_close(*(torch.autograd.grad(f(x), weight)[0] for f in (compiled, call)))
    assert count.frame_count <= 2
    with torch.autocast(device, torch.bfloat16):
        narrow = router_gates(x, weight, top_k=2, backend=backend)
    want = router_gates(x.bfloat16(), weight, top_k=2, backend=backend)
    assert torch.equal(narrow.logits, want.logits)
    for top_k in (2, 0):
        arguments = x.requires_grad_(), weight, None, top_k, backend
        torch.library.opcheck(torch.ops.adamix_kernels.router.default, arguments)
