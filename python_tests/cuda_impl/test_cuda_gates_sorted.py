"""Gated calls beyond 256 narrow columns on the CUDA backend: slots sorted by expert (csrc/gated/sorted.h)."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import pytest
import torch
from cuda_host import DEVICE, DTYPES, ON_HOST, needs_cuda

needs_cuda()

from cuda_gates import Drawn
from poison import poisoned_memory
from suite_size import NIGHTLY

from reliability.fuzz_cuda import launch_names

FORWARD = ["gated_sort", "gated_sorted_forward_mma", "gated_pair_sum"]
BACKWARD = ["gated_sort", "gated_sorted_input_grad_mma", "gated_pair_sum", "gated_sorted_weight_grad_mma"]
# name -> a call; the experts' columns are more than 256, one expert's 16, 32 or 64 at most.
CASES = {
    "top 2": dict(banks=(33, 33), tokens=40, features=96, rank=8, cols=64),
    "dropout, three slots": dict(banks=(17, 17), slots=3, tokens=37, features=72, rank=16, cols=40, dropout_p=0.3),
    "by samples": dict(banks=(9, 9), of="samples", batch=3, tokens=21, features=40, rank=32, cols=24),
    "two groups": dict(banks=(9, 9), groups=2, tokens=35, features=72, rank=16, cols=40, dropout_p=0.3),
    "rank 20 of a group": dict(banks=(7, 7), groups=2, tokens=20, features=64, rank=20, cols=32),
    "rank 64": dict(banks=(5, 5), tokens=40, features=40, rank=64, cols=40, added=False, scales=False),
    "one row": dict(banks=(9, 9), batch=1, tokens=1, features=32, rank=32, cols=32),
    "one expert twice": dict(banks=(5, 5), slots=4, tokens=3, features=32, rank=52, cols=32, gates_dtype=None),
    "adapter": dict(op="adapter", banks=(17, 17), tokens=33, features=64, rank=16, cols=64, added=False),
    "adapter, by samples": dict(
        op="adapter", banks=(9, 9), of="samples", tokens=19, features=40, rank=40, cols=24, activation="relu"
    ),
    "adapter, no biases": dict(
        op="adapter", banks=(9, 9), slots=3, tokens=9, features=32, rank=32, cols=40, biases=False, activation="silu"
    ),
}


def drawn(case, dtype=torch.bfloat16, **more):
    """A call of CASES, where base has no odd columns behind its last group."""
    made = Drawn(**{"kind": "chosen", "one_index": True, "dtype": dtype, **CASES[case], **more})
    if made.groups > 1:
        made.tensors[4:6] = (t[..., :-3].contiguous() for t in made.tensors[4:6])
        made.given = [t for t in made.tensors if t is not None]
    return made


def sorted_by(run):
    """Whether what run() calls, forward and backward, sorts its slots; where no launch is noted, yes."""
    if not ON_HOST:
        run()
        return True
    with launch_names() as made:
        run()
    return made[:7] == FORWARD + BACKWARD


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)))
def test_sorted_slots(number, case):
    for dtype in DTYPES[1:] if NIGHTLY else DTYPES[1 + number % 2 :][:1]:
        assert sorted_by(drawn(case, dtype).check)


@pytest.mark.skipif(not ON_HOST, reason="a GPU keeps no record of launches")
@pytest.mark.parametrize(
    "other", [dict(one_index=False), dict(mix="weights"), dict(rank=65), dict(features=44), dict(dtype=torch.float32)]
)
def test_other_calls_are_not_sorted(other):
    call = drawn("rank 64", **{"tokens": 3, **other})
    assert not sorted_by(call.check)


@pytest.mark.parametrize("sizes", [dict(tokens=0), dict(batch=0)])
@pytest.mark.parametrize("case", ["rank 64", "adapter", "adapter, by samples"])
def test_no_rows_have_gradients_of_zero(case, sizes):
    call = drawn(case, **sizes)
    with poisoned_memory():
        _, *grads = call.run("cuda")(*call.given)
    assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize(("case", "wrong"), [("rank 64", -1), ("adapter", 17)])
def test_rows_of_wrong_ids_are_nan_and_teach_nobody(case, wrong):
    call = drawn(case, tokens=6, dropout_p=0.3)
    index = call.indices[0].clone()
    index[0, 1, 1] = index[1, 2, 0] = wrong
    bad = torch.zeros(index.shape[:2], dtype=torch.bool, device=DEVICE)
    bad[0, 1] = bad[1, 2] = True
    got = call.run("cuda", indices=(index, index))(*call.given)
    silent = list(call.given)
    silent[4] = torch.where(bad.unsqueeze(-1), 0, silent[4])  # dy, as there is no base
    out = call.run("cuda")(*call.given)[0]
    want = call.run("cuda")(*silent)
    for number, rows in ((0, out), (2, want[2]), (len(got) - 1, want[-1])):
        assert got[number][bad].isnan().all()
        assert torch.equal(got[number][~bad], rows[~bad])
    for mine, other in zip(got[3:-1], want[3:-1], strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)


def test_what_others_hold_stays_with_them():
    """Infinities in rows that name an expert, and in another's weights, reach no row and no gradient of the rest; an
    expert that no slot names gets zeros."""
    call = drawn("rank 64", torch.float16, tokens=9)
    index = call.indices[0]
    index[index == 2] = 0
    lost = (index == 1).any(-1)
    clean = call.run("cuda")(*call.given)
    given = [t.clone() for t in call.given]
    for t in (given[0], given[4]):
        t[lost] = float("inf")
    for bank in given[1:3]:
        bank[1], bank[2], bank[4] = float("inf"), float("nan"), float("nan")
    got = call.run("cuda")(*given)
    for number in (0, 2, len(got) - 1):  # out, dx, dgates
        assert torch.equal(got[number][~lost], clean[number][~lost])
    for grad in got[3:-1]:
        assert grad[2].eq(0).all()
        assert grad[4].eq(0).all()


@pytest.mark.parametrize(
    "needs", [(True, False, False, False), (False, True, False, True), (False, False, True, False)]
)
@pytest.mark.parametrize("case", ["two groups", "adapter, by samples"])
def test_only_what_is_needed_is_computed_with_the_same_bits(case, needs):
    call = drawn(case, tokens=9)
    everything, some = call.run("cuda")(*call.given), call.run("cuda", needs)(*call.given)
    kinds = needs if call.op == "lora" else (needs[0], needs[1], needs[1], needs[2], needs[2], needs[3])
    for needed, whole, part in zip(kinds, everything[2:], some[2:], strict=True):
        assert torch.equal(part, whole) if needed else part.numel() == 0


@pytest.mark.sanitize
@pytest.mark.parametrize("case", ["rank 20 of a group", "adapter, no biases", "adapter, by samples"])
def test_memory_and_barriers(case):
    drawn(case, torch.float16).check()
