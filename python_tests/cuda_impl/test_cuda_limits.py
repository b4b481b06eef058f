"""Calls beyond what a GPU's shared memory, or the kernels' parameters, hold: chosen or refused before the forward."""

# ruff: noqa: E402 (the module is skipped where the kernels cannot run)

import gc
import sys
import weakref

import pytest
import torch
from cuda_host import ON_HOST, names, needs_cuda, runtime_calls
from tiny import batch_for, tiny_bert

needs_cuda()
if not ON_HOST:
    pytest.skip("the environment says what GPU the CPU stands for", allow_module_level=True)

from adamix_kernels import (
    AdaMixConfig,
    BackendUnavailableError,
    _auto,
    _extension,
    adapt,
    merge_experts,
    routed_adapter,
    routed_lora,
)
from adamix_kernels.ops import _node
from adamix_kernels.ops.merge.api import merge_banks
from adamix_kernels.ops.mixture_lora.api import mixture_lora

# Capability, a block's shared memory, then the most narrow columns in float32 and in 16 bits, by hand: 38,400 bytes
# stand beside 64 rows of these columns and of 16 bytes.
GPUS = {
    "T4": (75, 65536, 96, 192),
    "V100": (70, 98304, 224, 448),
    "A10": (89, 101376, 240, 480),
    "A100": (80, 166912, 496, 992),
    "H100": (90, 232448, 752, 1504),
}
DTYPES = {torch.float32: 2, torch.float16: 3}


def be(monkeypatch, gpu):
    monkeypatch.setenv("ADAMIX_HOST_CAPABILITY", str(GPUS[gpu][0]))
    monkeypatch.setenv("ADAMIX_HOST_SHARED", str(GPUS[gpu][1]))


@pytest.fixture
def chosen():
    """The table says "cuda" for all."""
    device = torch.device("cpu")
    before = _auto.freeze({
        (op, device, dtype, shape): "cuda" for op in _auto.SHAPES for dtype in DTYPES for shape in _auto.SHAPES[op]
    })  # fmt: skip
    yield
    _auto.restore(before)


