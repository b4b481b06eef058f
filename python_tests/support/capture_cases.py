"""Calls of every op, forward and backward, on any backend: none may wait for a GPU or read a value of one."""

import functools
from dataclasses import dataclass

import torch
from adapter_cases import draw_adapter
from cuda_probes import captured_graph
from plain_lora import draw_lora

import adamix_kernels.ops._routed_ops as routed_ops
import adamix_kernels.ops.consistency.ahead as loss_ahead
import adamix_kernels.ops.consistency.direct as loss_direct
import adamix_kernels.ops.consistency.op as loss_op
from adamix_kernels import functional as F
from adamix_kernels.ops.merge.api import merge_banks
from adamix_kernels.routing import mixture_lora


def _with_gradients(run, *leaves):
    def both():
        out = run()
        out = out if isinstance(out, torch.Tensor) else out[0]
        return (out.detach(), *torch.autograd.grad(out.sum(), leaves))

    return both


@dataclass(frozen=True)
class Calls:
    """Each method draws an op's inputs and returns a function: it calls the op, and gives its output and gradients."""

    backend: str
    device: str

    def randn(self, *shape):
        return torch.randn(*shape, device=self.device).requires_grad_()

    def adapter(self, kinds, tokens=9, rank=4):
        (x, *banks, _), indices = draw_adapter(self.device, torch.float32, 3, tokens, 20, rank, 3, 2, *kinds)
        leaves = [t.requires_grad_() for t in (x, *banks)]
        run = functools.partial(F.routed_adapter, *leaves, *indices, residual=leaves[0], backend=self.backend)
        return _with_gradients(run, *leaves)

    def lora(self, tokens=7, rank=2, **more):
        (x, a, b, base, _), options = draw_lora(
            self.device, "sample", "token", groups=2, dtype=torch.float32, tokens=tokens, rank=rank
        )
        leaves = [t.requires_grad_() for t in (x, a, b)]
        run = functools.partial(F.routed_lora, *leaves, **options, **more, backend=self.backend)
        return _with_gradients(lambda: run(base=base * 1), *leaves)

    def mixture(self, experts=4, **more):
        x, a, b = self.randn(3, 7, 20), self.randn(experts, 4, 20), self.randn(experts, 12, 4)
        router, base = self.randn(experts, 20), torch.randn(3, 7, 12, device=self.device)
        run = functools.partial(mixture_lora, x, a, b, router, **more, backend=self.backend)
        return _with_gradients(lambda: run(base=base * 1), x, a, b, router)

    def logits(self, classes):
        x = self.randn(6, 5, classes)
        labels = torch.randint(classes, (3, 5), device=self.device)
        return x, labels, torch.rand(3, 5, device=self.device) < 0.7

    def adamix(self, classes=11, items=None, **options):
        x, labels, mask = self.logits(classes)
        items = torch.tensor(4, device=self.device) if items == "tensor" else items
        run = functools.partial(F.adamix_loss, x, labels, mask=mask, num_items=items, **options, backend=self.backend)
        return _with_gradients(run, x)

    def consistency(self, reduction):
        x, y, mask = self.randn(3, 5, 11), self.randn(3, 5, 11), self.logits(11)[2]
        run = functools.partial(F.consistency_loss, x, y, mask=mask, reduction=reduction, backend=self.backend)
        return _with_gradients(run, x, y)

    def linear(self):
        hidden, weight, bias = self.randn(6, 5, 8), self.randn(13, 8), self.randn(13)
        _, labels, mask = self.logits(13)
        run = functools.partial(
            F.linear_adamix_loss, hidden, weight, labels, bias=bias, mask=mask, backend=self.backend
        )
        return _with_gradients(run, hidden, weight, bias)

    def experts(self, scores):
        bank, given = self.randn(3, 4, 5), self.randn(3) if scores else None
        leaves = [bank] if given is None else [bank, given]
        return _with_gradients(lambda: F.merge_experts(bank, given, backend=self.backend), *leaves)

    def factors(self):
        weight, a, b = self.randn(12, 10), self.randn(3, 4, 10), self.randn(3, 8, 2)
        options = dict(scaling=0.5, groups=2, output_offsets=(0, 8), backend=self.backend)
        return _with_gradients(lambda: F.merge_lora(weight, a, b, **options), weight, a, b)

    def banks(self):
        many, scores = [torch.randn(3, 4, 5, device=self.device) for _ in range(5)], [None] * 4
        scores.append(torch.randn(3, device=self.device))
        return lambda: tuple(merge_banks(many, scores, backend=self.backend))

    def cases(self):
        """What every backend is tried on, by name; each adds the sizes at which its own ways part."""
        return {
            "adapter, tokens": lambda: self.adapter(("token", "token")),
            "lora": self.lora,
            "lora, dropout": lambda: self.lora(dropout_p=0.3, seed=torch.tensor(5, device=self.device)),
            "lora, a number as seed": lambda: self.lora(dropout_p=0.3, seed=5),
            "lora, in place": lambda: self.lora(inplace=True),
            "mixture": lambda: self.mixture(dropout_p=0.3, seed=torch.tensor(5, device=self.device)),
            "mixture, in place": lambda: self.mixture(inplace=True),
            "mixture, many experts": lambda: self.mixture(20),
            "adamix_loss": self.adamix,
            "adamix_loss, items": lambda: self.adamix(items=7),
            "adamix_loss, a tensor of items": lambda: self.adamix(items="tensor", label_smoothing=0.1),
            "consistency_loss": lambda: self.consistency("batchmean"),
            "consistency_loss, none": lambda: self.consistency("none"),
            "linear_adamix_loss": self.linear,
            "merge_experts": lambda: self.experts(False),
            "merge_experts, scores": lambda: self.experts(True),
            "merge_lora": self.factors,
            "merge_banks": self.banks,
        }


def as_on_a_gpu(monkeypatch):
    """Without the checks of values that the CPU alone makes unasked."""
    monkeypatch.setattr(routed_ops, "check_index_values", lambda *_: None)
    monkeypatch.setattr(loss_op, "_check_labels", lambda *_: None)
    monkeypatch.setattr(loss_ahead, "_check_labels", lambda *_: None)
    monkeypatch.setattr(loss_direct, "_check_labels", lambda *_: None)


def check_graph(run):
    """A CUDA graph captures the call, and its replay gives what the call gave."""
    want = [t.clone() for t in run()]
    captured, graph = captured_graph(run)
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))
