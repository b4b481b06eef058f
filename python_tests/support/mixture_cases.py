"""What the tests of every backend of mixture_lora share: its definition by the two ops, and what must hold of all."""

import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from poison import poisoned_memory
from suite_size import NIGHTLY

from adamix_kernels.functional import routed_lora
from adamix_kernels.modules import RoutedLoRALinear
from adamix_kernels.routing import LinearRouter, balance_loss, mixture_lora, router_gates, z_loss
from adamix_kernels.testing import assert_in_budget

# (batch, tokens, K, experts of A, of B, groups * r, groups, Ng, top_k, dropout, router in float32)
SHAPES = {
    "dense": (2, 19, 64, 8, 8, 8, 1, 48, None, 0.0, True),
    "dense, tails, groups, dropout": (3, 7, 37, 3, 3, 10, 2, 11, None, 0.3, False),
    "top 2": (2, 19, 64, 8, 8, 8, 1, 48, 2, 0.0, False),
    "top 3 of 5, tails, groups, dropout": (3, 7, 37, 5, 5, 6, 2, 11, 3, 0.3, True),
    "one A": (2, 9, 33, 1, 6, 4, 1, 17, None, 0.3, True),
    "one A, top 2": (2, 9, 33, 1, 6, 4, 1, 17, 2, 0.0, False),
    "one B": (2, 9, 33, 6, 1, 4, 1, 17, None, 0.0, True),
    "one B, top 1": (2, 9, 33, 6, 1, 4, 1, 17, 1, 0.3, False),
    "sixteen of rank 1": (1, 5, 20, 16, 16, 1, 1, 9, 15, 0.0, True),
    "a token": (1, 1, 40, 4, 4, 4, 1, 24, 2, 0.0, True),
    "256 columns": (2, 17, 20, 8, 8, 32, 1, 19, 2, 0.0, True),
}
# What no one tile holds: many experts, a wide rank, one expert.
WIDE = {
    "many experts": (2, 9, 33, 20, 20, 4, 1, 17, 3, 0.3, True),
    "wide rank": (2, 9, 33, 4, 4, 70, 1, 17, None, 0.0, True),
    "one expert": (2, 9, 33, 1, 1, 4, 1, 17, None, 0.0, True),
}


