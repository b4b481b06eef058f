"""No op on the Triton backend waits for the GPU or reads a value: seen on the CPU, captured on a GPU."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import sys
import weakref

import pytest
import torch
import triton_spy
from triton_spy import DEVICE, GPU, needs_triton

needs_triton()

from capture_cases import Calls, as_on_a_gpu, check_graph
from sync_spy import SyncSpy

from adamix_kernels import _backends, _triton_utils
from adamix_kernels.ops import _direct, _triton_plans
from adamix_kernels.ops.consistency._arguments import as_num_items
from adamix_kernels.ops.merge import triton_impl as merge_impl
from adamix_kernels.ops.merge._results import Results

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CALLS = Calls("triton", DEVICE)
CASES = CALLS.cases() | {
    "adapter, samples": lambda: CALLS.adapter(("sample", "sample"), 17),
    "adapter, rows sorted": lambda: CALLS.adapter(("token", "sample"), 9, 70),
    "lora, rows sorted": lambda: CALLS.lora(31, 70),
    "adamix_loss, full": lambda: CALLS.adamix(classes=4099, detach_target=False),
}


@pytest.fixture
def nothing_launched(monkeypatch):
    """Every launch (kernel, args, meta) only noted: the interpreter's own calls are not the op's."""
    noted = []
    monkeypatch.setattr(_direct, "_switched_off", 1)
    for op in _backends.OPS:
        name = _backends._load(op, "triton").__name__
        for module in [m for n, m in sys.modules.items() if n == name or n.startswith(f"{name}.")]:
            if hasattr(module, "launch"):
                monkeypatch.setattr(module, "launch", lambda kernel, _, __, *a, **k: noted.append((kernel, a, k)))
    return noted


@pytest.mark.skipif(GPU, reason="a GPU captures graphs instead")
@pytest.mark.parametrize("name", CASES)
def test_it_launches_and_waits_for_nothing(name, monkeypatch, nothing_launched):
    as_on_a_gpu(monkeypatch)
    run = CASES[name]()
    run()
    assert nothing_launched
    with SyncSpy() as spy:
        run()
    assert spy.seen
    assert spy.found == []


# The same shapes, and numbers that Triton's JIT could take for special: 1, multiples of 16, 0 as dropout's bound.
OTHER_NUMBERS = {
    "lora, dropout": [lambda: CALLS.lora(dropout_p=0.5, seed=torch.tensor(16, device=DEVICE))],
    "lora, a number as seed": [lambda: CALLS.lora(dropout_p=0.3, seed=16), lambda: CALLS.lora(dropout_p=0.5, seed=1)],
    "adamix_loss, items": [lambda: CALLS.adamix(items=16), lambda: CALLS.adamix(items=1)],
    "adamix_loss, a tensor of items": [lambda: CALLS.adamix(items="tensor", label_smoothing=0.5)],
}


@pytest.mark.skipif(triton_spy.specialised is None, reason="needs compiled kernels on a CPU: pytest -p ptx.plugin")
def test_a_second_call_compiles_nothing(monkeypatch, nothing_launched):
    """What a graph captures was compiled by the call before it, whatever the values of either."""
    as_on_a_gpu(monkeypatch)
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
    check_graph(CASES[name]())


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


@pytest.mark.parametrize("capturing", [True, False])
def test_no_pinned_memory_while_a_graph_is_captured(capturing, monkeypatch):
    """An older torch asks for events then, which the capture forbids."""

    def forbidden(_table):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.Tensor, "pin_memory", forbidden)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    words = "expected a call with the same banks before the capture" if capturing else "operation not permitted"
    with pytest.raises(RuntimeError, match=words):
        merge_impl._table([(1, 2)], torch.device("cuda", 0))


def test_a_plan_of_banks_is_kept_for_its_addresses_and_its_stream(monkeypatch, nothing_launched):
    """A graph keeps the table it reads; a table sent while a graph is captured holds nothing before the replay."""
    banks, state, kept = [torch.randn(2, 8), torch.randn(2, 8)], {"stream": 5, "capturing": False}, []
    monkeypatch.setattr(merge_impl, "_CAPTURED", kept)
    monkeypatch.setattr(merge_impl, "_stream", lambda device: (state["stream"], state["capturing"]))
    results = Results([bank.shape[1:] for bank in banks], torch.float32, banks[0].device)

    def table(banks=banks, results=results):
        merge_impl.banks_forward(banks, [None, None], results)
        return nothing_launched[-1][1][0]

    first = table()
    assert table() is first
    assert table([banks[0], torch.randn(2, 8)]) is not first
    turned = Results([bank.shape[1:] for bank in banks], torch.float32, banks[0].device)
    assert len({id(table([banks[0], torch.randn(8, 2).t()], turned)) for _ in range(2)}) == 2
    assert not any(isinstance(plan, merge_impl._BanksPlan) for plan in turned.plans.values())
    state["stream"] = 6
    assert table() is not first
    state["stream"], state["capturing"] = 5, True
    assert table() is first
    assert kept == [first]
    state["stream"] = 7
    captured = table()
    assert captured is first  # of a call before the capture, as torch.cuda.graph's own stream is always another
    assert kept == [first, captured]
    others = [banks[0], torch.randn(2, 8)]
    captured = table(others)
    assert kept[2:] == [captured]
    state["capturing"] = False
    assert table(others) is not captured
    assert table() is not first
    for stream in range(20):
        state["stream"] = stream
        table()
    assert len(results.plans) <= merge_impl.MAX_PLANS


def test_a_plan_of_banks_has_its_addresses_before_another_thread_launches_it(monkeypatch, nothing_launched):
    banks, seen = [torch.randn(2, 8), torch.randn(2, 8)], []
    results = Results([bank.shape[1:] for bank in banks], torch.float32, banks[0].device)

    def ready(*_, **__):
        seen.extend(plan.places for plan in results.plans.values() if isinstance(plan, merge_impl._BanksPlan))

    monkeypatch.setattr(merge_impl, "LAUNCHER_IS_KNOWN", True)
    monkeypatch.setattr(merge_impl, "ready", ready)
    merge_impl.banks_forward(banks, [None, None], results)
    ((table, bank, _),) = seen
    assert table
    assert bank == banks[0].data_ptr()


class _Remembers:
    """A tensor that knows the memory it was asked for."""

    def __init__(self):
        self.made = []

    def data_ptr(self):
        return 16

    def new_empty(self, shape, dtype=torch.float32):
        made = torch.empty(shape, dtype=dtype)
        self.made.append(weakref.ref(made))
        return made


def test_what_lies_between_two_launches_is_nobody_elses(monkeypatch):
    """A GPU's memory that is free goes to the next who asks, on another thread between two launches, too."""
    monkeypatch.setattr(_triton_plans, "current_stream", lambda device: 5)
    like, held = _Remembers(), []

    def launch(stream, *values):
        held.append([one() is not None for one in like.made])

    plan = _triton_plans.Plan(0, [(-1, (4,), torch.float32)], 8, [0, 16], [], 4, [0], [(launch, [0, 2, 3])] * 2, True)
    assert plan(like) is not None
    assert held == [[True, True]] * 2


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
