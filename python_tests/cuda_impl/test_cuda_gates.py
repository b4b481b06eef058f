"""Gated LoRA and the gated adapter on the C++/CUDA backend: on a GPU, or its kernels on the CPU (see cuda_host.py)."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import os

import pytest
import torch
from cuda_host import DTYPES, ON_HOST, needs_cuda

needs_cuda()

from cuda_gates import BACKENDS, Drawn

from reliability.fuzz_cuda import launch_names

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
    "shares of rows, dense": dict(banks=(4, 4), of="samples", batch=3, tokens=140, features=20, rank=2),
    "shares of rows, dense, two groups": dict(
        groups=2, banks=(4, 4), batch=3, tokens=140, features=20, rank=2, cols=9, dropout_p=0.3
    ),
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
    check_shares(case, Drawn(**{"dtype": dtype, **CASES[case]}))


def check_shares(case, drawn):
    with launch_names() as made:
        drawn.check()
    if ON_HOST and "ADAMIX_HOST_CAPABILITY" not in os.environ and "shares of rows" in case:
        assert "gated_plane_sum" in made


ADAPTERS = {
    "16-byte rows": dict(banks=(8, 8), tokens=33, features=64, rank=8, cols=64, added=False),
    "chosen": dict(kind="chosen", banks=(4, 4), tokens=40, features=24, rank=5, cols=24, added=False),
    "weights, one B": dict(banks=(4, 1), mix="weights", tokens=40, features=16, rank=16, cols=8, activation="silu"),
    "no biases": dict(biases=False, kind="chosen", of="samples", banks=(1, 4), tokens=21, activation="relu"),
    "more than 256 columns": dict(banks=(6, 6), tokens=19, features=40, rank=48, cols=40, activation="gelu_tanh"),
    "shares of rows": dict(kind="chosen", banks=(4, 1), batch=2, tokens=200, features=20, activation=""),
    "shares of rows, dense": dict(banks=(4, 4), batch=3, tokens=140, features=20, rank=2, activation="silu"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ADAPTERS)
def test_every_shape_of_adapters(case, dtype):
    check_shares(case, Drawn("adapter", **{"dtype": dtype, **ADAPTERS[case]}))


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