def adapter(r, dtype, experts=1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (1, 3, 16), (experts, r, 16), (experts, 16, r)
    leaves = [(0.1 * torch.randn(shape, generator=draw)).to(dtype).requires_grad_() for shape in shapes]
    index = torch.zeros(1, dtype=torch.int64) if experts > 1 else None

    def call(backend):
        x, down, up = leaves
        return routed_adapter(x, down, None, up, None, index, index, residual=x, backend=backend)

    return call, leaves


def lora(r, dtype, groups=1, seed=0, inplace=False, gates=None, offset=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (1, 3, 16), (1 if gates is None else 2, groups * r, 16), (1 if gates is None else 2, groups * 8, r)
    leaves = [(0.1 * torch.randn(shape, generator=draw)).to(dtype).requires_grad_() for shape in shapes]
    base = torch.randn(1, 3, 8 * groups, generator=draw).to(dtype)

    def call(backend):
        return routed_lora(
            *leaves, None, None, base=base * 1 if inplace else None, groups=groups, gates=gates,
            output_offsets=tuple(range(0, 8 * groups, 8)), inplace=inplace, backend=backend,
        )  # fmt: skip

    return call, leaves


def results(case, backend):
    call, leaves = case
    out = call(backend)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


def same(case):
    got, want = results(case, "auto"), results(case, "reference")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def refused(case, words):
    runtime_calls()
    with pytest.raises(BackendUnavailableError, match=words):
        case[0]("cuda")
    assert "cudaLaunchKernelEx" not in names(runtime_calls())


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [adapter, lora])
def test_the_widest_call_runs_and_the_next_is_refused_or_the_references(gpu, dtype, make, monkeypatch, chosen):
    be(monkeypatch, gpu)
    most = GPUS[gpu][DTYPES[dtype]]
    assert _extension.routed_most(torch.device("cpu"), dtype).columns == most
    for backend in ("cuda", "auto"):
        assert all(t.isfinite().all() for t in results(make(most, dtype), backend))
    runtime_calls()
    results(make(most, dtype), "auto")
    assert "cudaLaunchKernelEx" in names(runtime_calls())
    hint = "a smaller rank needs less" + (", 16 bits half as much" if dtype == torch.float32 else "")
    refused(
        make(most + 1, dtype),
        f"r, in units of 16: got {most + 16}, expected at most {most} on 'cpu' in {dtype}.*{hint}",
    )
    runtime_calls()
    same(make(most + 1, dtype))
    assert "cudaLaunchKernelEx" not in names(runtime_calls())


def test_a_forward_that_would_fit_in_another_way_is_refused_where_its_backward_does_not(monkeypatch, chosen):
    be(monkeypatch, "V100")
    refused(adapter(512, torch.float16), "r, in units of 16: got 512, expected at most 448")
    same(adapter(512, torch.float16))


@pytest.mark.parametrize("inplace", [False, True])
def test_every_group_has_columns_of_its_own(monkeypatch, chosen, inplace):
    be(monkeypatch, "T4")
    refused(
        lora(64, torch.float32, groups=3, inplace=inplace), "groups \\* r, in units of 16.*got 192, expected at most 96"
    )
    same(lora(64, torch.float32, groups=3, inplace=inplace))
    # 96 rows of A like those before, in other groups.
    results(lora(96, torch.float32, inplace=inplace), "auto")
    runtime_calls()
    results(lora(96, torch.float32, inplace=inplace), "auto")
    assert "cudaLaunchKernelEx" in names(runtime_calls())
    same(lora(8, torch.float32, groups=12, inplace=inplace))


def test_what_nodes_in_cpp_serve_is_no_word_for_larger_calls(monkeypatch, chosen):
    be(monkeypatch, "T4")
    for backend in ("cuda", "auto"):
        for make in (adapter, lora):
            _, out = (make(32, torch.float32)[0](backend) for _ in range(2))
            assert out.grad_fn.name() in ("RoutedAdapterBackward", "RoutedLoRABackward")
    for make in (adapter, lora):
        refused(make(128, torch.float32), "r, in units of 16: got 128, expected at most 96")
        same(make(128, torch.float32))


def trained(bottleneck, backend):
    torch.manual_seed(0)
    config = AdaMixConfig(method="adapter", bottleneck=bottleneck, num_experts=2)
    model = adapt(tiny_bert(), config, backend=backend).train()
    for _ in range(2):  # the second is served by what the first found out
        torch.manual_seed(1)
        model.zero_grad()
        loss = model(**batch_for(model, 2, 5)).loss
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_a_model_of_wider_adapters_trains(monkeypatch, chosen):
    be(monkeypatch, "T4")
    trained(16, "auto")
    runtime_calls()
    got, want = trained(128, "auto"), trained(128, "reference")
    assert len(got) > 1
    assert all(map(torch.equal, got, want))
    assert "cudaLaunchKernelEx" not in names(runtime_calls())
    with pytest.raises(BackendUnavailableError, match="r, in units of 16: got 128, expected at most 96"):
        trained(128, "cuda")


def test_auto_takes_any_number_of_groups(chosen):
    same(lora(1, torch.float32, groups=65))
    refused(lora(1, torch.float32, groups=65), "groups: got 65, expected at most 64")
    gates = torch.rand(1, 3, 2)
    same(lora(1, torch.float32, groups=65, gates=gates))
    refused(lora(1, torch.float32, groups=65, gates=gates), "groups: got 65, expected at most 64")
    x, a, b = (t.detach() for t in lora(1, torch.float32, groups=65, gates=gates)[1])
    arguments = dict(top_k=1, groups=65, output_offsets=tuple(range(0, 8 * 65, 8)))
    got, want = (
        mixture_lora(x, a, b, torch.eye(2, 16), **arguments, backend=name).out for name in ("auto", "reference")
    )
    assert torch.equal(got, want)


def merge(experts, dtype=torch.float32):
    bank = torch.randn(experts, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = torch.linspace(-1, 1, experts, dtype=dtype).requires_grad_()
    return lambda backend: merge_experts(bank, scores, backend=backend), [bank, scores]


def test_banks_of_very_many_experts(monkeypatch, chosen):
    be(monkeypatch, "T4")
    assert _extension.merge_most(torch.device("cpu"), torch.float32).experts == 1820  # 36 * 1820 = 65,520 bytes
    results(merge(1820), "cuda")
    same(merge(1821))
    refused(merge(1821), "bank: M, .*got 1821, expected at most 1820")
    results(merge(910, torch.float64), "cuda")
    same(merge(911, torch.float64))
    refused(merge(911, torch.float64), "got 1822, expected at most 1820")
    same(merge(70000))
    banks, scores = [torch.ones(3, 2), torch.ones(1821, 2)], [None, torch.zeros(1821)]
    want = merge_banks(banks, scores, backend="reference")
    for _ in range(2):
        assert all(map(torch.equal, merge_banks(banks, scores), want))
        with pytest.raises(BackendUnavailableError, match="got 1821, expected at most 1820"):
            merge_banks(banks, scores, backend="cuda")


class Described:
    kept = False

    def described(self):
        return 0, [], 0, [], [], [], []


def test_plans_of_very_many_shapes_begin_anew(chosen):
    adapter(16, torch.float32)[0]("auto")
    module = _node.NODE.module
    x = torch.empty(4)
    plans = [Described() for _ in range(4096)]
    try:
        again, last = Described(), Described()
        for n, plan in enumerate(plans):
            module.keep_plan(0, (x,), (n,), plan)
            if n == 0:
                module.keep_plan(0, (x,), (n,), again)  # made anew: it serves from now on
        assert all(plan.kept for plan in plans)
        module.keep_plan(0, (x,), (4096,), last)
        assert last.kept
        assert not again.kept
        assert not any(plan.kept for plan in plans[1:])  # offered again when they serve a call
        gone = weakref.ref(plans.pop())
        del plan
        gc.collect()
        assert gone() is None
        module.keep_plan(0, (x,), (0,), plans[0])
        assert plans[0].kept
    finally:
        _node.NODE.forget()


def test_more_groups_than_columns_divide_by_nothing(chosen):
    """A unit of 16 * groups columns: of 2 ** 60 groups it is 0 in 64 bits."""
    x, a, b = torch.randn(1, 3, 16), torch.randn(1, 8, 16), torch.randn(1, 16, 8)
    routed_lora(x, a, b, None, None, backend="cuda")
    try:
        _node.NODE.forget()
        _node.NODE.module.serve(1, "cuda", x, a, None, sys.maxsize, sys.maxsize)  # as of kernels without limits
        with pytest.raises(ValueError, match="groups"):
            routed_lora(x, a, b, None, None, backend="cuda", groups=2**60)
    finally:
        _node.NODE.forget()
