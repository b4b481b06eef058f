"""No op on the Triton backend waits for the GPU or reads a value: seen on the CPU, captured on a GPU."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import functools
import sys

import pytest
import torch
import triton_spy
from triton_spy import DEVICE, GPU, needs_triton

needs_triton()

from adapter_cases import draw_adapter
from cuda_probes import captured_graph
from plain_lora import draw_lora
from sync_spy import SyncSpy

import adamix_kernels.ops.consistency.grad_op as loss_grad_op
import adamix_kernels.ops.consistency.op as loss_op
import adamix_kernels.ops.routed_adapter.op as adapter_op
import adamix_kernels.ops.routed_lora.op as lora_op
from adamix_kernels import _backends, _triton_utils
from adamix_kernels import functional as F
from adamix_kernels.ops.consistency._arguments import as_num_items
from adamix_kernels.ops.merge import triton_impl as merge_impl
from adamix_kernels.ops.merge.api import merge_banks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def randn(*shape):
    return torch.randn(*shape, device=DEVICE).requires_grad_()


def with_gradients(run, *leaves):
    def both():
        out = run()
        out = out if isinstance(out, torch.Tensor) else out[0]
        return (out.detach(), *torch.autograd.grad(out.sum(), leaves))

    return both


def adapter(kinds, tokens=9, rank=4):
    (x, *banks, _), indices = draw_adapter(DEVICE, torch.float32, 3, tokens, 20, rank, 3, 2, *kinds)
    leaves = [t.requires_grad_() for t in (x, *banks)]
    return with_gradients(lambda: F.routed_adapter(*leaves, *indices, residual=leaves[0], backend="triton"), *leaves)


def lora(tokens=7, rank=2, **more):
    (x, a, b, base, _), options = draw_lora(
        DEVICE, "sample", "token", groups=2, dtype=torch.float32, tokens=tokens, rank=rank
    )
    leaves = [t.requires_grad_() for t in (x, a, b)]
    run = functools.partial(F.routed_lora, *leaves, **options, **more, backend="triton")
    return with_gradients(lambda: run(base=base * 1), *leaves)


def logits(classes):
    return randn(6, 5, classes), torch.randint(classes, (3, 5), device=DEVICE), torch.rand(3, 5, device=DEVICE) < 0.7


def adamix(classes=11, items=None, **options):
    x, labels, mask = logits(classes)
    items = torch.tensor(4, device=DEVICE) if items == "tensor" else items
    run = functools.partial(F.adamix_loss, x, labels, mask=mask, num_items=items, **options, backend="triton")
    return with_gradients(run, x)


def consistency(reduction):
    x, y, mask = randn(3, 5, 11), randn(3, 5, 11), logits(11)[2]
    return with_gradients(lambda: F.consistency_loss(x, y, mask=mask, reduction=reduction, backend="triton"), x, y)


def linear():
    hidden, weight, bias = randn(6, 5, 8), randn(13, 8), randn(13)
    _, labels, mask = logits(13)
    run = functools.partial(F.linear_adamix_loss, hidden, weight, labels, bias=bias, mask=mask, backend="triton")
    return with_gradients(run, hidden, weight, bias)


def experts(scores):
    bank, given = randn(3, 4, 5), randn(3) if scores else None
    leaves = [bank] if given is None else [bank, given]
    return with_gradients(lambda: F.merge_experts(bank, given, backend="triton"), *leaves)


def factors():
    weight, a, b = randn(12, 10), randn(3, 4, 10), randn(3, 8, 2)
    options = dict(scaling=0.5, groups=2, output_offsets=(0, 8), backend="triton")
    return with_gradients(lambda: F.merge_lora(weight, a, b, **options), weight, a, b)


def banks():
    many, scores = [torch.randn(3, 4, 5, device=DEVICE) for _ in range(5)], [None] * 4
    scores.append(torch.randn(3, device=DEVICE))
    return lambda: tuple(merge_banks(many, scores, backend="triton"))


CASES = {
    "adapter, samples": lambda: adapter(("sample", "sample"), 17),
    "adapter, tokens": lambda: adapter(("token", "token")),
    "adapter, rows sorted": lambda: adapter(("token", "sample"), 9, 70),
    "lora": lora,
    "lora, dropout": lambda: lora(dropout_p=0.3, seed=torch.tensor(5, device=DEVICE)),
    "lora, a number as seed": lambda: lora(dropout_p=0.3, seed=5),
    "lora, rows sorted": lambda: lora(31, 70),
    "lora, in place": lambda: lora(inplace=True),
    "adamix_loss": adamix,
    "adamix_loss, items": lambda: adamix(items=7),
    "adamix_loss, a tensor of items": lambda: adamix(items="tensor", label_smoothing=0.1),
    "adamix_loss, full": lambda: adamix(classes=4099, detach_target=False),
    "consistency_loss": lambda: consistency("batchmean"),
    "consistency_loss, none": lambda: consistency("none"),
    "linear_adamix_loss": linear,
    "merge_experts": lambda: experts(False),
    "merge_experts, scores": lambda: experts(True),
    "merge_lora": factors,
    "merge_banks": banks,
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Without the checks of values that the CPU alone makes unasked."""
    monkeypatch.setattr(adapter_op, "check_index_values", lambda *_: None)
    monkeypatch.setattr(lora_op, "check_index_values", lambda *_: None)
    monkeypatch.setattr(loss_op, "_check_labels", lambda *_: None)
    monkeypatch.setattr(loss_grad_op, "_check_labels", lambda *_: None)


