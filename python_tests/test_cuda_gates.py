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
from reliability.fuzz_cuda import launches

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


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", PIECES)
def test_rows_of_pieces(case, dtype):
    even(case, dtype).check()


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("capability", [70, 75, 90])
def test_pieces_go_to_the_registers_where_the_gpu_multiplies_there(capability, dtype, monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", str(capability))
    drawn = even("adapter, chosen", dtype)
    with launches() as names:
        drawn.check()
    straight = capability >= (75 if dtype == torch.float16 else 80)
    assert all(("_mma_" in name) == straight for name in names if "plane_sum" not in name)


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize("wrong", [dict(features=44), dict(rank=5), dict(cols=20), dict(banks=(40, 40), slots=2)])
def test_other_rows_go_to_the_kernels_for_any(wrong):
    with launches() as names:
        even("chosen, two groups", **wrong).check()
    assert not any("_mma_" in name for name in names)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", ["chosen, two groups", "adapter, one B, weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_and_barriers(case, dtype):
    even(case, dtype, tokens=35).check()


ANY_AND_PIECES = [("chosen, two groups", torch.float32), ("chosen, two groups", torch.bfloat16)]
ANY_AND_PIECES += [("adapter, chosen", torch.float32), ("adapter, chosen", torch.float16)]


@pytest.mark.parametrize(("case", "dtype"), ANY_AND_PIECES)
def test_what_others_hold_stays_with_them(case, dtype):
    """Infinities in rows that name an expert, and in another's weights, reach no row and no gradient of the rest; an
    expert that no slot names gets zeros."""
    drawn = even(case, dtype, dropout_p=0.0)
    a_index, b_index = drawn.indices
    a_index[a_index == 2], b_index[b_index == 2] = 0, 0
    a_index[0, :3, 0], b_index[1, :3, 1] = 1, 2  # of four experts 0, 1 and 2 are named, the last never
    a_index[0, 3:], a_index[1] = 0, 0
    b_index[0], b_index[1, 3:] = b_index[0] % 2, b_index[1, 3:] % 2
    clean = drawn.run("cuda")(*drawn.given)
    lost = ((a_index == 1) | (b_index == 2)).any(-1)
    given = [t.clone() for t in drawn.given]
    for t in (given[0], given[5]):
        t[lost] = float("inf")
    given[1][1], given[2][2], given[1][3], given[2][3] = (float(v) for v in ("inf", "nan", "inf", "nan"))
    got = drawn.run("cuda")(*given)
    grads = len(got) - 1
    for number in (0, 2):  # out and dx
        torch.testing.assert_close(got[number][~lost], clean[number][~lost], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got[grads][~lost], clean[grads][~lost], rtol=2e-2, atol=2e-2)
    banks = got[3:grads]
    sides = [0, 1] if drawn.op == "lora" else [0, 0, 1, 1]
    for side, grad in zip(sides, banks, strict=True):
        assert grad[3].eq(0).all()
        assert grad[2 if side == 0 else 3].eq(0).all()
        names_no_lost = not (drawn.indices[side] == 1)[lost].any() if side == 1 else False
        if names_no_lost:
            assert grad[1].isfinite().all()


@pytest.mark.parametrize(("case", "dtype"), ANY_AND_PIECES)
@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_rows_of_wrong_ids_are_nan_and_teach_nobody(case, dtype, wrong):
    drawn = even(case, dtype, dropout_p=0.0)
    bad = torch.zeros(drawn.indices[0].shape[:2], dtype=torch.bool, device=DEVICE)
    bad[0, 1] = bad[1, 2] = True
    indices = [index.clone() for index in drawn.indices]
    indices[0][0, 1, 1] = indices[1][1, 2, 0] = wrong
    got = drawn.run("cuda", indices=indices)(*drawn.given)
    silent = list(drawn.given)
    silent[5] = torch.where(bad.unsqueeze(-1), 0, silent[5])
    want = drawn.run("cuda")(*silent)
    for number in (0, 2, len(got) - 1):
        served = [c for at in drawn.offsets for c in range(at, at + drawn.tensors[2].shape[1] // drawn.groups)]
        lost = got[number][bad][:, served] if number == 0 else got[number][bad]
        assert lost.isnan().all()
        good = drawn.run("cuda")(*drawn.given)[number] if number == 0 else want[number]
        assert torch.equal(got[number][~bad], good[~bad])
    for mine, other in zip(got[3:-1], want[3:-1], strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", ["chosen, two groups", "adapter, chosen"])
@pytest.mark.parametrize(
    "needs", [(True, False, False, False), (False, True, False, True), (False, False, True, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_is_needed_is_computed_with_the_same_bits(case, needs, dtype):
    drawn = even(case, dtype)
    want, got = (drawn.run("cuda", n)(*drawn.given)[2:] for n in ((True,) * 4, needs))
    kinds = needs if drawn.op == "lora" else (needs[0], needs[1], needs[1], needs[2], needs[2], needs[3])
    for mine, full, needed in zip(got, want, kinds, strict=True):
        assert torch.equal(mine, full) if needed else mine.numel() == 0


@pytest.mark.skipif(not ON_HOST, reason="a GPU orders its threads itself")
@pytest.mark.parametrize("order", ["reverse", "1"])
@pytest.mark.parametrize("case", ["one B, shares of rows", "adapter, chosen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_in_any_order_of_threads_and_blocks(case, order, dtype, monkeypatch):
    drawn = even(case, dtype)
    want = drawn.run("cuda")(*drawn.given)
    monkeypatch.setenv("ADAMIX_HOST_ORDER", order)
    assert all(torch.equal(a, b) for a, b in zip(drawn.run("cuda")(*drawn.given), want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", ["tokens", "samples"])
def test_strides_do_not_matter_and_inputs_are_not_written(of, dtype):
    drawn = even("chosen, two groups", dtype, of=of)
    want = drawn.run("cuda")(*drawn.given)
    wide = [torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for t in drawn.given]
    before = [t.clone() for t in wide]
    assert_in_budget(lambda *_: drawn.run("cuda")(*wide), drawn.run("reference"), *drawn.given)
    assert all(torch.equal(a, b) for a, b in zip(before, wide))
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in drawn.given]
    assert all(torch.equal(a, b) for a, b in zip(drawn.run("cuda")(*turned), want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_same_bits_in_the_bases_memory(dtype):
    drawn = even("chosen, two groups", dtype)
    want = drawn.run("cuda")(*drawn.given)
    x, a, b, gates, base, _ = (t.clone() for t in drawn.given)
    tail = 1.7, drawn.groups, drawn.offsets, drawn.dropout_p, drawn.mix
    out, t = lora_cuda.forward(x, a, b, *drawn.indices, gates, drawn.scales, base, drawn.seed, *tail, inplace=True)
    assert out.data_ptr() == base.data_ptr()
    assert torch.equal(out, want[0])
    assert torch.equal(t, want[1])


@pytest.mark.parametrize("op", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [dict(batch=0), dict(tokens=0), dict(kind="chosen", slots=0), dict(rank=0)])
def test_empty_sizes(op, dtype, sizes):
    drawn = Drawn(op, **{"features": 16, "cols": 16, "rank": 4, "dtype": dtype, **sizes})
    got, want = (drawn.run(backend)(*drawn.given) for backend in ("cuda", "reference"))
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=2e-3)


def test_what_is_wrong_is_named_before_anything_runs():
    drawn = Drawn()
    x, a, b, gates, base, _ = drawn.given
    tail = base, None, 1.7, 1, [0], 0.0
    call = torch.ops.adamix_cuda.gated_lora_forward
    wrong = {
        "gates: got shape": (x, a, b, None, None, gates[..., :3], None, *tail, "outputs"),
        "gates: got Double": (x, a, b, None, None, gates.double(), None, *tail, "outputs"),
        "mix: got 'sum'": (x, a, b, None, None, gates, None, *tail, "sum"),
        "scales: got shape": (x, a, b, None, None, gates, drawn.scales[:2], *tail, "outputs"),
        "a_index: got none": (x, a, b, None, torch.zeros_like(gates, dtype=torch.int64), gates, None, *tail, "outputs"),
        "b_index: got Float": (x, a[:1], b, None, gates, gates, None, *tail, "outputs"),
        "base: got shape": (x, a, b, None, None, gates, None, base[:1], *tail[1:], "outputs"),
    }
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)
