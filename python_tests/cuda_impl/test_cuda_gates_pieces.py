"""The gated ops' CUDA kernels for rows of 16-byte pieces (csrc/gated/gated_team.h), and what those for any share."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, DTYPES, EACH_LAUNCH, ON_HOST, names, needs_cuda, runtime_calls

needs_cuda()

from cuda_gates import PIECES, Drawn, even

from adamix_kernels.ops.gated_lora import cuda_impl as lora_cuda
from adamix_kernels.testing import assert_in_budget
from reliability.fuzz_cuda import launches


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", PIECES)
def test_rows_of_pieces(case, dtype):
    even(case, dtype).check()


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("capability", [70, 75, 90])
@pytest.mark.parametrize("case", ["adapter", "adapter, chosen"])
def test_pieces_go_to_the_registers_where_the_gpu_multiplies_there(case, capability, dtype, monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", str(capability))
    drawn = even(case, dtype)
    with launches() as made:
        drawn.check()
    straight = capability >= (75 if dtype == torch.float16 else 80)
    assert all(("_mma_" in name) == straight for name in made if "plane_sum" not in name)


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize("wrong", [dict(features=44), dict(rank=5), dict(cols=20), dict(banks=(40, 40), slots=2)])
def test_other_rows_go_to_the_kernels_for_any(wrong):
    with launches() as made:
        even("chosen, two groups", **wrong).check()
    assert not any("_mma_" in name for name in made)


# One expert up, and how its rows begin: residual x or another tensor, ids, gates that weigh weights, LoRA's scales.
ONE_UP = {
    "dense": dict(op="adapter", banks=(8, 1), rank=16, added=False),
    "another residual, weights": dict(op="adapter", banks=(5, 1), rank=8, mix="weights"),
    "chosen": dict(op="adapter", kind="chosen", banks=(4, 1), rank=12, added=False),
    "lora, by samples": dict(kind="chosen", of="samples", banks=(6, 1), slots=3, rank=8),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("features", [64, 128, 192])
def test_one_expert_up_where_rows_are_narrow(features):
    """Tiles of other shapes than the kernel of the test below has."""
    Drawn(dtype=torch.bfloat16, tokens=23, features=features, cols=features, **ONE_UP["dense"]).check()


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("case", ONE_UP)
def test_rows_stay_in_registers_where_one_expert_up_serves_all(case, multiprocessors, monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_MULTIPROCESSORS", str(multiprocessors))
    drawn = Drawn(dtype=torch.bfloat16, tokens=23, features=256, cols=256, **ONE_UP[case])
    with launches() as made:
        drawn.check()
    assert "gated_resident_forward" in made[0]
    if any(index is not None for index in drawn.indices):
        drawn.indices[0][0, ..., 1] = -1
        out, t, _, *grads, _ = drawn.run("cuda")(*drawn.given)
        lost = drawn.indices[0][:, None].expand(-1, 23, -1) if drawn.indices[0].dim() == 2 else drawn.indices[0]
        lost = (lost < 0).any(-1)
        assert out[lost].isnan().all()
        assert t[lost].isnan().all()
        assert out[~lost].isfinite().all()
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize(("multiprocessors", "summed"), [(4, False), (6, True), (8, True)])
def test_a_large_block_serves_where_two_would_run_side_by_side(multiprocessors, summed, monkeypatch):
    """Four blocks have all of the weights' gradients: two large blocks' shares of rows are those of four others."""
    monkeypatch.setenv("ADAMIX_HOST_MULTIPROCESSORS", str(multiprocessors))
    drawn = even("dense", batch=2, tokens=256, banks=(2, 2), rank=4, features=64, cols=64)
    with launches() as made:
        drawn.check()
    assert any("plane_sum" in name for name in made) == summed


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of calls")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["one B, shares of rows", "adapter, chosen"])
def test_a_graph_may_hold_every_call_of_four_launches_at_most(case, dtype):
    run = even(case, dtype).run("cuda")
    given = even(case, dtype).given
    run(*given)
    runtime_calls()
    with launches() as made:
        run(*given)
    assert names(runtime_calls()) <= EACH_LAUNCH
    assert len(made) <= 4


@pytest.mark.sanitize
def test_memory_and_barriers_where_rows_stay_in_registers():
    Drawn(dtype=torch.bfloat16, tokens=9, features=256, cols=256, **ONE_UP["chosen"]).check()


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
@pytest.mark.parametrize("wrong", [-1, 4])
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
@pytest.mark.parametrize("order", ["reverse"])
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