@pytest.fixture
def nothing_launched(monkeypatch):
    """Every launch (kernel, args, meta) only noted: the interpreter's own calls are not the op's."""
    noted = []
    for op in _backends.OPS:
        name = _backends._load(op, "triton").__name__
        for module in [m for n, m in sys.modules.items() if n == name or n.startswith(f"{name}.")]:
            if hasattr(module, "launch"):
                monkeypatch.setattr(module, "launch", lambda kernel, _, __, *a, **k: noted.append((kernel, a, k)))
    return noted


@pytest.mark.skipif(GPU, reason="a GPU captures graphs instead")
@pytest.mark.parametrize("name", CASES)
def test_it_launches_and_waits_for_nothing(name, as_on_a_gpu, nothing_launched):
    run = CASES[name]()
    run()
    assert nothing_launched
    with SyncSpy() as spy:
        run()
    assert spy.seen
    assert spy.found == []


# The same shapes, and numbers that Triton's JIT could take for special: 1, multiples of 16, 0 as dropout's bound.
OTHER_NUMBERS = {
    "lora, dropout": [lambda: lora(dropout_p=0.5, seed=torch.tensor(16, device=DEVICE))],
    "lora, a number as seed": [lambda: lora(dropout_p=0.3, seed=16), lambda: lora(dropout_p=0.5, seed=1)],
    "adamix_loss, items": [lambda: adamix(items=16), lambda: adamix(items=1)],
    "adamix_loss, a tensor of items": [lambda: adamix(items="tensor", label_smoothing=0.5)],
}


@pytest.mark.skipif(triton_spy.specialised is None, reason="needs compiled kernels on a CPU: pytest -p ptx.plugin")
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_second_call_compiles_nothing(nothing_launched):
    """What a graph captures was compiled by the call before it, whatever the values of either."""
    for name, case in CASES.items():
        kinds = []
        for one in [case, case, *OTHER_NUMBERS.get(name, [])]:
            nothing_launched.clear()
            one()()
            kinds.append({triton_spy.specialised(*launch) for launch in nothing_launched})
        assert kinds[0], name
        assert all(later <= kinds[0] for later in kinds[1:]), name


@pytest.mark.skipif(not GPU, reason="CUDA graphs are the GPU's")
@pytest.mark.parametrize("name", CASES)
def test_a_graph_captures_it(name):
    run = CASES[name]()
    want = [t.clone() for t in run()]
    captured, graph = captured_graph(run)
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


class _OnAGpu:
    """A table of banks on its way to a GPU: what is asked of it, in order."""

    def __init__(self, log):
        self.log = log

    def pin_memory(self):
        self.log.append("pinned")
        return self

    def to(self, device, non_blocking=False):
        self.log.append((str(device), non_blocking))
        return self


@pytest.mark.parametrize("capturing", [True, False])
def test_the_table_of_banks_goes_over_without_waiting(capturing, monkeypatch):
    log, kept = [], []
    monkeypatch.setattr(merge_impl, "_CAPTURED", kept)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: _OnAGpu(log).pin_memory())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    merge_impl._table([(1, 2), (3, 4)], torch.device("cuda", 1))
    assert log == ["pinned", ("cuda:1", True)]
    # A captured copy reads the host's memory at every replay.
    assert len(kept) == capturing
    table = merge_impl._table([(1, 2), (3, 4), (5, 6)], torch.device("cpu"))
    assert table.tolist() == [[1, 3, 5], [2, 4, 6]]


def test_a_number_of_items_on_the_cpu_is_read_there(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: moved.append(a))
    like = torch.empty(2, device="meta")
    made = as_num_items(torch.tensor(7), like)
    assert (made.device.type, made.dtype, made.shape, moved) == ("meta", torch.int64, (), [])


def test_every_gpu_is_asked_for_itself(monkeypatch):
    monkeypatch.setattr(_triton_utils, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 0), (9, 0)][device.index or 0])
    assert "GPU 0 has 7.0" in _triton_utils.device_problem(torch.device("cuda", 0))
    assert "the current GPU has 7.0" in _triton_utils.device_problem(torch.device("cuda"))
    assert _triton_utils.device_problem(torch.device("cuda", 1)) is None
    assert _backends._device_problem("triton", torch.device("cuda", 1)) is None
    assert "below compute capability 8.0" in _backends._device_problem("triton", torch.device("cuda", 0))
