"""Calls of LoRA with a router's gates, as test_cuda_mixture.py draws them for the op of csrc/mixture."""

import torch
from cuda_host import DEVICE
from poison import poisoned_memory
from router_cases import definition

from adamix_kernels.ops.gated_lora import reference as lora_reference

OPS = torch.ops.adamix_cuda


class Mixture:
    """One call: its tensors, and what else it takes. banks: how many experts A and B have; top_k: 0 for all."""

    def __init__(
        self, experts=8, top_k=0, banks=None, batch=3, tokens=13, features=96, rank=8, cols=64, groups=1,
        dtype=torch.bfloat16, wide=True, added=True, dropout_p=0.0, whole=False,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(experts)

        def drawn(*shape, scale=1.0, whole=False):
            if whole:
                return torch.randint(-1, 2, shape, generator=generator).double()
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

        self.banks, self.top_k, self.groups, self.dropout_p = banks or (experts, experts), top_k, groups, dropout_p
        self.offsets = [2 * g * cols for g in range(groups)]
        x = drawn(batch, tokens, features, whole=whole).to(dtype)
        a = drawn(self.banks[0], groups * rank, features, scale=features**-0.5).to(dtype)
        b = drawn(self.banks[1], groups * cols, rank).to(dtype)
        router = drawn(experts, features, scale=features**-0.5, whole=whole).to(torch.float32 if wide else dtype)
        base = drawn(batch, tokens, (2 * groups - 1) * cols).to(dtype) if added else None
        self.seed = torch.tensor(11, device=DEVICE) if dropout_p else None
        self.tensors = [None if t is None else t.to(DEVICE) for t in (x, a, b, router, base)]

    def run(self, *tensors):
        """(out, t, gates, index, logits) by the op, of these tensors or those drawn."""
        *head, base = tensors or self.tensors
        with poisoned_memory():
            return OPS.mixture_lora_forward(*head, base, self.seed, self.top_k, *self.tail)

    @property
    def tail(self):
        return 1.7, self.groups, self.offsets, self.dropout_p

    def composed(self, gates, index):
        """(out, t) of the op with gates."""
        x, a, b, _, base = self.tensors
        return OPS.gated_lora_forward(
            x, a, b, *self.ids(index), gates, None, base, self.seed, *self.tail, "outputs"
        )  # fmt: skip

    def ids(self, index):
        return [index if self.top_k and bank > 1 else None for bank in self.banks]

    def definition(self, index):
        """A function of the tensors there are, giving (out, t, gates, logits) in plain PyTorch of these experts."""

        def call(x, a, b, router, base=None):
            gates, _, logits = definition(x, router, None, self.top_k or None, index if self.top_k else None)
            head = x, a, b, *self.ids(index), gates, None, base, self.seed
            return *lora_reference.forward(*head, *self.tail, "outputs"), gates, logits

        return call
