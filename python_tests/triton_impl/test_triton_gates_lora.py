"""gated_lora on the Triton backend: interpreted on the CPU (TRITON_INTERPRET=1), compiled where there is a GPU."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import functools
import itertools

import pytest
import torch
from triton_spy import DEVICE, DTYPES, launches, needs_triton

needs_triton()

from gates_lora_cases import BANKS, draw_gates, run_gates
from poison import poisoned_memory
from suite_size import NIGHTLY, covering, pairs, singles

from adamix_kernels.ops import _gated_sum
from adamix_kernels.ops.gated_lora import reference, triton_impl
from adamix_kernels.ops.gated_lora.triton_impl import by_rows, one_tile
from adamix_kernels.ops.routed_lora.triton_impl import weights
from adamix_kernels.testing import assert_in_budget

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
spied_launches = functools.partial(launches, one_tile, by_rows, weights, _gated_sum)
draw = functools.partial(draw_gates, DEVICE)
TILE = ["gated_lora_forward_kernel", "gated_lora_dx_kernel", "lora_grads_kernel"]


def check(tensors, options, mix="outputs", dropout_p=0.0, kernels=TILE):
    # The maximum over few elements is luck; over many draws the mean errors agree.
    x, _, b, gates, *_ = tensors
    multiple = 2.0 if min(x.shape[0] * x.shape[1], *b.shape[1:]) >= 16 else 8.0
    runs = [run_gates(impl, options, mix, dropout_p) for impl in (triton_impl, reference)]
    with spied_launches() as names:
        assert_in_budget(*runs, *tensors, multiple=multiple)
    of_samples = ["gated_sample_sum_kernel"] * (gates.dim() == 2)
    assert [name for name in names if name != "lora_sum_kernel"] == [*kernels, *of_samples]


# A bank of one has no index.
KINDS = [
    case for case in itertools.product(BANKS, ("token", "sample"), ("dense", "chosen"), ("outputs", "weights"))
    if case[0] != "one" or case[2] != "chosen"
]  # fmt: skip


@pytest.mark.parametrize(("banks", "per", "kind", "mix"), KINDS if NIGHTLY else covering(KINDS, 2))
def test_every_kind_of_gates(banks, per, kind, mix):
    groups, scales = (2, False) if per == "token" else (1, True)
    dtype = torch.int32 if mix == "weights" else torch.int64
    tensors, options = draw(banks, kind, per, groups, rank=3 if groups == 2 else 4, index_dtype=dtype, scales=scales)
    check(tensors, options, mix, 0.3 if kind == "dense" else 0.0)


@pairs(banks=list(BANKS)[:3], dtype=DTYPES[1:], kind_mix=[("chosen", "outputs"), ("dense", "weights")])
def test_every_kind_of_gates_in_half_precision(banks, dtype, kind_mix):
    kind, mix = kind_mix
    gates = dtype if mix == "weights" else torch.float32
    check(*draw(banks, kind, "token", tokens=19, features=37, per_group=23, dtype=dtype, gates_dtype=gates), mix, 0.3)


ROWS = ["gated_rows_forward_kernel", "gated_rows_sum_kernel", "gated_rows_dx_kernel", "gated_rows_sum_kernel"]
ROWS += ["lora_grads_kernel"]
# By rows what is mixed before its second product takes a launch more in either direction.
MIXED_ROWS = [name for name in ROWS for _ in range(2 if name in (ROWS[0], ROWS[2]) else 1)]
WIDE = {
    "two ids a slot": dict(batch=2, tokens=9, same=False),
    "sorted": dict(batch=2, tokens=13, rank=70, groups=2),
    "sorted, by sample": dict(batch=3, tokens=7, rank=70, per="sample", per_group=17),
    "rank in chunks": dict(batch=2, tokens=9, rank=150),
    "shared A": dict(banks="shared A", batch=2, tokens=9, rank=70),
    "shared B": dict(banks="shared B", batch=2, tokens=9, rank=70),
    "one expert": dict(banks="one", kind="dense", batch=2, tokens=9, rank=150),
    "many slots": dict(batch=2, tokens=3, slots=17),
    "dense": dict(kind="dense", batch=2, tokens=9, rank=70),
    "dense, by sample": dict(kind="dense", per="sample", batch=2, tokens=9, rank=70),
}


@singles(case=WIDE, mix=["outputs", "weights"])
def test_rows_grouped_by_expert(case, mix):
    """Where a tile cannot hold all experts, or two ids of a slot."""
    if case in ("two ids a slot", "one expert") and mix == "weights":
        pytest.skip("fits into a tile, or is the same")
    sizes = WIDE[case]
    dtype = torch.bfloat16 if case in ("sorted", "dense", "shared A") else torch.float32
    both = sizes.get("banks", "both") == "both"
    kernels = MIXED_ROWS if mix == "weights" and both else ROWS
    if case == "many slots" and mix == "weights":
        sizes = sizes | dict(same=False)
    check(*draw(dtype=dtype, **sizes), mix, 0.0 if case == "sorted, by sample" else 0.3, kernels)


SHAPES = {
    "tail tiles of primes": dict(batch=2, tokens=37, features=131, rank=5, per_group=41, experts=5),
    "three groups": dict(groups=3, batch=2, tokens=19, features=23, rank=3, per_group=17),
    "several splits": dict(batch=2, tokens=137, features=20, per_group=11),
    "one row": dict(batch=1, tokens=1, features=29, groups=2),
    "one token a sample": dict(per="sample", batch=9, tokens=1, features=20),
    "rank 1, many experts": dict(batch=2, tokens=5, rank=1, features=7, experts=40),
    "256 columns": dict(batch=2, tokens=17, rank=32, features=20, experts=8),
    "256 columns of float32": dict(batch=2, tokens=9, rank=32, features=20, experts=8),
    "one expert a row": dict(batch=2, tokens=17, features=20, slots=1),
    "more slots than experts": dict(batch=2, tokens=17, features=20, slots=6),
    "two ids a slot": dict(batch=2, tokens=17, features=20, same=False),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("kind", ["chosen", "dense"])
def test_every_shape(kind, case):
    sizes = dict(SHAPES[case])
    if sizes.get("same") is False and kind == "dense":
        pytest.skip("dense slots have one id")
    of_float32 = ("several splits", "one row", "256 columns of float32", "two ids a slot")
    dtype = torch.float32 if case in of_float32 else torch.bfloat16
    # Slots with two ids: as one tile where the experts' weights are what is mixed.
    mix = "weights" if case in ("three groups", "two ids a slot") else "outputs"
    check(*draw(kind=kind, dtype=dtype, **sizes), mix, 0.3)


@pytest.mark.parametrize("mix", ["outputs", "weights"])
def test_without_a_base_and_in_place(mix):
    tensors, options = draw(groups=2, tokens=18)
    want = run_gates(triton_impl, options, mix)(*tensors)
    got = run_gates(triton_impl, options, mix, inplace=True)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    x, a, b, gates, base, _ = tensors
    tail = (1.7, 2, options["offsets"], 0.0, mix)
    with poisoned_memory():
        out, _ = triton_impl.forward(x, a, b, *options["indices"], gates, options["scales"], None, None, *tail)
    torch.testing.assert_close(out + base[..., :-1], want[0][..., :-1])


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (3, 0)])
def test_an_empty_batch_gives_zero_gradients(batch, tokens):
    tensors, options = draw(batch=batch, tokens=tokens)
    with spied_launches() as names:
        out, *grads = run_gates(triton_impl, options)(*tensors)
    assert out.shape == tensors[4].shape
    assert [g.shape for g in grads] == [t.shape for t in tensors[:4]]
    assert all(g.eq(0).all() for g in grads)
    assert names == []


def test_no_slots_leave_the_base():
    tensors, options = draw(slots=0)
    out, *grads = run_gates(triton_impl, options)(*tensors)
    assert torch.equal(out, tensors[4])
    assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("mix", ["outputs", "weights"])
def test_an_unused_expert_gets_an_exactly_zero_gradient(mix):
    tensors, options = draw(tokens=20)
    options["indices"] = tuple(index % 2 * 2 for index in options["indices"])
    _, _, da, db, _ = run_gates(triton_impl, options, mix, 0.3)(*tensors)
    for grad in (da, db):
        assert grad[[1, 3]].eq(0).all()
        assert grad[[0, 2]].ne(0).any()


@pytest.mark.parametrize("mix", ["outputs", "weights"])
def test_infinities_of_one_expert_do_not_reach_another(mix):
    """Neither a poisoned row nor a poisoned expert reaches rows and gradients that no slot joins to it."""
    tensors, options = draw(batch=4, tokens=17, features=20)
    index = torch.tensor([[0, 1], [1, 2], [2, 1], [2, 2]], device=DEVICE).unsqueeze(1).expand(4, 17, 2)
    options["indices"] = index, index
    x, a, b, *_ = tensors
    clean = run_gates(triton_impl, options, mix)(*tensors)
    x[0] = float("inf")
    a[0], b[0], a[3], b[3, 3:30] = float("inf"), float("nan"), float("nan"), float("inf")
    out, dx, da, db, dgates = run_gates(triton_impl, options, mix)(*tensors)
    for mine, want in zip((out, dx, dgates), (clean[0], clean[1], clean[4])):
        torch.testing.assert_close(mine[1:], want[1:])
    assert not out[0].isfinite().any()
    for grad, want in ((da, clean[2]), (db, clean[3])):
        torch.testing.assert_close(grad[2], want[2])
        assert grad[3].eq(0).all()
        assert not grad[:2].isfinite().all()


def test_infinities_of_two_chosen_experts_that_cancel_are_nan():
    tensors, options = draw(batch=1, tokens=17, features=20, slots=2)
    options["indices"] = (torch.tensor([0, 1], device=DEVICE).expand(1, 17, 2).contiguous(),) * 2
    _, a, b, gates, *_ = tensors
    a[1], gates[:] = a[0], 1.0
    b[0, 2], b[1, 2] = float("inf"), float("-inf")
    out = run_gates(triton_impl, options)(*tensors)[0]
    assert out[..., 2].isnan().all()
    assert out[..., [0, 1, 3]].isfinite().all()


@pairs(
    wrong=[(torch.int32, -1), (torch.int64, 2**32 + 1)], side=["both", "A", "B"], mix=["outputs", "weights"]
)  # fmt: skip
def test_a_row_with_a_wrong_id_is_nan_and_teaches_no_expert(wrong, side, mix):
    index_dtype, value = wrong
    """Of one side alone: with "outputs" the rows are grouped by expert."""
    if side == "A" and value > 0:
        pytest.skip("seen with the other sides")
    tensors, options = draw(batch=2, tokens=17, index_dtype=index_dtype)
    right = options["indices"][0]
    broken = right.clone()
    broken[1, :9, 1] = value
    wrong = torch.zeros(right.shape[:2], dtype=torch.bool, device=DEVICE)
    wrong[1, :9] = True
    # The same way through the kernels: of one side alone the other one's are the same numbers elsewhere.
    sides = (right, right) if side == "both" else (right, right.clone())
    clean = [t.clone() for t in tensors]
    clean[5][wrong] = 0  # no gradient comes from those rows
    want = run_gates(triton_impl, options | dict(indices=sides), mix)(*clean)
    sides = {"both": (broken, broken), "A": (broken, right), "B": (right, broken)}[side]
    out, dx, da, db, dgates = run_gates(triton_impl, options | dict(indices=sides), mix)(*tensors)
    for mine, other in ((out, want[0]), (dx, want[1]), (dgates, want[4])):
        assert mine[wrong].isnan().all()
        assert torch.equal(mine[~wrong], other[~wrong])
    torch.testing.assert_close(da, want[2])
    torch.testing.assert_close(db, want[3])


@pytest.mark.parametrize("needed", range(4))
def test_only_what_is_needed_is_computed_with_the_same_bits(needed):
    needs = tuple(number == needed for number in range(4))
    tensors, options = draw(groups=2, tokens=60)
    want = run_gates(triton_impl, options, dropout_p=0.3)(*tensors)[1:]
    with spied_launches() as names:
        got = run_gates(triton_impl, options, dropout_p=0.3, needs=needs)(*tensors)[1:]
    for mine, full, wanted in zip(got, want, needs):
        assert torch.equal(mine, full if wanted else full.new_empty(0))
    assert ("lora_grads_kernel" in names) == (needs[1] or needs[2])


def test_strides_do_not_matter_and_inputs_are_not_written():
    tensors, options = draw(groups=2, tokens=18)
    want = run_gates(triton_impl, options, dropout_p=0.3)(*tensors)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    before = [t.clone() for t in strided]
    index = torch.stack([options["indices"][0]] * 2, -1)[..., 0]
    options |= dict(indices=(index, index), scales=torch.stack([options["scales"]] * 2, -1)[..., 0])
    got = run_gates(triton_impl, options, dropout_p=0.3)(*strided)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(before, strided))


@pytest.mark.parametrize("kind", ["chosen", "dense"])
def test_the_same_bits_twice(kind):
    tensors, options = draw(kind=kind, per="sample", **SHAPES["several splits"])
    run = run_gates(triton_impl, options, dropout_p=0.3)
    assert all(torch.equal(a, b) for a, b in zip(run(*tensors), run(*tensors)))


@pytest.mark.parametrize("kind", ["chosen", "dense"])
@pytest.mark.parametrize("case", SHAPES)
def test_no_tensor_value_reaches_python(case, kind):
    """Meta tensors have no values, so everything around the launches is decided without them."""
    tensors, options = draw(**{"kind": kind, "dtype": torch.bfloat16, **SHAPES[case]})
    meta = lambda t: None if t is None else t.to("meta")  # noqa: E731
    options |= dict(indices=tuple(map(meta, options["indices"])), scales=meta(options["scales"]))
    tensors = [meta(t) for t in tensors]
    with spied_launches(run=False) as names:
        out, *grads = run_gates(triton_impl, options, dropout_p=0.3)(*tensors)
    assert out.shape == tensors[4].shape
    assert [g.shape for g in grads] == [t.shape for t in tensors[:4]]
    assert len(names) - (tensors[3].dim() == 2) in (3, 4) or case == "two ids a slot"
