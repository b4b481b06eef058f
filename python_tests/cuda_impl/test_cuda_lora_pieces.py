"""routed_lora's CUDA kernels for rows of 16-byte pieces (csrc/routed_lora/lora_team.h), on the CPU or a GPU."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, ON_HOST, needs_cuda

needs_cuda()

from plain_lora import draw_lora, run_lora

from adamix_kernels.testing import assert_in_budget
from reliability.fuzz_cuda import launches

HALVES = [torch.float16, torch.bfloat16]
# Features behind a whole step of 32, columns behind one, several samples in a block's 32 rows.
SHAPES = {
    "rank 4, two groups": dict(groups=2, batch=3, tokens=21, features=104, rank=4, per_group=40),
    "rank 4, tokens": dict(a_kind="token", b_kind="token", batch=2, tokens=35, features=136, rank=4, per_group=72),
    "rank 8, samples of both": dict(b_kind="sample", batch=3, tokens=40, features=72, rank=8, per_group=64),
    "rank 16, two groups of tokens": dict(
        a_kind="token", b_kind="sample", groups=2, batch=2, tokens=19, features=320, rank=16, per_group=32
    ),
    "rank 20": dict(a_kind="none", b_kind="token", batch=1, tokens=50, features=64, rank=20, per_group=296),
    "rank 36": dict(a_kind="none", b_kind="sample", batch=2, tokens=40, features=352, rank=36, per_group=40),
    "rank 48, tokens": dict(a_kind="token", batch=2, tokens=24, features=288, rank=48, per_group=40),
    "rank 64": dict(a_kind="none", batch=1, tokens=33, features=160, rank=64, per_group=104),
    "shares of rows": dict(a_kind="token", groups=2, batch=3, tokens=110, features=40, rank=4, per_group=24),
}
ANY = {f"routed_lora_{part}_kernel" for part in ("forward", "input_grad", "weight_grad")}
PIECES = {name.replace("_kernel", "_mma_kernel") for name in ANY}


def draw(dtype, **sizes):
    """As draw_lora, but without the column of base behind the last group: every row is a whole number of pieces."""
    tensors, options = draw_lora(DEVICE, dtype=dtype, **sizes)
    if sizes.get("groups", 1) > 1:
        tensors[3:] = (t[..., :-1].contiguous() for t in tensors[3:])
    return tensors, options


def check(tensors, options, dropout_p):
    runs = [run_lora(backend, tensors, options, dropout_p) for backend in ("cuda", "reference")]
    assert_in_budget(*runs, *tensors, multiple=2.0)


@pytest.mark.parametrize(("dtype", "dropout_p"), [(torch.float16, 0.3), (torch.bfloat16, 0.0)])
@pytest.mark.parametrize("case", SHAPES)
def test_every_shape(case, dtype, dropout_p):
    check(*draw(dtype, **SHAPES[case]), dropout_p)


@pytest.mark.skipif(not ON_HOST, reason="a GPU has more multiprocessors")
@pytest.mark.parametrize("case", ["rank 8, samples of both", "rank 36", "rank 48, tokens", "rank 64"])
def test_blocks_of_64_rows(case, monkeypatch):
    """The same bits as of blocks of 32 rows, which a GPU of many multiprocessors is given for so few rows."""
    tensors, options = draw(torch.bfloat16, **SHAPES[case])
    want = run_lora("cuda", tensors, options, 0.3)(*tensors)
    monkeypatch.setenv("ADAMIX_HOST_MULTIPROCESSORS", "1")
    assert all(torch.equal(a, b) for a, b in zip(run_lora("cuda", tensors, options, 0.3)(*tensors), want))


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize("dtype", HALVES)
def test_pieces_go_to_the_registers_where_the_gpu_multiplies_there(dtype, monkeypatch):
    sizes = dict(groups=2, batch=1, tokens=40, features=40, rank=4, per_group=24)
    for capability in (90, 75, 70):
        monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", str(capability))
        tensors, options = draw(dtype, **sizes)
        with launches() as names:
            check(tensors, options, 0.0)
        taken = PIECES if capability >= (75 if dtype == torch.float16 else 80) else ANY
        assert set(names) == taken


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize("wrong", [dict(features=43), dict(rank=5), dict(per_group=20), dict(rank=36, groups=2)])
def test_other_rows_go_to_the_kernels_for_any(wrong):
    sizes = dict(batch=1, tokens=40, features=40, rank=4, per_group=24) | wrong
    with launches() as names:
        check(*draw(torch.bfloat16, **sizes), 0.3)
    assert set(names) & ANY


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
def test_sums_without_room_in_shared_memory_go_to_the_kernel_for_any(monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_SHARED", "60000")
    with launches() as names:
        check(*draw(torch.bfloat16, **SHAPES["rank 48, tokens"]), 0.3)
    assert set(names) == PIECES - {"routed_lora_forward_mma_kernel"} | {"routed_lora_forward_kernel"}


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
def test_a_t4_has_no_room_for_the_sums_of_four_groups(monkeypatch):
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", "75")
    monkeypatch.setenv("ADAMIX_HOST_SHARED", "65536")
    sizes = dict(groups=4, batch=1, tokens=40, features=40, rank=4, per_group=24)
    with launches() as names:
        check(*draw(torch.float16, **sizes), 0.3)
    assert set(names) == PIECES - {"routed_lora_input_grad_mma_kernel"} | {"routed_lora_input_grad_kernel"}


@pytest.mark.parametrize("dtype", HALVES)
def test_what_others_hold_stays_with_them(dtype):
    """Infinities in the rows of one expert, and in another's factors, reach no row and no gradient of the rest."""
    tensors, options = draw(
        dtype, a_kind="token", b_kind="token", batch=2, tokens=40, features=64, rank=8, per_group=64
    )
    a_index, b_index = options["a_index"], options["b_index"]
    clean = run_lora("cuda", tensors, options)(*tensors)
    x, lora_a, lora_b, base, dy = (t.clone() for t in tensors)
    lost = (a_index == 1) | (b_index == 2)  # rows
    for t in (x, base, dy):
        t[lost] = float("inf")
    lora_a[1], lora_b[2] = float("inf"), float("nan")
    out, dx, da, db, dbase = run_lora("cuda", [x, lora_a, lora_b, base, dy], options)(x, lora_a, lora_b, base, dy)
    for got, want in zip((out, dx, dbase), (clean[0], clean[1], clean[4])):
        assert torch.equal(got[~lost], want[~lost])
    # Experts that also serve lost rows have other gradients; the last one serves none.
    assert not da[3].any()
    assert not db[3].any()
    for expert in range(3):
        if not ((a_index == expert) & lost).any():
            assert torch.equal(da[expert], clean[2][expert])
        if not ((b_index == expert) & lost).any():
            assert torch.equal(db[expert], clean[3][expert])


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("case", "dtype"),
    [("rank 4, tokens", torch.bfloat16), ("rank 20", torch.float16), ("shares of rows", torch.float16)],
)
def test_memory_and_barriers(case, dtype):
    check(*draw(dtype, **SHAPES[case]), 0.3)
