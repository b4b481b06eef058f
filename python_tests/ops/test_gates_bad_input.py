"""What calls with gates refuse: each wrong argument by its name, before anything is computed or overwritten."""

import pytest
import torch
from plain_gates import gated_adapter_case, gated_lora_case

import adamix_kernels
from adamix_kernels.functional import routed_adapter, routed_lora

INDEX = torch.zeros(3, 2, 2, dtype=torch.int64)
F64 = torch.float64
# What is changed of a call with two chosen experts a token of 3 samples of 2, in float64 -> the error and its words.
# The names are routed_lora's; routed_adapter's sides have others.
BOTH = [
    (dict(gates=1.0), TypeError, "gates: got float, expected a torch.Tensor or None"),
    (dict(gates=torch.ones(3, 2, 2, dtype=torch.bfloat16)), TypeError, "gates: got torch.bfloat16, expected"),
    (dict(gates=torch.ones(3, 2, 2, dtype=torch.int64)), TypeError, "gates: got torch.int64"),
    (dict(gates=torch.ones(3, 2, 3)), ValueError, r"gates: got shape \(3, 2, 3\), .*, the shape of A"),
    (dict(gates=torch.ones(3, 2)), ValueError, r"gates: got shape \(3, 2\), expected \(3, 2, 2\)"),
    (dict(gates=torch.ones(3, 2, 2, device="meta")), ValueError, "gates: got a tensor on meta, expected cpu"),
    (dict(mix="sum"), ValueError, "mix: got 'sum', expected one of 'outputs', 'weights'"),
    (dict(mix=None), ValueError, "mix: got None"),
    (dict(A=INDEX[0, 0]), ValueError, r"A: got shape \(2,\), expected \[B, K\] or \[B, S, K\] .*: with gates the last"),
    (dict(A=INDEX[:, 0, 0]), ValueError, r"A: got shape \(3,\), .*counts K slots"),
    (dict(A=INDEX[:2]), ValueError, r"A: got shape \(2, 2, 2\)"),
    (dict(B=INDEX[:, 0]), ValueError, r"B: got shape \(3, 2\), expected \(3, 2, 2\), the shape of A"),
    (dict(B=None), ValueError, r"B: got None, expected an index \(3, 2, 2\) like A, since its bank holds 4 experts"),
    (dict(A=None), ValueError, r"A: got None, expected an index \(3, 2, 2\) like B"),
    (dict(A=INDEX.float()), TypeError, "A: got torch.float32, expected int32 or int64"),
    (dict(A=[0]), TypeError, "A: got list, expected a torch.Tensor or None"),
    (dict(B=INDEX.to("meta")), ValueError, "B: got a tensor on meta"),
    (dict(A=INDEX + 4), IndexError, "A: got expert id 4, expected 0 <= id < 4"),
    (dict(B=INDEX - 1), IndexError, "B: got expert id -1"),
    (dict(A=None, B=None), ValueError, r"gates: got shape \(3, 2, 2\), expected \[B, M\] or \[B, S, M\] .* and M = 4"),
    (dict(A=None, B=None, gates=torch.ones(4)), ValueError, r"gates: got shape \(4,\)"),
    (dict(A=None, B=None, gates=torch.ones(3, 1, 4)), ValueError, r"gates: got shape \(3, 1, 4\)"),
    (dict(backend="tpu"), ValueError, "backend: got 'tpu'"),
]  # fmt: skip
LORA = [
    (dict(scaling=torch.ones(4, dtype=F64)), TypeError, "scaling: got torch.float64, expected torch.float32"),
    (dict(scaling=torch.ones(3)), ValueError, r"scaling: got shape \(3,\), expected \[M\] = \(4,\)"),
    (dict(scaling=torch.ones(())), ValueError, r"scaling: got shape \(\)"),
    (dict(scaling=torch.ones(4, device="meta")), ValueError, "scaling: got a tensor on meta"),
    (dict(scaling=torch.ones(4).requires_grad_()), ValueError, "scaling: got a tensor that requires grad.*into gates"),
    (dict(scaling=torch.tensor([1, float("nan"), 1, 1])), ValueError, r"scaling: got \[1.0, nan, .*, expected f"),
    (dict(scaling=float("inf")), ValueError, "scaling: got inf, expected a finite Python number"),
    (dict(gates=None, scaling=torch.ones(4)), ValueError, r"a_index: got shape \(3, 2, 2\), expected \[B\] or"),
    (dict(lora_b=torch.ones(3, 3, 2, dtype=F64), A=None, B=None, gates=torch.ones(3, 2, 4)), ValueError,
     "lora_b: got a bank of 3, expected 1 or 4 experts, as lora_a: without an index"),
    (dict(lora_a=torch.ones(1, 2, 4, dtype=F64), A=INDEX + 1), IndexError, "a_index: got expert id 1, expected"),
    (dict(lora_a=torch.ones(4, dtype=F64)), ValueError, r"lora_a: got shape \(4,\)"),
    (dict(lora_b=torch.ones((), dtype=F64)), ValueError, r"lora_b: got shape \(\)"),
    (dict(dropout_p=1.0), ValueError, "dropout_p: got 1.0"),
    (dict(inplace=2), TypeError, "inplace: got 2"),
    (dict(inplace=True, base=None), TypeError, "base: got None"),
]  # fmt: skip
ADAPTER = [
    (dict(down_weight=torch.ones(3, 2, 4, dtype=F64), down_bias=None, A=None, B=None, gates=torch.ones(3, 2, 4)),
     ValueError, "down_weight: got a bank of 3, expected 1 or 4 experts, as up_weight"),
    (dict(activation="tanh"), ValueError, "activation: got 'tanh'"),
    (dict(activation=""), ValueError, "activation: got ''"),
    (dict(down_weight=torch.ones(4, dtype=F64)), ValueError, r"down_weight: got shape \(4,\)"),
    (dict(up_weight=torch.ones((), dtype=F64)), ValueError, r"up_weight: got shape \(\)"),
    (dict(residual=torch.ones(3, 2, 5, dtype=F64)), ValueError, r"residual: got shape \(3, 2, 5\)"),
]  # fmt: skip


