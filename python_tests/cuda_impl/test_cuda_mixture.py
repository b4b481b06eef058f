"""LoRA with a router's gates in one launch (csrc/mixture), and in two where a tile does not hold the logits too."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DTYPES, EACH_LAUNCH, ON_HOST, names, needs_cuda, runtime_calls

needs_cuda()

from cuda_mixtures import OPS, Mixture

from adamix_kernels.testing import assert_in_budget
from reliability.fuzz_cuda import launch_names

# One launch in 16 bits; experts beyond eight have a second tile, ranks beyond 64 a second chunk.
ONE = {
    "dense": dict(wide=False, dropout_p=0.3),
    "dense, one expert": dict(experts=1, rank=16),
    "top 2, two groups": dict(experts=4, top_k=2, features=72, rank=4, cols=40, groups=2, dropout_p=0.3),
    "top 1, gaps of zeros": dict(experts=2, top_k=1, features=40, cols=24, groups=2, added=False),
    "one A": dict(experts=5, banks=(1, 5), features=40, rank=4, cols=8),
    "one A, top 2": dict(experts=5, top_k=2, banks=(1, 5), features=40, rank=4, cols=8, wide=False),
    "one B, top 3": dict(experts=6, top_k=3, banks=(6, 1), features=64, cols=64),
    "16 experts of 16 ranks, top 2": dict(experts=16, top_k=2, features=128, rank=16),
    "nine experts": dict(experts=9, features=136, rank=12, cols=24, dropout_p=0.3, wide=False),
    "all but one": dict(experts=16, top_k=15, features=32, rank=4, cols=16),
}
# Two launches in any dtype.
TWO = {
    "17 experts": dict(experts=17, top_k=2, features=40, rank=4, cols=32),
    "odd features": dict(features=45, rank=4, cols=16),
    "odd rank": dict(experts=4, top_k=1, rank=5, cols=16, dropout_p=0.3),
    "odd columns": dict(experts=4, features=40, cols=21, groups=2),
    "more columns than a tile": dict(experts=12, top_k=2, rank=24, features=64),
}
KINDS = [(case, ONE[case], 1) for case in ONE] + [(case, TWO[case], 2) for case in TWO]


def drawn(case, dtype=torch.bfloat16, **more):
    return Mixture(**{"dtype": dtype, **(ONE | TWO)[case], **more})


def check(call, out, t, gates, index, logits):
    """Within the budget of PyTorch in the same dtype, with these experts."""
    few = min(call.tensors[2].shape[1:]) < 16
    given = [tensor for tensor in call.tensors if tensor is not None]
    assert_in_budget(
        lambda *_: (out, t, gates, logits), call.definition(index), *given, multiple=8.0 if few else 3.0
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "sizes", "number"), KINDS, ids=[case for case, *_ in KINDS])
def test_errs_like_pytorch_and_gates_as_the_op_with_gates(case, sizes, number, dtype):
    call = Mixture(dtype=dtype, **sizes)
    with launch_names() as made:
        out, t, gates, index, logits = call.run()
    if ON_HOST:
        one = number == 1 and dtype != torch.float32
        assert (made == ["mixture_forward_mma"]) if one else (made[0] == "router_forward" and len(made) > 1)
    assert gates.dtype == logits.dtype == torch.float32
    assert index.dtype == torch.int64
    assert index.shape == (gates.shape if call.top_k else (0,))
    check(call, out, t, gates, index, logits)
    for mine, other in zip((out, t), call.composed(gates, index)):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", ONE)
def test_of_whole_numbers_the_routers_bits_ties_too(case, dtype):
    call = drawn(case, dtype, whole=True, dropout_p=0.0)
    x, _, _, router, _ = call.tensors
    _, _, gates, index, logits = call.run()
    want = OPS.router_forward(x, router, None, call.top_k)
    for mine, other in zip((gates, index, logits), want):
        assert torch.equal(mine, other)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", ["top 2, two groups", "nine experts", "one A, top 2", "one B, top 3"])
def test_memory_and_barriers(case):
    call = drawn(case, torch.float16, tokens=12)
    out, t, gates, index, _ = call.run()
    for mine, other in zip((out, t), call.composed(gates, index)):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", ["dense", "16 experts of 16 ranks, top 2", "one A, top 2"])
def test_what_is_not_finite_stays_in_its_row(case, bad):
    call = drawn(case, dropout_p=0.0)
    clean = call.run()
    x, *rest = call.tensors
    lost = x.clone()
    lost[1, 2, 5] = bad
    got, want = call.run(lost, *rest), OPS.router_forward(lost, rest[2], None, call.top_k)
    keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    keep[1, 2] = False
    assert torch.equal(got[2].isnan(), want[0].isnan())
    assert got[2][~keep].isnan().all()
    assert got[0][~keep].isnan().all()
    if call.top_k:
        assert torch.equal(got[3], want[1])
        assert got[3].sort(-1).values.diff().min() > 0
    for mine, other in zip(got[:3], clean[:3]):
        assert torch.equal(mine[keep], other[keep])


@pytest.mark.parametrize("case", ["dense", "top 2, two groups", "17 experts"])
def test_a_router_of_no_number_is_chosen_and_seen(case):
    call = drawn(case, dropout_p=0.0)
    call.tensors[3][1, 3] = float("nan")
    got = call.run()
    want = OPS.router_forward(call.tensors[0], call.tensors[3], None, call.top_k)
    assert got[2].isnan().all()
    assert got[0][..., : call.tensors[2].shape[1] // call.groups].isnan().all()
    assert torch.equal(got[3], want[1])
    assert torch.equal(got[4].isnan(), want[2].isnan())


@pytest.mark.parametrize("case", ["top 2, two groups", "nine experts", "odd columns"])
def test_strides_do_not_matter_and_inputs_are_not_written(case):
    call = drawn(case)
    want = call.run()
    wide = [torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for t in call.tensors]
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in call.tensors]
    before = [t.clone() for t in wide]
    check(call, *call.run(*wide))
    assert all(torch.equal(a, b) for a, b in zip(call.run(*turned), want))
    assert all(torch.equal(a, b) for a, b in zip(before, wide))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["top 2, two groups", "dense", "odd features"])
def test_in_place_gives_the_same_bits_in_the_bases_memory(case, dtype):
    call = drawn(case, dtype)
    want = call.run()
    *head, base = call.tensors
    base = base.clone()
    got = OPS.mixture_lora_forward_(*head, base, call.seed, call.top_k, *call.tail)
    for mine, other in zip((base, *got), want):
        assert torch.equal(mine, other)


@pytest.mark.skipif(not ON_HOST, reason="a GPU orders its threads itself")
@pytest.mark.parametrize("case", ["top 2, two groups", "nine experts"])
def test_the_same_bits_in_any_order_of_threads_and_blocks(case, monkeypatch):
    call = drawn(case)
    want = call.run()
    monkeypatch.setenv("ADAMIX_HOST_ORDER", "reverse")
    assert all(torch.equal(a, b) for a, b in zip(call.run(), want))


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("capability", [70, 75, 90])
def test_one_launch_where_the_gpu_multiplies_in_registers(capability, dtype, monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", str(capability))
    call = drawn("top 2, two groups", dtype)
    with launch_names() as made:
        call.run()
    straight = capability >= (75 if dtype == torch.float16 else 80)
    assert made == (["mixture_forward_mma"] if straight else ["router_forward", "gated_forward"])


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of calls")
def test_a_graph_may_hold_the_call():
    call = drawn("dense")
    call.run()
    runtime_calls()
    call.run()
    assert names(runtime_calls()) <= EACH_LAUNCH


def test_no_rows_and_a_base_that_starts_anywhere():
    call = drawn("dense", batch=0, dropout_p=0.0)
    shapes = [tuple(made.shape) for made in call.run()]
    assert shapes == [(0, 13, 64), (0, 13, 64), (0, 13, 8), (0,), (0, 13, 8)]
    call = drawn("dense")
    *head, base = call.tensors
    flat = torch.empty(base.numel() + 1, dtype=base.dtype, device=base.device)
    check(call, *call.run(*head, flat[1:].view_as(base).copy_(base)))


def test_bad_input_is_named_and_nothing_is_launched():
    call = drawn("top 1, gaps of zeros")
    x, a, b, router, _ = call.tensors
    good = dict(x=x, a=a, b=b, router=router, base=None, seed=None, top_k=1)
    bad = [
        (dict(x=x[0]), r"x: got .*expected \[B, S, K\]"),
        (dict(x=x.double()), "x: got"),
        (dict(a=a[0]), "lora_a: got"),
        (dict(a=a[:, :, 1:]), "lora_a: got"),
        (dict(router=router[:, 1:]), "router: got"),
        (dict(router=router[:1]), "router: got .*banks of M experts"),
        (dict(router=router.double()), "router: got Double"),
        (dict(a=a[:1], b=b[:1]), "router: got .*banks of M experts"),
        (dict(top_k=2), "top_k: got 2"),
        (dict(top_k=-1), "top_k: got -1"),
        (dict(base=torch.ones(3, 13, 72, device=x.device)), "base: got Float"),
        (dict(b=b.float()), "lora_b: got"),
    ]
    for wrong, words in bad:
        given = [*(good | wrong).values()]
        with launch_names() as made, pytest.raises(RuntimeError, match=words):
            OPS.mixture_lora_forward(*given, *call.tail)
        assert made == []
