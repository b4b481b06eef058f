"""Gated LoRA and the gated adapter on the C++/CUDA backend: on a GPU, or its kernels on the CPU (see cuda_host.py)."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, DTYPES, ON_HOST, needs_cuda

needs_cuda()

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

    kind: "dense" or "chosen"; of: "tokens" or "samples"; banks: how many experts A and B have. The last expert is
    never named where slots choose.
    """

    def __init__(
        self, op="lora", kind="dense", of="tokens", banks=(4, 4), mix="outputs", batch=2, tokens=5, features=20, rank=3,
        cols=7, slots=2, groups=1, dtype=torch.float32, gates_dtype=torch.float32, scales=True, added=True, biases=True,
        dropout_p=0.0, activation="gelu", seed=0,
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
        self.offsets = [2 * g * cols for g in range(groups)]
        width = (2 * groups - 1) * cols + (3 if groups > 1 else 0)
        gates = torch.rand(*shape, generator=generator, dtype=torch.float64)
        self.scales = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.25, 3.0, 1.0, 0.7] * 8)[:most].to(DEVICE) if scales else None
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
        double = self.given

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

        assert double
        return call

    def check(self, multiple=2.0):
        few = min(self.tensors[0].shape[0] * self.tensors[0].shape[1], *self.tensors[2].shape[1:]) < 16
        assert_in_budget(
            self.run("cuda"), self.run("reference"), *self.given, multiple=max(multiple, 8.0 if few else 2.0)
        )


BANKS = [(4, 4), (1, 4), (4, 1)]


@pytest.mark.parametrize("op", BACKENDS)
@pytest.mark.parametrize("mix", ["outputs", "weights"])
@pytest.mark.parametrize("banks", BANKS)
@pytest.mark.parametrize(("kind", "of"), [("dense", "tokens"), ("dense", "samples"), ("chosen", "tokens")])
def test_every_kind_of_gates(op, kind, of, banks, mix):
    Drawn(op, kind, of, banks, mix, dropout_p=0.3 if op == "lora" else 0.0).check()


CASES = {
    "16-byte rows": dict(banks=(8, 8), tokens=40, features=96, rank=8, cols=64),
    "16-byte rows, chosen": dict(kind="chosen", banks=(8, 8), tokens=40, features=96, rank=8, cols=64),
    "two groups": dict(groups=2, banks=(4, 4), tokens=35, features=40, rank=4, cols=24, dropout_p=0.3),
    "two groups, chosen by samples": dict(
        groups=2, kind="chosen", of="samples", banks=(4, 6), batch=3, tokens=19, features=23, rank=3, cols=17
    ),
    "tail tiles of primes": dict(banks=(3, 3), mix="weights", tokens=67, features=131, rank=5, cols=71, dropout_p=0.3),
    "more than 256 columns": dict(banks=(20, 20), kind="chosen", slots=3, tokens=37, features=40, rank=16, cols=40),
    "wide and dense": dict(banks=(9, 9), mix="weights", tokens=17, features=40, rank=33, cols=20),
    "shares of rows": dict(kind="chosen", banks=(4, 1), batch=2, tokens=200, features=20, dropout_p=0.3),
    "shares of rows, dense": dict(banks=(4, 4), of="samples", batch=3, tokens=140, features=20, rank=8),
    "gates in the rows' dtype": dict(gates_dtype=None, kind="chosen", of="samples", tokens=9),
    "one row": dict(batch=1, tokens=1, kind="chosen"),
    "one expert twice": dict(kind="chosen", banks=(2, 2), slots=3, tokens=9),
    "no scales, no base": dict(scales=False, added=False),
    "rank 1": dict(rank=1, banks=(5, 5), mix="weights"),
    "one expert": dict(banks=(1, 1), mix="weights"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_shape(case, dtype):
    Drawn(**{"dtype": dtype, **CASES[case]}).check()


ADAPTERS = {
    "16-byte rows": dict(banks=(8, 8), tokens=33, features=64, rank=8, cols=64, added=False),
    "chosen": dict(kind="chosen", banks=(4, 4), tokens=40, features=24, rank=5, cols=24, added=False),
    "weights, one B": dict(banks=(4, 1), mix="weights", tokens=40, features=16, rank=16, cols=8, activation="silu"),
    "no biases": dict(biases=False, kind="chosen", of="samples", banks=(1, 4), tokens=21, activation="relu"),
    "more than 256 columns": dict(banks=(6, 6), tokens=19, features=40, rank=48, cols=40, activation="gelu_tanh"),
    "shares of rows": dict(kind="chosen", banks=(4, 1), batch=2, tokens=200, features=20, activation=""),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ADAPTERS)
def test_every_shape_of_adapters(case, dtype):
    Drawn("adapter", **{"dtype": dtype, **ADAPTERS[case]}).check()