class Mixture:
    """The tensors of a shape, drawn; whole: x and the router are small integers, whose logits every dtype holds."""

    def __init__(self, shape, dtype=torch.float64, device="cpu", whole=False, seed=0):
        batch, tokens, features, of_a, of_b, rows, self.groups, per_group, self.top_k, self.dropout_p, wide = shape
        self.generator, experts = torch.Generator().manual_seed(seed), max(of_a, of_b)
        other = dtype if dtype == torch.float64 or not wide else torch.float32

        def one(*sizes, scale=1.0, of=dtype, whole=False):
            made = torch.randn(*sizes, generator=self.generator, dtype=torch.float64) * scale
            made = torch.randint(-1, 2, sizes, generator=self.generator).double() if whole else made
            return made.to(device, of)

        self.x = one(batch, tokens, features, whole=whole)
        self.a, self.b = (
            one(of_a, rows, features, scale=features**-0.5),
            one(of_b, self.groups * per_group, rows // self.groups),
        )
        self.router = one(experts, features, scale=features**-0.5, of=other, whole=whole)
        self.offsets = [g * (per_group + 2) for g in range(self.groups)]
        self.base = one(batch, tokens, max(self.offsets) + per_group + 1)
        chosen = experts if self.top_k is None else self.top_k
        # The gradients of out, gates and logits.
        self.grads = [
            one(*sizes).float() for sizes in (self.base.shape, (batch, tokens, chosen), (batch, tokens, experts))
        ]

    @property
    def tensors(self):
        return self.x, self.a, self.b, self.router, self.base

    @property
    def options(self):
        how = dict(scaling=1.7, groups=self.groups, output_offsets=self.offsets, dropout_p=self.dropout_p)
        return how | (dict(seed=11) if self.dropout_p else {})

    def call(self, backend, *tensors, **more):
        x, a, b, router, base = tensors
        return mixture_lora(x, a, b, router, top_k=self.top_k, base=base, backend=backend, **self.options, **more)

    def definition(self, backend, index, *tensors):
        """By the two ops; index: what was chosen, so that a logit's last bit chooses nothing else. None: choose."""
        x, a, b, router, base = tensors
        gates, own, logits = router_gates(x, router, top_k=self.top_k, backend=backend)
        if index is not None:
            gates, own = logits.gather(-1, index).softmax(-1), index
        of = [own if bank.shape[0] > 1 else None for bank in (a, b)]
        gates = gates.sum(-1, keepdim=True) if len(a) == len(b) == 1 else gates
        return routed_lora(x, a, b, *of, base=base, gates=gates, backend=backend, **self.options), gates, own, logits

    def results(self, call, *tensors, through=(0, 1, 2)):
        """out, gates, logits, and every gradient through those of them that `through` names."""
        leaves = [t.detach().requires_grad_() for t in tensors]
        out, gates, _, logits = call(*leaves)
        made = out, gates, logits
        loss = sum((made[n] * self.grads[n].to(made[n])).sum() for n in through)
        return *made, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def check_against_parts(backend, shape, dtype, device="cpu"):
    """Within the budget of the reference's two ops, every gradient too; the same bits twice."""
    case = Mixture(shape, dtype, device)
    index = case.call(backend, *case.tensors).indices
    assert (index is None) == (case.top_k is None)
    with poisoned_memory():
        assert_in_budget(
            lambda *t: case.results(lambda *a: case.call(backend, *a), *t),
            lambda *t: case.results(lambda *a: case.definition("reference", index, *a), *t),
            *case.tensors, multiple=8.0,
        )  # fmt: skip
    first, second = (case.results(lambda *a: case.call(backend, *a), *case.tensors) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def check_choice(backend, shape, dtype, device="cpu"):
    """Of whole numbers the logits and the ids are exactly the router's, ties too."""
    case = Mixture(shape, dtype, device, whole=True)
    made = case.call(backend, *case.tensors)
    want = router_gates(case.x, case.router, top_k=case.top_k, backend="reference")
    assert torch.equal(made.logits, want.logits)
    assert made.indices is want.indices is None or torch.equal(made.indices, want.indices)
    assert made.logits.dtype == made.gates.dtype == want.gates.dtype
    torch.testing.assert_close(made.gates, want.gates)


def check_not_finite(backend, device="cpu"):
    """A NaN or an infinity of one token stays there: ids are experts, every other row keeps its bits."""
    for name in ("dense", "top 2", "one A, top 2", "one B"):
        case = Mixture(SHAPES[name], torch.float32, device)
        clean = case.call(backend, *case.tensors)
        for bad in (float("nan"), float("inf")):
            x = case.x.clone()
            x[1, 2, 5] = bad
            made = case.call(backend, x, *case.tensors[1:])
            want = case.definition("reference", None, x, *case.tensors[1:])
            keep = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
            keep[1, 2] = False
            assert torch.equal(made.out[keep], clean.out[keep])
            assert torch.equal(made.gates[keep], clean.gates[keep])
            assert torch.equal(made.gates.isnan(), want[1].isnan())
            assert made.out[1, 2, : case.b.shape[1]].isnan().all()
            assert made.indices is None or torch.equal(made.indices, want[2])


def check_infinite_expert(backend, device="cpu"):
    """What is infinite in an expert's factors reaches the tokens that chose it, no other."""
    case = Mixture(SHAPES["top 2"], torch.float32, device)
    clean = case.call(backend, *case.tensors)
    for at in ("a", "b"):
        a, b = case.a.clone(), case.b.clone()
        (a if at == "a" else b)[3] = float("inf")
        made = case.call(backend, case.x, a, b, case.router, case.base)
        chose = (clean.indices == 3).any(-1)
        assert 0 < chose.sum() < chose.numel()
        torch.testing.assert_close(made.out[~chose], clean.out[~chose])
        assert not made.out[chose][:, : b.shape[1]].isfinite().any()


def check_in_place(backend, device="cpu"):
    """The bits of the call that is not, in base's memory, its gradient too; without a base zeros stand there."""
    for name in ("dense", "top 3 of 5, tails, groups, dropout"):
        case = Mixture(SHAPES[name], torch.float32, device)
        want = case.results(lambda *t, case=case: case.call(backend, *t), *case.tensors)

        def over(x, a, b, router, base, case=case):
            target = base * 1
            made = case.call(backend, x, a, b, router, target, inplace=True)
            assert made.out.data_ptr() == target.data_ptr()
            return made

        assert all(torch.equal(m, w) for m, w in zip(case.results(over, *case.tensors), want, strict=True))
        with torch.no_grad():
            target = case.base.clone()
            made = case.call(backend, *case.tensors[:4], target, inplace=True)
            assert torch.equal(target, want[0])
            assert torch.equal(made.out, target)
            bare = case.call(backend, *case.tensors[:4], None).out
        torch.testing.assert_close(bare, want[0][..., :-1] - case.base[..., :-1], rtol=1e-4, atol=1e-4)


def check_unused(backend, device="cpu"):
    """An expert that nobody chose has exactly zero gradients, in the router too where only gates carry one."""
    case = Mixture(SHAPES["top 2"], torch.float32, device)
    router = case.router.clone()
    x = case.x.abs()
    router[3] = -100.0
    tensors = x, case.a, case.b, router, case.base
    _, _, _, _, da, db, drouter, _ = case.results(lambda *t: case.call(backend, *t), *tensors, through=(0, 1))
    for grad in (da, db, drouter):
        assert grad[3].eq(0).all()
        assert grad.ne(0).any()


def check_empty(backend, device="cpu"):
    for batch, tokens in ((0, 3), (3, 0)):
        for name in ("dense", "top 2"):
            case = Mixture((batch, tokens, *SHAPES[name][2:]), torch.float32, device)
            out, gates, logits, *grads = case.results(lambda *t, case=case: case.call(backend, *t), *case.tensors)
            assert out.shape == case.base.shape
            assert gates.shape[:2] == logits.shape[:2] == (batch, tokens)
            assert all(grad.eq(0).all() for grad in grads)


def check_layer(backend, monkeypatch, device="cpu", dtype=torch.float32):
    """RoutedLoRALinear and its router as one op: the gates, losses, means and gradients of the two ops.

    dtype: of the base and x; the router is float32, as adapt() leaves it.
    """
    from adamix_kernels.modules import _mixture

    calls = []
    monkeypatch.setattr(_mixture, "mixture_lora", lambda *a, **k: calls.append(1) or mixture_lora(*a, **k))
    for top_k, share in ((None, None), (2, None), (2, "down"), (None, "up")):
        made = []
        for one in (False, True):
            torch.manual_seed(0)
            gate = LinearRouter(16, 6, top_k, balance=True, z=True)
            base = torch.nn.Linear(16, 24, dtype=dtype)
            options = dict(r=4, alpha=8, num_experts=6, share=share, gate=gate, dropout=0.25, backend=backend)
            layer = RoutedLoRALinear.from_linear(base, **options).to(device)
            torch.nn.init.normal_(layer.lora_b)
            gate.weight.data.mul_(20)
            mask = torch.ones(2, 7, device=device)
            mask[1, 4:] = 0
            layer.router.attention_mask = mask
            assert layer.rides
            calls.clear()
            monkeypatch.setattr(_mixture, "by_kernel", lambda *_, one=one: one)
            x = torch.randn(2, 7, 16).to(device, dtype).requires_grad_()
            out = layer(x)
            loss = out.float().square().sum() + gate.last.balance + gate.last.z
            leaves = [x, layer.lora_a, layer.lora_b, gate.weight]
            made.append((out, gate.last.balance, gate.last.z, gate.mean_gates, gate.mean_square, gate.batches,
                         *torch.autograd.grad(loss, leaves), layer.eval()(x)))  # fmt: skip
            assert len(calls) == 2 * one
            assert gate.last.balance is None
            # Somebody who is told of the router's calls still is.
            hook = gate.register_forward_hook(lambda *_: calls.append(2))
            layer(x)
            hook.remove()
            assert calls[2 * one :] == [2]
        for got, want in zip(*made, strict=True):
            if dtype == torch.float32:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            else:
                assert (got - want).float().norm() <= 0.01 * want.float().norm()


def check_compiled_layer(backend, monkeypatch, device="cpu"):
    """One graph of the layer, its router and its losses, whatever the batch."""
    from adamix_kernels.modules import _mixture

    def served(*_):
        return True

    served._dynamo_marked_constant = True
    monkeypatch.setattr(_mixture, "by_kernel", served)
    gate = LinearRouter(16, 6, 2, balance=True)
    options = dict(r=4, alpha=8, num_experts=6, share=None, gate=gate, backend=backend)
    layer = RoutedLoRALinear.from_linear(torch.nn.Linear(16, 10), **options).to(device)
    torch.nn.init.normal_(layer.lora_b)

    def loss(x):
        return layer(x).square().sum() + gate.last.balance

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5, 9):
        x = torch.randn(batch, 7, 16, device=device, requires_grad=True)
        leaves = [x, layer.lora_a, layer.lora_b, gate.weight]
        with torch._dynamo.config.patch(error_on_recompile=True):
            losses = compiled(x), loss(x)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(one, leaves) for one in losses), rtol=1e-5, atol=1e-5)


