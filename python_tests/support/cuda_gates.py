"""Calls of gated LoRA and of the gated adapter, as test_cuda_gates.py and test_cuda_gates_pieces.py draw them."""

import torch
from cuda_host import DEVICE
from poison import poisoned_memory

from adamix_kernels.ops.gated_adapter import cuda_impl as adapter_cuda
from adamix_kernels.ops.gated_adapter import reference as adapter_reference
from adamix_kernels.ops.gated_lora import cuda_impl as lora_cuda
from adamix_kernels.ops.gated_lora import reference as lora_reference
from adamix_kernels.testing import assert_in_budget

BACKENDS = {
    "lora": {"cuda": lora_cuda, "reference": lora_reference},
    "adapter": {"cuda": adapter_cuda, "reference": adapter_reference},
}


class Drawn:
    """One call of an op with gates: its floating tensors, and what else it takes.

    kind: "dense" or "chosen"; of: "tokens" or "samples"; banks: how many experts A and B have; one_index: both have
    the same ids, in the same memory. The last expert is never named where slots choose.
    """

    def __init__(
        self, op="lora", kind="dense", of="tokens", banks=(4, 4), mix="outputs", batch=2, tokens=5, features=20, rank=3,
        cols=7, slots=2, groups=1, dtype=torch.float32, gates_dtype=torch.float32, scales=True, added=True, biases=True,
        dropout_p=0.0, activation="gelu", seed=0, one_index=False,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

        most = max(banks)
        slots = most if kind == "dense" else slots
        shape = (batch, slots) if of == "samples" else (batch, tokens, slots)
        self.op, self.mix, self.dropout_p, self.groups = op, mix, dropout_p, groups
        self.activation, self.biases = activation, biases
        self.indices = [
            None
            if kind == "dense" or bank == 1
            else torch.randint(max(bank - 1, 1), shape, generator=generator, dtype=number).to(DEVICE)
            for bank, number in zip(banks, (torch.int64, torch.int32))
        ]
        if one_index:
            self.indices[1] = self.indices[0]
        self.offsets = [2 * g * cols for g in range(groups)]
        width = (2 * groups - 1) * cols + (3 if groups > 1 else 0)
        gates = torch.rand(*shape, generator=generator, dtype=torch.float64)
        self.scales = (
            torch.tensor([0.5, 2.0, -1.0, 1.5, 0.25, 3.0, 1.0, 0.7] * 10)[:most].to(DEVICE) if scales else None
        )
        self.seed = torch.tensor(11, device=DEVICE) if dropout_p else None
        self.tensors = [
            randn(batch, tokens, features),
            randn(banks[0], groups * rank, features),
            randn(banks[1], groups * cols, rank),
            gates.to(gates_dtype or dtype).to(DEVICE),
            randn(batch, tokens, width) if added else None,
            randn(batch, tokens, width),
        ]
        if op == "adapter":
            self.tensors += [randn(banks[0], rank), randn(banks[1], cols)] if biases else [None, None]
        self.given = [t for t in self.tensors if t is not None]

    def run(self, backend, needs=(True,) * 4, **changes):
        """A function of the tensors that there are, giving (out, what is narrow, every gradient)."""
        impl, (down_index, up_index) = BACKENDS[self.op][backend], changes.get("indices", self.indices)

        def call(*given):
            rest = iter(given)
            x, down, up, gates, added, dy, *biases = [next(rest) if t is not None else None for t in self.tensors]
            with poisoned_memory(backend != "reference"):
                if self.op == "lora":
                    head = x, down, up, down_index, up_index, gates, self.scales
                    tail = 1.7, self.groups, self.offsets, self.dropout_p, self.mix
                    out, t = impl.forward(*head, added, self.seed, *tail)
                    return out, t, *impl.backward(dy, x, t, *head[1:], self.seed, *needs, *tail)
                head, tail = (down_index, up_index, gates), (added is None, self.activation, self.mix)
                out, t = impl.forward(x, down, biases[0], up, biases[1], *head, added, *tail)
                return out, t, *impl.backward(dy, x, t, down, up, biases[1], *head, *needs, *tail)

        return call

    def check(self, multiple=2.0):
        few = min(self.tensors[0].shape[0] * self.tensors[0].shape[1], *self.tensors[2].shape[1:]) < 16
        assert_in_budget(
            self.run("cuda"), self.run("reference"), *self.given, multiple=max(multiple, 8.0 if few else 2.0)
        )


# Rows of 16-byte pieces in 16 bits, which have kernels of their own; all experts' columns in one chunk, and in more.
PIECES = {
    "dense": dict(banks=(8, 8), tokens=40, features=96, rank=8, cols=64, dropout_p=0.3),
    "chosen, two groups": dict(
        kind="chosen", groups=2, banks=(4, 4), tokens=35, features=72, rank=4, cols=40, dropout_p=0.3
    ),
    "several chunks, weights": dict(banks=(6, 6), mix="weights", tokens=21, features=64, rank=20, cols=40),
    "one A, by samples": dict(
        kind="chosen", of="samples", banks=(1, 5), batch=3, tokens=21, features=40, cols=8, rank=4
    ),
    "one B, shares of rows": dict(banks=(5, 1), tokens=150, features=40, rank=8, cols=24, mix="weights"),
    "adapter": dict(op="adapter", banks=(8, 8), tokens=33, features=64, rank=16, cols=64, added=False),
    "adapter, chosen": dict(op="adapter", kind="chosen", banks=(4, 4), tokens=40, features=40, rank=4, cols=24),
    "adapter, one B, weights": dict(
        op="adapter", banks=(4, 1), mix="weights", tokens=150, features=16, rank=12, cols=16, activation="silu"
    ),
}


def even(case, dtype=torch.bfloat16, **more):
    """A call of PIECES, where base has no odd columns behind its last group."""
    drawn = Drawn(**{"dtype": dtype, **PIECES[case], **more})
    if drawn.groups > 1:
        drawn.tensors[4:6] = (t[..., :-3].contiguous() for t in drawn.tensors[4:6])
        drawn.given = [t for t in drawn.tensors if t is not None]
    return drawn
