"""routed_lora with gates on the reference backend against a loop over slots and against finite differences."""

import itertools

import pytest
import torch
import torch.utils.checkpoint
from plain_gates import BANKS, FORMS, by_slot_lora, gated_lora_case, gradients, leaves_of, run

from adamix_kernels.functional import routed_lora
from adamix_kernels.ops import _gated_matmul, _routed_matmul
from adamix_kernels.ops.gated_lora.op import gated_lora_backward_op, gated_lora_inplace_op, gated_lora_op

CLOSE = dict(rtol=1e-11, atol=1e-11)
MIXES = ("outputs", "weights")


def check(args, options, **drop):
    out, expected = routed_lora(*args, **options, **drop), by_slot_lora(*args, **options, **drop)
    torch.testing.assert_close(out, expected, **CLOSE)
    leaves = leaves_of(args, options)
    for got, want in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("form", "banks"), [*itertools.product(FORMS, BANKS), ("chosen, sample", (3, 4)), ("chosen, token", (3, 4))]
)
def test_equals_the_definition_by_slot(form, banks, mix):
    for number, (scales, with_base, slots) in enumerate(itertools.product((False, True), (False, True), (1, 3))):
        groups = 1 + (number + number // 4) % 2
        kind = dict(index_dtype=(torch.int32, torch.int64)[number % 2])
        args, options = gated_lora_case(form, banks, slots, mix, groups, with_base, scales, seed=number, **kind)
        check(args, options, **(dict(dropout_p=0.4, seed=11) if number % 3 == 0 else {}))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("banks", [(4, 4), (1, 4), (4, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_more_columns_than_one_product_holds(form, banks, mix):
    """4 * 100 columns: chosen tokens are grouped by expert, with the same numbers."""
    check(*gated_lora_case(form, banks, 2, mix, rank=100, scales=True))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("banks", [(4, 4), (1, 4), (4, 1)])
def test_where_no_value_of_an_index_is_read(banks, mix, monkeypatch):
    """As on a GPU: every expert meets every token, and what is not its own counts as 0."""
    monkeypatch.setattr(_gated_matmul, "reads_routing", lambda index: False)
    monkeypatch.setattr(_routed_matmul, "reads_routing", lambda index: False)
    check(*gated_lora_case("chosen, token", banks, 3, mix, groups=2, used=3))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("banks", [(4, 4), (1, 4), (4, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, banks, mix):
    few = dict(batch=1, features=3, rank=1, per_group=1) if form != "chosen, sample" else dict(tokens=1, features=2)
    args, options = gated_lora_case(form, banks, 2, mix, 2, scales=True, **few)
    base, gates = options.pop("base"), options.pop("gates")

    def function(x, a, b, base, gates):
        return routed_lora(x, a, b, *args[3:], base=base, gates=gates, **options, dropout_p=0.3, seed=3)

    assert torch.autograd.gradcheck(function, (*args[:3], base, gates))


@pytest.mark.parametrize("form", ["dense, token", "chosen, sample"])
def test_one_gradient_at_a_time(form):
    args, options = gated_lora_case(form, mix="weights", groups=2)
    whole = gradients(routed_lora(*args, **options), leaves_of(args, options))
    for wanted, want in enumerate(whole):
        leaves = [t.detach().requires_grad_(n == wanted) for n, t in enumerate(leaves_of(args, options))]
        given = {**options, "gates": leaves[3], "base": leaves[4]}
        (got,) = gradients(routed_lora(*leaves[:3], *args[3:], **given), [leaves[wanted]])
        assert torch.equal(got, want), wanted


def test_one_chosen_expert_of_weight_one_is_the_call_without_gates():
    for form, banks in itertools.product(("chosen, sample", "chosen, token"), ((4, 4), (1, 4))):
        (x, a, b, i, j), options = gated_lora_case(form, banks, 1)
        options["gates"] = torch.ones_like(options["gates"])
        plain = {k: v for k, v in options.items() if k not in ("gates", "mix")}
        squeezed = (t if t is None else t.squeeze(-1) for t in (i, j))
        torch.testing.assert_close(
            routed_lora(x, a, b, i, j, **options), routed_lora(x, a, b, *squeezed, **plain), **CLOSE
        )


@pytest.mark.parametrize("index", [[2, 0, 2], [[2, 1], [0, 0], [3, 3]]])
def test_a_scaling_for_each_expert_without_gates(index):
    (x, a, b, _, _), options = gated_lora_case(scales=True, groups=2)
    del options["gates"]
    scaling, index = options.pop("scaling"), torch.tensor(index)
    by_token = index if index.dim() == 2 else index.unsqueeze(1).expand(3, 2)
    for first in (torch.tensor([1, 3, 0]), by_token):
        out = routed_lora(x, a, b, first, index, scaling=scaling, **options)
        for n, s in itertools.product(range(3), range(2)):
            one = {**options, "base": options["base"][n : n + 1, s : s + 1], "scaling": scaling[by_token[n, s]].item()}
            f = first[n : n + 1] if first.dim() == 1 else first[n : n + 1, s]
            alone = routed_lora(x[n : n + 1, s : s + 1], a, b, f, by_token[n, s : s + 1], **one)
            torch.testing.assert_close(out[n, s], alone[0, 0], **CLOSE)
    # Two banks of one, and no index at all.
    one = routed_lora(x, a[:1], b[:1], None, None, scaling=scaling[:1], **options)
    torch.testing.assert_close(one, routed_lora(x, a[:1], b[:1], None, None, **{**options, "scaling": 0.5}), **CLOSE)


def test_slots_that_name_one_expert_add_up():
    (x, a, b, i, j), options = gated_lora_case("chosen, token", slots=3)
    i, j = torch.full_like(i, 2), torch.full_like(j, 1)
    once = {**options, "gates": options["gates"].sum(-1, keepdim=True)}
    out = routed_lora(x, a, b, i, j, **options)
    torch.testing.assert_close(out, routed_lora(x, a, b, i[..., :1], j[..., :1], **once), **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(0, 2, 2), (3, 0, 2), (0, 0, 1), (3, 2, 0)])
def test_empty(form, sizes):
    batch, tokens, slots = sizes
    for mix, banks in itertools.product(MIXES, ((4, 4), (1, 4), (4, 1))):
        args, options = gated_lora_case(form, banks, slots, mix, 2, batch=batch, tokens=tokens)
        out = routed_lora(*args, **options)
        if "chosen" in form and slots == 0:
            assert torch.equal(out, options["base"])
        assert out.shape == options["base"].shape
        *grads, base = gradients(out, leaves_of(args, options))
        assert base.shape == out.shape
        if "chosen" in form or out.numel() == 0:
            assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("rank", [1, 100])
@pytest.mark.parametrize("form", ["chosen, sample", "chosen, token"])
@pytest.mark.parametrize("mix", MIXES)
def test_an_unused_expert_gets_exactly_zero_and_reaches_nobody(form, mix, rank):
    args, options = gated_lora_case(form, (4, 4), 2, mix, used=3, rank=rank)
    x, a, b, i, j = (t if t is None else t.detach().clone() for t in args)
    for bank in (a, b):
        bank[3] = float("inf")
    alone = [t.requires_grad_() for t in (x, a, b)]
    out, *grads = run(routed_lora, (*alone, i, j), options, "reference")
    assert out.isfinite().all()
    for grad, index in ((grads[1], i), (grads[2], j)):
        assert torch.equal(grad[3], torch.zeros_like(grad[3]))
        for expert in set(index.flatten().tolist()):
            assert grad[expert].ne(0).any()
    # A sample that is not finite spoils the experts that it names, and no other.
    with torch.no_grad():
        x[0] = float("nan")
        others = {*range(4)} - {*i[0].flatten().tolist()}
    grads = run(routed_lora, (*alone, i, j), options, "reference")[1:]
    for expert in others:
        assert grads[1][expert].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_twice(form, dtype):
    args, options = gated_lora_case(form, mix="weights", groups=2, dtype=dtype, gates_dtype=torch.float32, batch=5)
    first, second = (run(routed_lora, args, options, "reference") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert (first[4].dtype, first[1].dtype) == (torch.float32, dtype)  # gates, x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gates_dtype", [torch.float32, None])
def test_16_bits_err_like_pytorch(dtype, gates_dtype):
    for form, mix in itertools.product(FORMS, MIXES):
        sizes = dict(batch=4, tokens=8, features=32, rank=8, per_group=32)
        args, options = gated_lora_case(form, mix=mix, dtype=dtype, gates_dtype=gates_dtype, **sizes)
        found = run(routed_lora, args, options, "reference")
        wide = [t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_() for t in args]
        more = {k: options[k].detach().double().requires_grad_() for k in ("gates", "base")}
        for got, want in zip(found, run(by_slot, wide, {**options, **more}, None), strict=True):
            assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def by_slot(*args, backend, **options):
    return by_slot_lora(*args, **options)


def test_non_contiguous():
    args, options = gated_lora_case("chosen, token", groups=2)
    want = run(routed_lora, args, options, "reference")

    def strided(t):
        if t is None or not t.is_floating_point():
            return t if t is None else torch.stack([t, t], -1)[..., 0]
        return t.detach().mT.contiguous().mT.requires_grad_()

    changed = {**options, "gates": strided(options["gates"]), "base": strided(options["base"])}
    for got, expected in zip(run(routed_lora, [strided(t) for t in args], changed, "reference"), want, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
        assert got.is_contiguous()


@pytest.mark.parametrize("form", ["dense, token", "chosen, sample"])
@pytest.mark.parametrize("groups", [1, 2])
def test_in_place(form, groups):
    args, options = gated_lora_case(form, groups=groups)
    want = run(routed_lora, args, options, "reference")
    target = options["base"] * 1
    out = routed_lora(*args, **{**options, "base": target}, inplace=True)
    assert out.data_ptr() == target.data_ptr()
    got = [out.detach().clone(), *gradients(out, leaves_of(args, options))]
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    with torch.no_grad():
        assert torch.equal(routed_lora(*args, **{**options, "base": target.copy_(options["base"])}, inplace=True), out)
    x, a, b, *_ = gated_lora_case(banks=(3, 3))[0]
    memory = torch.zeros(3, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="base: got a tensor in gates's memory"):
        routed_lora(x, a, b, None, None, gates=memory, base=memory, inplace=True)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    args, options = gated_lora_case(form, mix="weights", groups=2, scales=True)
    x, a, b, i, j = args
    tensors, gates, scales = (x, a, b, i, j), options["gates"], options["scaling"]
    how = (1.0, 2, [0, 6], 0.3, "weights", "reference")
    seed, kinds = torch.tensor(3), ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gated_lora_op, (*tensors, gates, scales, options["base"], seed, *how))
    out, t = gated_lora_op(*tensors, gates, scales, options["base"], seed, *how)
    needs = (True, True, True, True)
    backward = (torch.randn_like(out), x, t, a, b, i, j, gates, scales, seed, *needs, *how)
    torch.library.opcheck(gated_lora_backward_op, [v.detach() if torch.is_tensor(v) else v for v in backward])
    base = options["base"].detach().clone()
    plain = [v if v is None else v.detach() for v in (*tensors, gates, scales)]
    torch.library.opcheck(gated_lora_inplace_op, (*plain, base, seed, *how), test_utils=kinds)


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    args, options = gated_lora_case(form, dtype=torch.float32, groups=2)
    with torch.autocast("cpu", torch.bfloat16):
        out = routed_lora(*args, **options)
    assert out.dtype == torch.bfloat16
    grads = gradients(out, leaves_of(args, options))
    assert all(g.dtype == torch.float32 for g in grads)
    low = [t.detach().bfloat16() if t is not None and t.is_floating_point() else t for t in args]
    # Gates in float32 stay so; in 16 bits they are cast with the rest.
    assert torch.equal(out, routed_lora(*low, **{**options, "base": options["base"].bfloat16()}))
    with torch.autocast("cpu", torch.bfloat16):
        halves = routed_lora(*args, **{**options, "gates": options["gates"].half()})
    rounded = {**options, "gates": options["gates"].half().bfloat16(), "base": options["base"].bfloat16()}
    assert torch.equal(halves, routed_lora(*low, **rounded))


def test_checkpointing():
    args, options = gated_lora_case("chosen, token", groups=2)
    want = run(routed_lora, args, options, "reference")

    def layer(*given):
        return torch.utils.checkpoint.checkpoint(lambda *a: routed_lora(*a, **options), *given, use_reentrant=False)

    got = run(lambda *a, backend, **_: layer(*a), args, options, None)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_derivatives_are_taken_once():
    args, options = gated_lora_case()
    (grad,) = torch.autograd.grad(routed_lora(*args, **options).square().sum(), options["gates"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