def check_wrapped(backend, device="cpu"):
    """One graph whatever the batch; autocast's dtype; checkpointing's bits; opcheck of all three ops."""
    # By day kernels see the harder of them.
    for name in ("dense", "top 3 of 5, tails, groups, dropout")[0 if NIGHTLY or backend == "reference" else 1 :]:
        case = Mixture(SHAPES[name], torch.float32, device)

        def call(*t, case=case):
            out, gates, index, logits = case.call(backend, *t)
            return out.square().sum() + balance_loss(logits.softmax(-1), index) + z_loss(logits) + gates[..., 0].sum()

        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch in (13, 17):  # of no other axis's size
            one = Mixture((batch, *SHAPES[name][1:]), torch.float32, device)
            leaves = [t.requires_grad_() for t in one.tensors]
            with torch._dynamo.config.patch(error_on_recompile=True):
                losses = compiled(*leaves), call(*leaves)
            assert torch.equal(*losses)
            grads = [torch.autograd.grad(loss, leaves) for loss in losses]
            torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)

        leaves = [t.requires_grad_() for t in case.tensors]
        again = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, leaves) for loss in (again, call(*leaves))), rtol=0, atol=0
        )

        with torch.autocast(device, torch.bfloat16):
            low = case.call(backend, *leaves)
        cast = [t.detach().bfloat16() for t in (case.x, case.a, case.b)]
        want = case.call(backend, *cast, case.router.detach(), case.base.detach().bfloat16())
        assert low.out.dtype == torch.bfloat16
        assert torch.equal(low.out, want.out)
        assert torch.equal(low.logits, want.logits)
        grads = torch.autograd.grad(low.out.sum(), leaves)
        assert all(grad.dtype == torch.float32 and grad.abs().sum() > 0 for grad in grads)

        seed = torch.tensor(11, device=device) if case.dropout_p else None
        options = case.top_k or 0, 1.7, case.groups, case.offsets, case.dropout_p, backend
        given = *leaves, seed, *options
        torch.library.opcheck(torch.ops.adamix_kernels.mixture_lora.default, given)
        over = *(t.detach() for t in leaves[:4]), leaves[4].detach().clone(), seed, *options
        torch.library.opcheck(
            torch.ops.adamix_kernels.mixture_lora_.default, over, test_utils=("test_schema", "test_faketensor")
        )
