"""mixture_lora on the reference backend: router_gates and routed_lora as one, finite differences, bad input."""

import pytest
import torch
from mixture_cases import (
    SHAPES,
    WIDE,
    Mixture,
    check_against_parts,
    check_choice,
    check_compiled_layer,
    check_empty,
    check_in_place,
    check_infinite_expert,
    check_layer,
    check_not_finite,
    check_unused,
    check_wrapped,
)

from adamix_kernels import BackendUnavailableError
from adamix_kernels.modules import RoutedLoRALinear, _mixture
from adamix_kernels.ops.mixture_lora import op
from adamix_kernels.routing import Gates, LinearRouter, mixture_lora

ALL = SHAPES | WIDE


@pytest.mark.parametrize("name", ALL)
def test_it_is_the_router_and_the_gated_lora(name):
    """In float64: out, gates, ids, logits, and every gradient."""
    case = Mixture(ALL[name])
    made, want = case.call("reference", *case.tensors), case.definition("reference", None, *case.tensors)
    assert made.indices is want[2] is None or torch.equal(made.indices, want[2])
    runs = (lambda *t: case.call("reference", *t)), (lambda *t: case.definition("reference", None, *t))
    for through in ((0, 1, 2), (0,), (1,), (2,), (1, 2)):
        if name == "one expert" and 1 in through:
            continue  # whose gate is 1
        got = [case.results(run, *case.tensors, through=through) for run in runs]
        torch.testing.assert_close(*got, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_errs_like_its_parts(name, dtype):
    check_against_parts("reference", SHAPES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_ids_and_logits_are_the_routers_ties_too(dtype):
    for shape in ALL.values():
        check_choice("reference", shape, dtype)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("of", [(3, 3), (1, 3), (3, 1)])
def test_gradcheck(of, top_k):
    case = Mixture((2, 3, 5, *of, 2, 1, 4, top_k, 0.0, False))
    given = [t.requires_grad_() for t in case.tensors]

    def call(*given):
        out, gates, _, logits = case.call("reference", *given)
        return out, gates, logits

    assert torch.autograd.gradcheck(call, given)


def test_one_gradient_at_a_time():
    case = Mixture(SHAPES["top 2"], torch.float32)
    want = case.results(lambda *t: case.call("reference", *t), *case.tensors)[3:]
    for n, name in enumerate(("x", "lora_a", "lora_b", "router", "base")):
        leaves = [t.clone().requires_grad_(m == n) for m, t in enumerate(case.tensors)]
        made = case.call("reference", *leaves)
        made = made.out, made.gates, made.logits
        # Nothing but out depends on what is no x and no router.
        used = [0, 1, 2] if name in ("x", "router") else [0]
        sum((made[m] * case.grads[m]).sum() for m in used).backward()
        assert [t.grad is not None for t in leaves] == [m == n for m in range(5)]
        assert torch.equal(leaves[n].grad, want[n])


def test_what_is_not_finite_or_not_used_or_not_there():
    check_not_finite("reference")
    check_infinite_expert("reference")
    check_unused("reference")
    check_empty("reference")


def test_in_place():
    check_in_place("reference")


def test_the_layer_calls_it_where_kernels_serve(monkeypatch):
    check_layer("reference", monkeypatch)


def test_auto_takes_the_kernels_of_both_ops_where_none_serves_the_mixture(monkeypatch):
    asked, select = [], op.select
    monkeypatch.setattr(op, "select", lambda name, *rest: asked.append(name) or select(name, *rest))
    x, a, b, router = torch.randn(2, 3, 8), torch.randn(4, 2, 8), torch.randn(4, 6, 2), torch.randn(4, 8)
    out = mixture_lora(x, a, b, router, top_k=2).out
    assert asked == ["mixture_lora", "router", "gated_lora"]
    assert torch.equal(out, mixture_lora(x, a, b, router, top_k=2, backend="reference").out)


def test_an_own_way_to_the_gates_is_asked(monkeypatch):
    monkeypatch.setattr(_mixture, "by_kernel", lambda *_: True)
    gate = LinearRouter(8, 4)
    layer = RoutedLoRALinear.from_linear(torch.nn.Linear(8, 6), r=2, alpha=4, num_experts=4, share=None, gate=gate)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 3, 8)
    plain = layer(x)
    one = torch.tensor([1.0, 0, 0, 0]).expand(2, 3, 4)
    gate.gates = lambda *_: Gates(one, None)
    want = layer.base(x) + 2 * (x @ layer.lora_a[0].T) @ layer.lora_b[0].T
    torch.testing.assert_close(layer(x), want)
    assert not torch.allclose(plain, want)


def test_the_layer_is_one_graph(monkeypatch):
    check_compiled_layer("reference", monkeypatch)


def test_compile_autocast_checkpointing_and_opcheck():
    check_wrapped("reference")


BAD = [
    (dict(x=None), TypeError, "x: got NoneType"),
    (dict(x=torch.ones(3, 8)), ValueError, "x: got shape (3, 8), expected [B, S, K]"),
    (dict(lora_a=torch.ones(4, 2, 7)), ValueError, "lora_a: got shape (4, 2, 7)"),
    (dict(lora_a=torch.ones(3, 2, 8)), ValueError, "lora_a: got a bank of 3, expected 1 or 4 experts"),
    (dict(lora_b=torch.ones(4, 6, 2).double()), TypeError, "lora_b: got torch.float64"),
    (dict(lora_a=torch.ones(1, 2, 8), lora_b=torch.ones(1, 6, 2)), ValueError, "lora_b: got a bank of one"),
    (dict(router=torch.ones(4, 7)), ValueError, "router: got shape (4, 7), expected [M, H]"),
    (dict(router=torch.ones(4, 8).half()), TypeError, "router: got torch.float16, expected torch.float32"),
    (dict(base=torch.ones(2, 3, 5)), ValueError, "output_offsets: got (0,)"),
    (dict(base=torch.ones(2, 4, 6)), ValueError, "base: got shape (2, 4, 6)"),
    (dict(top_k=5), ValueError, "top_k: got 5, expected None (all experts) or 1 <= top_k <= 4"),
    (dict(scaling=torch.ones(4)), TypeError, "scaling: got"),
    (dict(groups=4), ValueError, "lora_a"),
    (dict(dropout_p=1.0), ValueError, "dropout_p: got 1.0"),
    (dict(inplace=2), TypeError, "inplace: got 2"),
    (dict(inplace=True), TypeError, "base: got None"),
    (dict(backend="x"), ValueError, "backend: got 'x'"),
]


@pytest.mark.parametrize(("changed", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_bad_input_is_named(changed, error, words):
    given = dict(x=torch.ones(2, 3, 8), lora_a=torch.ones(4, 2, 8), lora_b=torch.ones(4, 6, 2))
    given |= dict(router=torch.ones(4, 8)) | changed
    with pytest.raises(error) as found:
        mixture_lora(**given)
    assert words in str(found.value)


def test_base_may_not_lie_in_the_routers_memory():
    memory = torch.ones(2, 3, 8)
    with pytest.raises(ValueError, match="base: got a tensor in router's memory"):
        mixture_lora(
            torch.ones(2, 3, 8), torch.ones(6, 2, 8), torch.ones(6, 8, 2), memory.view(6, 8), base=memory, inplace=True
        )


def test_an_absent_backend_is_refused():
    with pytest.raises(BackendUnavailableError, match="mixture_lora"):
        mixture_lora(
            *(torch.ones(*s, dtype=torch.float64) for s in ((2, 3, 8), (4, 2, 8), (4, 6, 2), (4, 8))), backend="triton"
        )
