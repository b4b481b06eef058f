"""routed_adapter with gates on the reference backend against a loop over slots and against finite differences."""

import itertools

import pytest
import torch
import torch.utils.checkpoint
from plain_gates import ACTIVATIONS, BANKS, FORMS, by_slot_adapter, gated_adapter_case, gradients, leaves_of, run

from adamix_kernels.functional import routed_adapter
from adamix_kernels.ops import _gated_matmul, _routed_matmul
from adamix_kernels.ops.gated_adapter.op import gated_adapter_backward_op, gated_adapter_op

CLOSE = dict(rtol=1e-11, atol=1e-11)
MIXES = ("outputs", "weights")


def check(args, options):
    out, expected = routed_adapter(*args, **options), by_slot_adapter(*args, **options)
    torch.testing.assert_close(out, expected, **CLOSE)
    leaves = leaves_of(args, options)
    for got, want in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("form", "banks"), [*itertools.product(FORMS, BANKS), ("chosen, sample", (3, 4)), ("chosen, token", (3, 4))]
)
def test_equals_the_definition_by_slot(form, banks, mix):
    for number, (biases, residual) in enumerate(itertools.product((True, False), ("none", "input", "other"))):
        activation = list(ACTIVATIONS)[number % len(ACTIVATIONS)]
        kind = dict(index_dtype=(torch.int32, torch.int64)[number % 2], seed=number)
        check(*gated_adapter_case(form, banks, 1 + number % 3, mix, biases, residual, activation, **kind))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("banks", [(4, 4), (1, 4), (4, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_more_columns_than_one_product_holds(form, banks, mix):
    """4 * 100 columns: chosen tokens are grouped by expert, with the same numbers."""
    check(*gated_adapter_case(form, banks, 2, mix, rank=100))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("banks", [(4, 4), (1, 4), (4, 1)])
def test_where_no_value_of_an_index_is_read(banks, mix, monkeypatch):
    """As on a GPU: every expert meets every token, and what is not its own counts as 0."""
    monkeypatch.setattr(_gated_matmul, "reads_routing", lambda index: False)
    monkeypatch.setattr(_routed_matmul, "reads_routing", lambda index: False)
    check(*gated_adapter_case("chosen, token", banks, 3, mix, used=3))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("banks", [(4, 4), (1, 4), (4, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, banks, mix):
    few = dict(batch=1, features=2, out=2, rank=1) if form != "chosen, sample" else dict(tokens=1, features=2, out=2)
    activation = "gelu" if banks == (4, 4) else "silu" if banks == (1, 4) else "gelu_tanh"
    args, options = gated_adapter_case(form, banks, 2, mix, activation=activation, **few)
    residual, gates = options.pop("residual"), options.pop("gates")

    def function(x, down, down_bias, up, up_bias, residual, gates):
        return routed_adapter(
            x, down, down_bias, up, up_bias, *args[5:], residual=residual, gates=gates, **options
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (*args[:5], residual, gates))


@pytest.mark.parametrize("form", ["dense, token", "chosen, sample"])
def test_one_gradient_at_a_time(form):
    args, options = gated_adapter_case(form, mix="weights")
    whole = gradients(routed_adapter(*args, **options), leaves_of(args, options))
    for wanted, want in enumerate(whole):
        leaves = [t.detach().requires_grad_(n == wanted) for n, t in enumerate(leaves_of(args, options))]
        given = {**options, "gates": leaves[5], "residual": leaves[6]}
        (got,) = gradients(routed_adapter(*leaves[:5], *args[5:], **given), [leaves[wanted]])
        assert torch.equal(got, want), wanted


def test_one_chosen_expert_of_weight_one_is_the_call_without_gates():
    for form, banks in itertools.product(("chosen, sample", "chosen, token"), ((4, 4), (4, 1))):
        (*tensors, i, j), options = gated_adapter_case(form, banks, 1)
        ones = {**options, "gates": torch.ones_like(options["gates"])}
        plain = {k: v for k, v in options.items() if k not in ("gates", "mix")}
        squeezed = (t if t is None else t.squeeze(-1) for t in (i, j))
        torch.testing.assert_close(
            routed_adapter(*tensors, i, j, **ones), routed_adapter(*tensors, *squeezed, **plain), **CLOSE
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(0, 2, 2), (3, 0, 2), (3, 2, 0)])
def test_empty(form, sizes):
    batch, tokens, slots = sizes
    for mix, banks in itertools.product(MIXES, ((4, 4), (1, 4), (4, 1))):
        args, options = gated_adapter_case(form, banks, slots, mix, batch=batch, tokens=tokens)
        out = routed_adapter(*args, **options)
        assert out.shape == options["residual"].shape
        *grads, residual = gradients(out, leaves_of(args, options))
        assert residual.shape == out.shape
        # Without a slot, a mean of weights still meets the one expert above: of nothing, its bias.
        nothing = out.numel() == 0 or ("chosen" in form and (mix == "outputs" or banks[1] > 1))
        if nothing:
            assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
            assert torch.equal(out, options["residual"])


@pytest.mark.parametrize("rank", [1, 100])
@pytest.mark.parametrize("form", ["chosen, sample", "chosen, token"])
@pytest.mark.parametrize("mix", MIXES)
def test_an_unused_expert_gets_exactly_zero_and_reaches_nobody(form, mix, rank):
    args, options = gated_adapter_case(form, (4, 4), 2, mix, used=3, rank=rank)
    *tensors, i, j = (t.detach().clone() for t in args)
    for bank in tensors[1:]:
        bank[3] = float("nan")
    tensors = [t.requires_grad_() for t in tensors]
    out, *grads = run(routed_adapter, (*tensors, i, j), options, "reference")
    assert out.isfinite().all()
    for number, index in ((1, i), (2, i), (3, j), (4, j)):
        assert torch.equal(grads[number][3], torch.zeros_like(grads[number][3]))
        for expert in set(index.flatten().tolist()):
            assert grads[number][expert].ne(0).any()
    with torch.no_grad():
        tensors[0][0] = float("nan")
    grads = run(routed_adapter, (*tensors, i, j), options, "reference")[1:]
    for expert in {*range(4)} - {*i[0].flatten().tolist()}:
        assert grads[1][expert].isfinite().all()
        assert grads[2][expert].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_twice(form):
    args, options = gated_adapter_case(form, mix="weights", dtype=torch.bfloat16, gates_dtype=torch.float32, batch=5)
    first, second = (run(routed_adapter, args, options, "reference") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert (first[6].dtype, first[1].dtype) == (torch.float32, torch.bfloat16)  # gates, x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gates_dtype", [torch.float32, None])
def test_16_bits_err_like_pytorch(dtype, gates_dtype):
    for form, mix in itertools.product(FORMS, MIXES):
        sizes = dict(batch=4, tokens=8, features=32, rank=8, out=32)
        args, options = gated_adapter_case(form, mix=mix, dtype=dtype, gates_dtype=gates_dtype, **sizes)
        found = run(routed_adapter, args, options, "reference")
        wide = [t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_() for t in args]
        more = {k: options[k].detach().double().requires_grad_() for k in ("gates", "residual")}
        exact = run(lambda *a, backend, **o: by_slot_adapter(*a, **o), wide, {**options, **more}, None)
        for got, want in zip(found, exact, strict=True):
            assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    args, options = gated_adapter_case(form, mix="weights")
    tensors, gates = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in args], options["gates"]
    how = (False, "silu", "weights", "reference")
    torch.library.opcheck(gated_adapter_op, (*tensors, gates, options["residual"], *how))
    x, down, _, up, up_bias, i, j = tensors
    out, pre = gated_adapter_op(*tensors, gates, None, *how)
    backward = (torch.randn_like(out), x, pre, down, up, up_bias, i, j, gates, True, True, True, True, *how)
    torch.library.opcheck(gated_adapter_backward_op, [v.detach() if torch.is_tensor(v) else v for v in backward])


@pytest.mark.parametrize("residual", ["input", "other"])
def test_autocast(residual):
    args, options = gated_adapter_case("chosen, token", dtype=torch.float32, residual=residual)
    with torch.autocast("cpu", torch.bfloat16):
        out = routed_adapter(*args, **options)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in gradients(out, leaves_of(args, options)))
    low = [t.detach().bfloat16() if t.is_floating_point() else t for t in args]
    added = low[0] if residual == "input" else options["residual"].bfloat16()
    assert torch.equal(out, routed_adapter(*low, **{**options, "residual": added}))


def test_checkpointing():
    args, options = gated_adapter_case("chosen, token", residual="input")
    want = run(routed_adapter, args, options, "reference")

    def layer(*given, backend, **how):
        call = lambda x, *rest: routed_adapter(x, *rest, **{**how, "residual": x})  # noqa: E731
        return torch.utils.checkpoint.checkpoint(call, *given, use_reentrant=False)

    got = run(layer, args, options, None)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
