"""routed_adapter on the reference backend, against a loop over samples written here."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from adapter_cases import ACTIVATIONS, by_loop, index, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_size import singles

from adamix_kernels.functional import routed_adapter
from adamix_kernels.testing import assert_in_budget

OP = torch.ops.adamix_kernels.routed_adapter.default
CASES = [
    pytest.param(dict(down=3, up=1), "sample", None, id="shared-up"),
    pytest.param(dict(down=1, up=3), None, "sample", id="shared-down"),
    pytest.param(dict(down=3, up=2), "sample", "sample", id="both-routed"),
    pytest.param(dict(down=3, up=2), "token", "token", id="per-token"),
    pytest.param(dict(down=3, up=2), "token", "sample", id="mixed"),
    pytest.param(dict(down=1, up=1), None, None, id="plain"),
    pytest.param(dict(down=3, up=1, bias=False), "sample", None, id="no-bias"),
    pytest.param(dict(down=2, up=2, out=7), "sample", "token", id="other-width"),
]


@pytest.mark.parametrize("residual", ["none", "input", "other"])
@pytest.mark.parametrize(("sizes", "down_kind", "up_kind"), CASES)
def test_forward_and_gradients_match_the_loop(sizes, down_kind, up_kind, residual):
    if residual == "input" and "out" in sizes:
        residual = "other"
    x, *banks = inputs(**sizes)
    down_index, up_index = index(down_kind, sizes["down"]), index(up_kind, sizes["up"])
    other = torch.randn(4, 3, banks[2].shape[1], dtype=torch.double, requires_grad=True)
    added = {"none": None, "input": x, "other": other}[residual]
    leaves = [t for t in (x, *banks, other if residual == "other" else None) if t is not None]
    weight = torch.randn(4, 3, banks[2].shape[1], dtype=torch.double)
    for activation in ACTIVATIONS:
        got = routed_adapter(x, *banks, down_index, up_index, residual=added, activation=activation)
        want = by_loop(x, *banks, down_index, up_index, added, activation)
        torch.testing.assert_close(got, want)
        grads = torch.autograd.grad((got * weight).sum(), leaves)
        torch.testing.assert_close(grads, torch.autograd.grad((want * weight).sum(), leaves))


@singles(case=CASES, activation=list(ACTIVATIONS))
def test_gradcheck(case, activation):
    sizes, down_kind, up_kind = case.values
    x, *banks = inputs(**sizes)
    down_index, up_index = index(down_kind, sizes["down"]), index(up_kind, sizes["up"])
    leaves = [t for t in (x, *banks) if t is not None]

    def run(*leaves):
        it = iter(leaves)
        full = [next(it) if t is not None else None for t in (x, *banks)]
        return routed_adapter(*full, down_index, up_index, activation=activation)

    assert torch.autograd.gradcheck(run, leaves)


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_and_index(data):
    draw = data.draw
    batch, tokens, hidden, r = (draw(st.integers(lo, hi)) for lo, hi in ((0, 5), (0, 5), (1, 9), (1, 5)))
    down, up = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    x, *banks = inputs(batch, tokens, hidden, r, down, up, bias=draw(st.booleans()))
    kinds = ["sample", "token"]
    down_index = index(draw(st.sampled_from(kinds + [None] * (down == 1))), down, batch, tokens)
    up_index = index(draw(st.sampled_from(kinds + [None] * (up == 1))), up, batch, tokens, torch.int32)
    got = routed_adapter(x, *banks, down_index, up_index, residual=x)
    torch.testing.assert_close(got, by_loop(x, *banks, down_index, up_index, x))
    leaves = [t for t in (x, *banks) if t is not None]
    grads = torch.autograd.grad(got.square().sum(), leaves)
    want = torch.autograd.grad(by_loop(x, *banks, down_index, up_index, x).square().sum(), leaves, allow_unused=True)
    for mine, theirs in zip(grads, want):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


@pytest.mark.parametrize("kind", ["sample", "token"])
def test_an_unused_expert_gets_an_exactly_zero_gradient(kind):
    x, *banks = inputs(down=4, up=4)
    used = index(kind, 2) * 2
    routed_adapter(x, *banks, used, used, residual=x).exp().sum().backward()
    for bank in banks:
        assert bank.grad[[1, 3]].eq(0).all()
        assert bank.grad[[0, 2]].ne(0).any()


def test_a_sample_with_infinities_does_not_reach_other_experts():
    x, *banks = inputs(down=3, up=3)
    with torch.no_grad():
        x[0] = float("inf")
    chosen = torch.tensor([0, 1, 1, 1])
    routed_adapter(x, *banks, chosen, chosen).sum().backward()
    for bank in banks:
        assert bank.grad[1].isfinite().all()
        assert bank.grad[2].eq(0).all()


def test_only_wanted_gradients_are_computed():
    x, *banks = inputs()
    for frozen in ("x", "banks"):
        leaves = [x.detach(), *banks] if frozen == "x" else [x, *(b.detach() for b in banks)]
        routed_adapter(*leaves, index("sample", 3), None, residual=leaves[0]).sum().backward()
    assert x.grad is not None
    assert all(b.grad is not None for b in banks)


def test_inputs_are_not_written_and_strides_do_not_matter():
    x, *banks = inputs()
    chosen = index("sample", 3)
    want = routed_adapter(x, *banks, chosen, None, residual=x)
    strided = x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    before = [t.detach().clone() for t in (strided, *banks)]
    got = routed_adapter(strided, *banks, chosen, None, residual=strided)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (strided, *banks)))


def test_the_same_bits_twice():
    x, *banks = inputs(batch=8, tokens=16, hidden=32, r=8, dtype=torch.float32)
    chosen = index("sample", 3, 8)
    runs = []
    for _ in range(2):
        out = routed_adapter(x, *banks, chosen, None, residual=x)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (x, *banks))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("kind", ["sample", "token"])
def test_opcheck(kind):
    x, *banks = inputs(dtype=torch.float32)
    for residual, add_input in ((None, True), (torch.randn(4, 3, 5, requires_grad=True), False), (None, False)):
        torch.library.opcheck(OP, (x, *banks, index(kind, 3), None, residual, add_input, "gelu", "auto"))
    pre = torch.randn(4, 3, 2)
    backward = torch.ops.adamix_kernels.routed_adapter_backward.default
    args = (torch.randn(4, 3, 5), x.detach(), pre, banks[0].detach(), banks[2].detach(), index(kind, 3), None)
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(
            backward, (*args, *needs, True, "gelu", "auto"), test_utils=("test_schema", "test_faketensor")
        )


def test_torch_compile_whole_graph_no_recompile_per_batch_size():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(x, chosen, *banks):
        return routed_adapter(x, *banks, chosen, None, residual=x).square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    _, *banks = inputs(dtype=torch.float32)
    for batch, tokens in ((4, 11), (6, 9), (9, 7), (12, 13)):
        x = torch.randn(batch, tokens, 5, requires_grad=True)
        chosen = index("sample", 3, batch)
        got = torch.autograd.grad(compiled(x, chosen, *banks), (x, *banks))
        torch.testing.assert_close(got, torch.autograd.grad(loss(x, chosen, *banks), (x, *banks)))
    assert counter.frame_count == 1


@pytest.mark.nightly
def test_torch_compile_inductor():
    x, *banks = inputs(dtype=torch.float32)
    chosen = index("token", 3)
    loss = lambda *t: routed_adapter(*t, chosen, None, residual=t[0]).square().mean()  # noqa: E731
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, *banks), (x, *banks))
    torch.testing.assert_close(got, torch.autograd.grad(loss(x, *banks), (x, *banks)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_every_argument_and_gradients_come_back_in_their_dtype(dtype):
    x, *banks = inputs(dtype=torch.float32)
    chosen = index("sample", 3)
    with torch.autocast("cpu", dtype):
        out = routed_adapter(x, *banks, chosen, None, residual=x)
    assert out.dtype == dtype
    cast = [t.to(dtype) for t in (x, *banks)]
    assert torch.equal(out, routed_adapter(*cast, chosen, None, residual=cast[0]))
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, *banks))


def test_backward_inside_autocast_keeps_the_forwards_dtype():
    x, *banks = inputs(dtype=torch.float32)
    out = routed_adapter(x, *banks, index("sample", 3), None, residual=x).square().sum()
    want = torch.autograd.grad(out, (x, *banks), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out, (x, *banks))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_stay_within_a_multiple_of_plain_pytorch(dtype):
    x, *banks = (t.detach() for t in inputs(6, 16, 32, 8, dtype=dtype))
    chosen = index("sample", 3, 6)
    weight = torch.randn(6, 16, 32, dtype=dtype)

    def run(function):
        def both(x, weight, *banks):
            leaves = [t.clone().requires_grad_() for t in (x, *banks)]
            out = function(*leaves, chosen, None, residual=leaves[0])
            return out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)

        return both

    def plain(x, dw, db, uw, ub, i, _, residual):
        z = torch.einsum("bsh,brh->bsr", x, dw[i]) + db[i][:, None]
        return residual + F.linear(F.gelu(z), uw[0], ub[0])

    assert_in_budget(run(routed_adapter), run(plain), x, weight, *banks)


BAD = [
    ("x", dict(x=torch.randn(4, 5)), ValueError, r"x: got shape \(4, 5\), expected \[B, S, H\]"),
    ("x dtype", dict(x=torch.ones(4, 3, 5, dtype=torch.long)), TypeError, "x: got torch.int64, expected a floating"),
    ("down_weight", dict(down_weight=torch.randn(3, 2, 6)), ValueError, "down_weight: got shape"),
    ("down_weight dtype", dict(down_weight=torch.randn(3, 2, 5).double()), TypeError, "down_weight: got torch.float64"),
    ("down_bias", dict(down_bias=torch.randn(3, 4)), ValueError, "down_bias: got shape"),
    ("up_weight", dict(up_weight=torch.randn(1, 5, 3)), ValueError, "up_weight: got shape"),
    ("up_bias", dict(up_bias=torch.randn(2, 5)), ValueError, "up_bias: got shape"),
    ("down_index None", dict(down_index=None), ValueError, "down_index: got None, expected an index"),
    ("down_index dtype", dict(down_index=torch.zeros(4)), TypeError, "down_index: got torch.float32"),
    ("down_index shape", dict(down_index=torch.zeros(5, dtype=torch.long)), ValueError, "down_index: got shape"),
    ("down_index high", dict(down_index=torch.tensor([0, 1, 3, 0])), IndexError, "down_index: got expert id 3"),
    ("down_index low", dict(down_index=torch.tensor([0, -1, 2, 0])), IndexError, "down_index: got expert id -1"),
    ("up_index high", dict(up_index=torch.tensor([0, 1, 0, 0])), IndexError, "up_index: got expert id 1"),
    ("residual", dict(residual=torch.randn(4, 3, 6)), ValueError, "residual: got shape"),
    ("activation", dict(activation="tanh"), ValueError, "activation: got 'tanh', expected one of"),
    ("device", dict(up_bias=torch.empty(1, 5, device="meta")), ValueError, "up_bias: got a tensor on meta"),
    ("type", dict(down_weight=[1.0]), TypeError, "down_weight: got list, expected a torch.Tensor"),
]


@pytest.mark.parametrize(("change", "error", "message"), [pytest.param(*c[1:], id=c[0]) for c in BAD])
def test_bad_input_names_the_argument(change, error, message):
    x, *banks = inputs(dtype=torch.float32)
    names = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "down_index", "up_index")
    arguments = dict(zip(names, (x, *banks, torch.tensor([0, 1, 2, 0]), None)))
    arguments.update(change)
    with pytest.raises(error, match=message):
        routed_adapter(**arguments)


def test_a_second_derivative_is_refused():
    x, *banks = inputs()
    out = routed_adapter(x, *banks, index("sample", 3), None)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