def refused(function, arguments, change, error, message, names):
    """The names A and B of `change` and `message` stand for the two indices'."""
    renamed = {names.get(name, name): value for name, value in change.items()}
    for short, name in names.items():
        message = message.replace(f"{short}:", f"{name}:").replace(f"shape of {short}", f"shape of {name}")
        message = message.replace(f"like {short}", f"like {name}")
    with pytest.raises(error, match=message):
        function(**{**arguments, **renamed})


@pytest.mark.parametrize("number", range(len(BOTH) + len(LORA)))
def test_routed_lora(number):
    args, options = gated_lora_case("chosen, token")
    arguments = {**dict(zip(("x", "lora_a", "lora_b", "a_index", "b_index"), args, strict=True)), **options}
    base = arguments["base"].detach().clone()
    refused(routed_lora, arguments, *[*BOTH, *LORA][number], names={"A": "a_index", "B": "b_index"})
    assert torch.equal(arguments["base"], base)


@pytest.mark.parametrize("number", range(len(BOTH) + len(ADAPTER)))
def test_routed_adapter(number):
    args, options = gated_adapter_case("chosen, token")
    names = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "down_index", "up_index")
    arguments = {**dict(zip(names, args, strict=True)), **options}
    refused(routed_adapter, arguments, *[*BOTH, *ADAPTER][number], names={"A": "down_index", "B": "up_index"})


def test_nothing_is_overwritten_before_every_value_was_looked_at():
    (x, a, b, i, j), options = gated_lora_case("chosen, token")
    target = options["base"].detach().clone()
    with pytest.raises(IndexError, match="b_index"):
        routed_lora(x, a, b, i, j + 4, **{**options, "base": target}, inplace=True)
    assert torch.equal(target, options["base"])


def test_without_gates_the_word_is_checked_too():
    x, bank = torch.ones(1, 1, 2), torch.ones(1, 2, 2)
    with pytest.raises(ValueError, match="mix: got 'sum'"):
        routed_lora(x, bank, bank, None, None, mix="sum")
    with pytest.raises(ValueError, match="mix: got 'sum'"):
        routed_adapter(x, bank, None, bank, None, None, None, mix="sum")
    # With one expert there is nothing to mix.
    assert torch.equal(
        routed_lora(x, bank, bank, None, None, mix="weights"), routed_lora(x, bank, bank, None, None)
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_serve_the_call_says_what_can(backend, monkeypatch):
    monkeypatch.setattr(adamix_kernels._backends, "_implements", lambda op, name: name == "reference")
    caches = adamix_kernels._backends._problem, adamix_kernels._backends._asked
    for cache in caches:
        cache.cache_clear()
    args, options = gated_lora_case()
    words = f"backend='{backend}' cannot serve gated_lora .*: this build has no .*; backend='reference' computes it"
    with pytest.raises(adamix_kernels.BackendUnavailableError, match=words):
        routed_lora(*args, **options, backend=backend)
    for cache in caches:
        cache.cache_clear()
