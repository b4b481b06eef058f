"""routed_lora as a dispatcher op: schema, fakes, torch.compile."""

import pytest
import torch
from plain_lora import INDEX_KINDS, gradients, leaves_of, lora_case
from suite_size import pairs, singles
from torch._dynamo.testing import CompileCounterWithBackend

from adamix_kernels.functional import routed_lora


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pairs(kinds=[("none", "none"), ("sample", "none"), ("token", "sample")], with_base=[True, False], groups=[1, 2])
def test_opcheck(kinds, with_base, groups):
    args, options = lora_case(*kinds, groups, with_base)
    op = torch.ops.adamix_kernels.routed_lora.default
    for p, seed in ((0.0, None), (0.3, torch.tensor(3))):
        inputs = (
            *args, options["base"], seed, 1.7, groups, list(options["output_offsets"]), p, "reference",
        )  # fmt: skip
        torch.library.opcheck(op, inputs)


@pytest.mark.parametrize("need", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
def test_opcheck_backward(need):
    args, _ = lora_case("sample", "token", 2)
    x, lora_a, lora_b, a_index, b_index = (t.detach() for t in args)
    _, t = torch.ops.adamix_kernels.routed_lora(*(x, lora_a, lora_b, a_index, b_index), None, torch.tensor(3), 1.7, 2,
                                                [0, 6], 0.3, "reference")  # fmt: skip
    inputs = (torch.randn(3, 2, 9, dtype=x.dtype), x, t, lora_a, lora_b, a_index, b_index, torch.tensor(3), *need,
              1.7, 2, [0, 6], 0.3, "reference")  # fmt: skip
    torch.library.opcheck(
        torch.ops.adamix_kernels.routed_lora_backward.default, inputs, test_utils=("test_schema", "test_faketensor")
    )


def _assert_compiled_equals_eager(compiled, function, make_case, batches):
    for batch in batches:
        args, options = make_case(batch)
        leaves = leaves_of(args, options)
        torch.manual_seed(batch)
        want = function(args, options)
        want = (want, *gradients(want, leaves))
        torch.manual_seed(batch)
        got = compiled(args, options)
        got = (got, *gradients(got, leaves))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@singles(a_kind=INDEX_KINDS, drop=[{}, dict(dropout_p=0.4, seed=7), dict(dropout_p=0.4)])
def test_compile_dynamic_batch_compiles_once(a_kind, drop):
    def function(args, options):
        return routed_lora(*args, **options, **drop)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        _assert_compiled_equals_eager(
            compiled, function, lambda b: lora_case(a_kind, "sample", 2, batch=b, tokens=5, seed=b), (3, 4, 7)
        )


@pytest.mark.parametrize(
    "function", [lambda *args: routed_lora(*args), lambda *args: routed_lora(*args, scaling=1.7, dropout_p=0.4, seed=7)]
)
def test_compile_dynamic_traces_once(function):
    """A float read from a default or a global would become a variable, and tracing would start over."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for batch in (5, 7):
        args, _ = lora_case("sample", "none", batch=batch, tokens=11, features=20)
        assert torch.equal(compiled(*args), function(*args))
    assert counter.frame_count == 1


def test_compile_automatic_dynamic_batch_stops_compiling():
    counter = CompileCounterWithBackend("aot_eager")

    def function(args, options):
        return routed_lora(*args, **options, dropout_p=0.4)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    _assert_compiled_equals_eager(
        compiled, function, lambda b: lora_case("sample", "none", batch=b, tokens=5, seed=b), (3, 4, 7, 9)
    )
    assert counter.frame_count == 2  # one static, then one for every batch


def test_compile_inductor():
    def function(args, options):
        return routed_lora(*args, **options, dropout_p=0.4, seed=7)

    compiled = torch.compile(function, fullgraph=True)
    _assert_compiled_equals_eager(
        compiled, function, lambda b: lora_case("token", "sample", 2, batch=b, tokens=5), (3,)
    )


def test_compile_with_a_changing_seed_does_not_recompile_each_step():
    counter = CompileCounterWithBackend("aot_eager")
    args, options = lora_case()
    compiled = torch.compile(
        lambda seed: routed_lora(*args, **options, dropout_p=0.4, seed=seed), fullgraph=True, backend=counter
    )
    for step in range(2, 8):
        assert torch.equal(compiled(step), routed_lora(*args, **options, dropout_p=0.4, seed=step))
    assert counter.frame_count <= 2
