"""routed_adapter with gates on the Triton backend: interpreted on the CPU, compiled where there is a GPU."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import functools
from unittest import mock

import pytest
import torch
from triton_spy import DEVICE, DTYPES, launches, needs_triton

needs_triton()

from plain_gates import ACTIVATIONS, BANKS, FORMS, by_slot_adapter, gated_adapter_case
from poison import poisoned_memory
from suite_size import NIGHTLY, pairs

from adamix_kernels._triton_utils import INTERPRETING
from adamix_kernels.functional import routed_adapter
from adamix_kernels.ops import _adapter_planes, _gated_sum
from adamix_kernels.ops._triton_tables import lookup
from adamix_kernels.ops.gated_adapter import triton_impl
from adamix_kernels.ops.gated_adapter.triton_impl import by_rows, tables, weights
from adamix_kernels.ops.gated_adapter.triton_impl.plan import make_plan
from adamix_kernels.testing import assert_in_budget

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
spied_launches = functools.partial(launches, triton_impl, weights, by_rows, _adapter_planes, _gated_sum)
BACKWARD = ["gated_adapter_input_grad_kernel", "gated_adapter_weight_grad_kernel"]


def draw(form, banks, slots=2, dtype=torch.float32, batch=2, tokens=19, features=20, rank=5, out=None, **how):
    """(x, both banks and biases, gates, dy), both indices and other options of the call."""
    sizes = dict(batch=batch, tokens=tokens, features=features, rank=rank, out=out or features)
    how = dict(residual="input" if out is None else "none") | how
    (x, *rest), options = gated_adapter_case(form, banks, slots, dtype=dtype, device=DEVICE, **sizes, **how)
    gates, added = options.pop("gates"), options.pop("residual")
    kind = "none" if added is None else "input" if added is x else "other"
    dy = torch.randn(batch, tokens, sizes["out"], generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    tensors = [t if t is None else t.detach() for t in (x, *rest[:4], gates, dy)]
    return tensors, rest[4:], options | dict(residual=kind)


def run(backend, tensors, indices, options):
    """A function of the tensors that are not None, giving the output and every gradient; kernels get poison."""
    present = [t is not None for t in tensors]

    def call(*given):
        it = iter(given)
        full = [next(it).clone() if there else None for there in present]
        *leaves, dy = full
        leaves = [t if t is None else t.requires_grad_() for t in leaves]
        other = dy.flip(0).clone().requires_grad_() if options["residual"] == "other" else None
        added = {"none": None, "input": leaves[0], "other": other}[options["residual"]]
        with poisoned_memory(backend != "reference"):
            *banks, gates = leaves
            rest = {name: value for name, value in options.items() if name != "residual"}
            made = routed_adapter(*banks, *indices, gates=gates, residual=added, backend=backend, **rest)
            wanted = [t for t in (*leaves, other) if t is not None]
            grads = torch.autograd.grad(made, wanted, dy, allow_unused=True, materialize_grads=True)
            return made.detach(), *grads

    return call


def rows_launches(banks):
    """What is launched where a tile cannot hold all experts: at most two more, forward and backward."""
    summed = ["gated_rows_sum_kernel"]
    forward = ["gated_adapter_rows_shrink_kernel", "gated_adapter_rows_forward_kernel", *summed * (banks[1] > 1)]
    middle = ["gated_adapter_rows_shrink_kernel", "gated_adapter_rows_grad_kernel", *summed * (banks[0] > 1)]
    return [*forward, *middle, "gated_adapter_rows_weight_grad_kernel"]


def check(tensors, indices, options, names_wanted=("gated_adapter_forward_kernel", *BACKWARD)):
    # The maximum over few elements is luck; without TF32 a GPU takes three TF32 products, see CONTRIBUTING, law 9.
    given = [t for t in tensors if t is not None]
    runs = [run(backend, tensors, indices, options) for backend in ("triton", "reference")]
    with spied_launches() as names:
        assert_in_budget(*runs, *given, multiple=8.0)
    wanted = len(names_wanted)
    assert names[:wanted] == list(names_wanted)
    assert names[wanted:] in ([], ["adapter_plane_sum_kernel"])


@pytest.mark.parametrize(
    ("form", "banks", "mix"),
    [
        (form, banks, mix) for form in FORMS for banks in BANKS for mix in ("outputs", "weights")
        if NIGHTLY or mix == "outputs" or banks == (4, 4)
    ],
    ids=str,
)  # fmt: skip
def test_every_form_of_gates_and_banks(form, banks, mix):
    check(*draw(form, banks, mix=mix, residual="other" if mix == "weights" else "input"))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", ["dense", "chosen", "shared", "weights"])
def test_half_precision(case, dtype):
    form = "chosen, token" if case == "chosen" else "dense, token"
    how = dict(mix="weights" if case == "weights" else "outputs", features=64, gates_dtype=torch.float32)
    check(*draw(form, (4, 1 if case == "shared" else 4), dtype=dtype, **how))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [dict(slots=3, biases=False), dict(of="sample", slots=2, rank=16, out=24)], ids=str)
def test_one_index_of_both_sides(how, dtype):
    """Slots of a row may name one expert twice."""
    form = f"chosen, {how.get('of', 'token')}"
    tensors, (index, _), options = draw(form, (4, 4), dtype=dtype, **{k: v for k, v in how.items() if k != "of"})
    check(tensors, [index, index], options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    for dtype in (torch.float32, torch.bfloat16):
        check(*draw("dense, token", (3, 3), dtype=dtype, activation=activation, biases=dtype == torch.float32))


SHAPES = {
    "one row": dict(form="chosen, token", batch=1, tokens=1, rank=4, features=29),
    "primes": dict(form="chosen, sample", batch=3, tokens=67, features=131, out=37, banks=(3, 5)),
    "rank 1": dict(form="dense, token", rank=1, features=7),
    "64 experts": dict(form="chosen, token", banks=(64, 64), slots=3, rank=4),
    "256 columns": dict(form="dense, token", banks=(4, 4), rank=33, tokens=5),
    "no slot": dict(form="chosen, token", slots=0),
    "one slot": dict(form="chosen, token", slots=1),
    "gates as x": dict(form="dense, sample", dtype=torch.bfloat16),
    "int32": dict(form="chosen, sample", index_dtype=torch.int32),
}


@pytest.mark.parametrize("case", SHAPES)
def test_every_shape(case):
    how = dict(banks=(4, 4)) | SHAPES[case]
    tensors, indices, options = draw(how.pop("form"), how.pop("banks"), **how)
    check(tensors, indices, options)


@pytest.mark.parametrize(("form", "rank"), [("dense, sample", 5), ("chosen, token", 5), ("chosen, sample", 70)])
def test_several_splits_of_the_rows(form, rank):
    wanted = {} if rank == 5 else dict(names_wanted=rows_launches((4, 4)))
    module = weights if rank == 5 else by_rows
    # By rows an expert has its share of the splits.
    with mock.patch.object(module, "count_splits", return_value=5 if rank == 5 else 12), spied_launches() as names:
        check(*draw(form, (4, 4), rank=rank, dtype=torch.bfloat16, tokens=90 if rank == 5 else 40), **wanted)
    assert "adapter_plane_sum_kernel" in names


def test_planes_of_all_experts_are_few():
    # blocks, columns of both sides, bytes of a row: as at the counted sizes, on a 9.0.
    of = weights.count_splits
    assert [of(8192, 16, 64, 2 * 8 * r, 4, weights.PLANES) for r in (16, 8)] == [5, 10]
    # Of fewer rows as many as without gates, until there are enough programs.
    assert [of(rows, 16, 64, 256, 4, part) for rows in (2048, 4096) for part in (weights.PLANES, 4)] == [2, 2, 4, 4]


@pytest.mark.parametrize("mix", ["outputs", "weights"])
def test_it_is_the_formula(mix):
    (x, *banks, gates, _), indices, _ = draw("chosen, token", (4, 4), slots=3, mix=mix, tokens=5)
    got = routed_adapter(x, *banks, *indices, gates=gates, mix=mix, residual=x, backend="triton")
    torch.testing.assert_close(got, by_slot_adapter(x, *banks, *indices, gates=gates, mix=mix, residual=x))


# Columns of 4 experts that one tile holds, and more.
BOTH_WAYS = pytest.mark.parametrize("rank", [5, 70])


@BOTH_WAYS
@pytest.mark.parametrize("form", ["chosen, sample", "chosen, token"])
def test_an_expert_no_slot_names_gets_an_exactly_zero_gradient(form, rank):
    tensors, indices, options = draw(form, (4, 4), used=2, rank=rank, tokens=7)
    _, _, *grads = run("triton", tensors, indices, options)(*tensors)
    for grad in grads[:4]:
        assert grad[2:].eq(0).all()
        assert grad[:2].ne(0).any()


@BOTH_WAYS
def test_infinite_weights_do_not_reach_rows_that_name_other_experts(rank):
    """Bit for bit what finite weights there give."""
    tensors, _, options = draw("chosen, token", (4, 4), tokens=11, rank=rank)
    rows = torch.arange(22, device=DEVICE).view(2, 11)
    index = torch.stack([rows % 3, (rows + 1) % 3], -1)
    clean = run("triton", tensors, [index, index], options)(*tensors)
    broken = [t.clone() for t in tensors]
    for bank in broken[1:5]:
        bank[0], bank[3] = float("inf"), float("nan")  # expert 3 serves no row
    got = run("triton", broken, [index, index], options)(*broken)
    theirs = (index != 0).all(-1)
    assert torch.equal(got[0][theirs], clean[0][theirs])
    assert torch.equal(got[1][theirs], clean[1][theirs])
    assert torch.equal(got[-1][theirs], clean[-1][theirs])
    assert not got[0][~theirs].isfinite().all(-1).any()
    for grad in got[2:6]:
        assert grad[3].eq(0).all()


@BOTH_WAYS
def test_infinite_rows_do_not_reach_experts_they_do_not_name(rank):
    tensors, _, options = draw("chosen, sample", (4, 4), batch=3, tokens=5, rank=rank)
    index = torch.tensor([[0, 0], [1, 2], [2, 1]], device=DEVICE)
    tensors[0][0] = tensors[-1][0] = float("inf")
    out, dx, *grads = run("triton", tensors, [index, index], options)(*tensors)
    assert out[1:].isfinite().all()
    assert dx[1:].isfinite().all()
    for grad in grads[:4]:
        assert grad[1:3].isfinite().all()
        assert grad[3].eq(0).all()


@pairs(side=[0, 1], rank=[5, 70], value=[-1, 4, 2**32 + 1])
def test_rows_with_a_wrong_id_are_nan_and_teach_nothing(side, rank, value):
    (x, *banks, gates, dy), indices, _ = draw("chosen, token", (4, 4), tokens=5, rank=rank)
    broken = [index.clone() for index in indices]
    broken[side][0, 1, 1] = value
    results = []
    for ids, cotangent in ((indices, torch.where(torch.arange(5, device=DEVICE)[:, None] == 1, 0, dy)), (broken, dy)):
        with poisoned_memory():
            out, pre = triton_impl.forward(x, *banks, *ids, gates, None, True, "gelu", "outputs")
            arguments = (cotangent, x, pre, banks[0], banks[2], banks[3], *ids, gates)
            results.append((out, *triton_impl.backward(*arguments, True, True, True, True, True, "gelu", "outputs")))
    (want, _, *grads, _), (out, dx, *got, dgates) = results
    for t in (out, dx, dgates):
        assert t[0, 1].isnan().all()
        assert t[0, [0, 2, 3, 4]].isfinite().all()
    # dy of sample 0's and 1's second token is 0 on one side, that of the wrong row on the other.
    assert torch.equal(out[1], want[1])
    assert all(t.isfinite().all() for t in (*got, *grads))


@BOTH_WAYS
def test_only_what_is_needed_is_computed_with_the_same_bits(rank):
    (x, *banks, gates, dy), indices, _ = draw("chosen, sample", (4, 4), rank=rank, tokens=7)
    _, pre = triton_impl.forward(x, *banks, *indices, gates, None, True, "gelu", "outputs")
    arguments = (dy, x, pre, banks[0], banks[2], banks[3], *indices, gates)
    want = triton_impl.backward(*arguments, True, True, True, True, True, "gelu", "outputs")
    for needed in range(4):
        needs = [n == needed for n in range(4)]
        got = triton_impl.backward(*arguments, *needs, True, "gelu", "outputs")
        for mine, full, is_needed in zip(got, want, (needs[0], needs[1], needs[1], needs[2], needs[2], needs[3])):
            assert torch.equal(mine, full if is_needed else full.new_empty(0))


def test_strides_do_not_matter_and_nothing_is_written():
    tensors, indices, _ = draw("chosen, token", (4, 4), tokens=5)
    spread = lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)  # noqa: E731
    strided, ids = [spread(t) for t in tensors], [spread(t) for t in indices]
    before = [t.clone() for t in strided]

    def raw(x, dw, db, uw, ub, gates, dy, ids):
        leaves = [t.detach().requires_grad_() for t in (x, dw, db, uw, ub, gates)]
        out = routed_adapter(*leaves[:5], *ids, gates=leaves[5], residual=leaves[0], backend="triton")
        return out, *torch.autograd.grad(out, leaves, dy)

    got, want = raw(*strided, ids), raw(*tensors, indices)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(strided, before))


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (3, 0)])
def test_an_empty_batch_gives_zero_gradients(batch, tokens):
    tensors, indices, options = draw("dense, sample", (4, 4), batch=batch, tokens=tokens)
    with spied_launches() as names:
        out, *grads = run("triton", tensors, indices, options)(*tensors)
    assert out.shape == (batch, tokens, 20)
    assert all(g.eq(0).all() for g in grads)
    assert names == []


@BOTH_WAYS
@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_value_reaches_python(form, rank):
    (x, *banks, gates, dy), indices, _ = draw(form, (4, 4), rank=rank)
    x, *banks, gates, dy = (t.to("meta") for t in (x, *banks, gates, dy))
    indices = [t if t is None else t.to("meta") for t in indices]
    with spied_launches(run=False) as names:
        out, pre = triton_impl.forward(x, *banks, *indices, gates, None, True, "gelu", "outputs")
        arguments = (dy, x, pre, banks[0], banks[2], banks[3], *indices, gates)
        dx, *grads, dgates = triton_impl.backward(*arguments, True, True, True, True, True, "gelu", "outputs")
    assert [out.shape, dx.shape, dgates.shape] == [dy.shape, x.shape, gates.shape]
    assert [g.shape for g in grads] == [b.shape for b in banks]
    assert names == (["gated_adapter_forward_kernel", *BACKWARD] if rank == 5 else rows_launches((4, 4)))


# name -> how the call is drawn; all have more than 256 columns on one side at least.
ROWS = {
    "dense": dict(form="dense, token", tokens=9),
    "dense weights": dict(form="dense, sample", mix="weights"),
    "chosen": dict(form="chosen, token", slots=3),
    "chosen weights": dict(form="chosen, token", mix="weights"),
    "chosen sample": dict(form="chosen, sample", banks=(3, 4), rank=80, index_dtype=torch.int32),
    "chosen sample weights": dict(form="chosen, sample", banks=(3, 4), rank=80, mix="weights"),
    "one down": dict(form="dense, token", banks=(1, 3)),
    "one down, chosen": dict(form="chosen, token", banks=(1, 3), mix="weights"),
    "one up": dict(form="dense, sample", banks=(3, 1)),
    "one up, chosen": dict(form="chosen, token", banks=(3, 1)),
    "one up, weights": dict(form="chosen, token", banks=(3, 1), mix="weights"),
    "no slot": dict(form="chosen, token", slots=0),
    "no slot, one up": dict(form="chosen, token", banks=(3, 1), slots=0, mix="weights"),
    "one row": dict(form="chosen, token", batch=1, tokens=1),
    "as wide as a tile": dict(form="chosen, token", banks=(2, 2), rank=256, tokens=3),
    "primes": dict(form="chosen, token", tokens=37, features=41, out=37),
    "many experts": dict(
        form="chosen, token", banks=(33, 33), rank=8, tokens=2, dtype=torch.bfloat16, gates_dtype=torch.float32
    ),
    "float16 weights": dict(form="dense, token", dtype=torch.float16, mix="weights"),
}


AT_NIGHT = ("chosen sample weights", "one down", "one up, chosen", "no slot", "one row")


@pytest.mark.parametrize("case", [case for case in ROWS if NIGHTLY or case not in AT_NIGHT])
def test_more_columns_than_a_tile_holds(case):
    how = dict(banks=(3, 3), rank=100, tokens=3) | ROWS[case]
    tensors, indices, options = draw(how.pop("form"), banks := how.pop("banks"), **how)
    check(tensors, indices, options, rows_launches(banks))


@pytest.mark.parametrize(("batch", "tokens"), [(3, 1), (1, 3)])
def test_more_columns_with_an_index_that_has_gaps(batch, tokens):
    tensors, indices, options = draw("chosen, sample", (33, 33), slots=1, rank=8, batch=batch, tokens=tokens)
    gaps = [torch.stack([index, index + 1], -1)[..., 0] for index in indices]
    check(tensors, gaps, options, rows_launches((33, 33)))


@pytest.mark.skipif(not INTERPRETING, reason="nothing is launched")
@pytest.mark.parametrize("kernel", tables.TABLES)
def test_every_shape_class_has_a_configuration_on_every_gpu(kernel):
    for capability in (0, 80, 86, 90, 100, 120):
        for itemsize, width in ((i, 1 << n) for i in (2, 4) for n in range(4, 9)):
            rows, cols, warps, stages = tables.config(kernel, capability, itemsize, width)
            assert min(rows, cols) >= 16
            assert warps in (4, 8)
            assert 1 <= stages <= 5


@pytest.mark.parametrize(("capability", "cols"), [(80, 128), (86, 64), (89, 64), (90, 64), (100, 64), (120, 64)])
def test_wide_steps_where_one_program_has_the_shared_memory(capability, cols):
    kernel, grad = "gated_adapter_forward_kernel", BACKWARD[0]
    x, index = torch.empty(1, 1, 64), torch.zeros(1, 1, 2, dtype=torch.int64)
    chosen = make_plan(x, 16, index, index, torch.empty(1, 1, 2), 8, 8, "outputs")
    dense = make_plan(x, 16, None, None, torch.empty(1, 1, 8), 8, 8, "outputs")
    for plan, wanted in ((chosen, cols), (dense, 64)):
        assert plan.width == 128
        assert lookup(kernel, tables.rows_table(kernel, plan), capability, 2, 128).cols == wanted
        assert tables.rows_table(grad, plan) is tables.TABLES[grad]


@pytest.mark.skipif(not INTERPRETING, reason="the widest step is of few GPUs")
@pytest.mark.parametrize("features", [256, 144])
def test_wide_steps(features):
    tensors, (index, _), options = draw(
        "chosen, token", (8, 8), dtype=torch.bfloat16, batch=1, tokens=9, rank=16, features=features
    )
    with spied_launches(run=False, options=(found := [])):
        run("triton", tensors, [index, index], options)(*tensors)
    assert found[0]["COLS"] == 128
    check(tensors, [index, index], options)
