"""backend="cuda" device by device: GPUs that differ, a driver that is too old, code that does not load.

The GPUs are made up: what torch and the library tell of them is replaced.
"""

from types import SimpleNamespace

import pytest
import torch
from cuda_host import run_script

import adamix_kernels
from adamix_kernels import _auto, _backends, _extension

CACHES = (
    _extension.on_host, _extension.load_problem, _extension.problem, _extension.device_problem,
    _backends._environment_problem, _backends._problem, _backends._asked, _backends._selected,
)  # fmt: skip


# As though the kernels had been verified on every GPU.
PREFERS_CUDA = _auto.Table(
    {("routed_adapter", torch.device("cuda", n), torch.float16, "narrow"): "cuda" for n in range(3)}
)


def forget():
    for cache in CACHES:
        if hasattr(cache, "cache_clear"):
            cache.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """machine((9, 0), (6, 1), ...): a process that sees these GPUs and a library built for 80 and 90+PTX."""

    def made(*capabilities, built="80;90", driver="", does_not_load=()):
        asked = []

        def device_problem(device):
            asked.append(device)
            return "its kernels do not load: no kernel image" if device in does_not_load else ""

        library = SimpleNamespace(
            build_info=lambda: built, driver_problem=lambda: driver, device_problem=device_problem
        )
        monkeypatch.setattr(_extension, "on_host", lambda: False)
        monkeypatch.setattr(_extension, "load_problem", lambda: None)
        monkeypatch.setattr(_extension, "_library", lambda: library)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
        forget()
        return asked

    yield made
    monkeypatch.undo()
    forget()


def chosen(request, device):
    return _backends.select("routed_adapter", request, torch.device(device), torch.float16).__name__.rpartition(".")[2]


def test_an_old_card_beside_a_new_one_disables_itself_alone(machine, monkeypatch):
    machine((9, 0), (6, 1))
    assert _extension.problem() is None
    assert chosen("cuda", "cuda:0") == "cuda_impl"
    with pytest.raises(
        adamix_kernels.BackendUnavailableError,
        match=r"on device 'cuda:1'.*built for 80, 90; GPU 1 is of 6\.1",
    ):
        chosen("cuda", "cuda:1")
    state = adamix_kernels.backends()["cuda"]
    assert state.usable
    assert state.reason.startswith("ready on GPU 0; ")
    assert "GPU 1 is of 6.1" in state.reason
    monkeypatch.setattr(_auto, "table", PREFERS_CUDA)
    assert chosen("auto", "cuda:0") == "cuda_impl"
    assert chosen("auto", "cuda:1") == "reference"


def test_a_machine_of_old_cards_alone_names_each(machine):
    machine((6, 1), (5, 2))
    assert "GPU 0 is of 6.1; " in _extension.problem()
    assert _extension.problem().endswith("GPU 1 is of 5.2")
    state = adamix_kernels.backends()["cuda"]
    assert not state.usable
    assert state.reason == _extension.problem()


def test_alike_cards_are_simply_ready(machine):
    machine((9, 0), (9, 0))
    assert adamix_kernels.backends()["cuda"].reason == "ready"
    assert adamix_kernels.backends()["cuda"].usable


def test_a_driver_that_is_too_old_is_told_before_any_call(machine, monkeypatch):
    machine((9, 0), driver="the driver is of CUDA 12.2, the library was compiled with CUDA 13.0: ...")
    assert "the driver is of CUDA 12.2" in _extension.problem()
    assert not adamix_kernels.backends()["cuda"].usable
    monkeypatch.setattr(_auto, "table", PREFERS_CUDA)
    assert chosen("auto", "cuda:0") == "reference"


def test_code_that_does_not_load_is_told_and_auto_falls_back(machine, monkeypatch):
    asked = machine((9, 0), (8, 0), does_not_load=(1,))
    monkeypatch.setattr(_auto, "table", PREFERS_CUDA)
    assert [chosen("auto", f"cuda:{n}") for n in (0, 1, 1)] == ["cuda_impl", "reference", "reference"]
    with pytest.raises(adamix_kernels.BackendUnavailableError, match="GPU 1: its kernels do not load"):
        chosen("cuda", "cuda:1")
    assert asked == [0, 1]  # once each


def test_backends_makes_no_context_on_other_gpus(machine):
    asked = machine((9, 0), (9, 0), (9, 0))
    adamix_kernels.backends()
    assert asked == [0]


def test_selection_looks_at_the_device_of_the_tensors(machine):
    """Traced with fake tensors of a second GPU, the op asks for that one."""
    machine((9, 0), (6, 1))
    with torch._subclasses.FakeTensorMode(), torch.device("cuda:1"):
        x, down, up = torch.ones(2, 3, 4), torch.ones(1, 2, 4), torch.ones(1, 4, 2)
        with pytest.raises(adamix_kernels.BackendUnavailableError, match=r"'cuda:1'.*GPU 1 is of 6\.1"):
            adamix_kernels.routed_adapter(x, down, None, up, None, None, None, backend="cuda")


PROBLEM = "from adamix_kernels import _extension as e, backends; print(e.problem(), backends()['cuda'].usable)"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (
            "ADAMIX_HOST_DRIVER", "12020",
            "the driver is of CUDA 12.2, the library was compiled with CUDA 13.0: a newer driver is needed, or a "
            "library built with nvcc 12 False",
        ),
        ("ADAMIX_HOST_DRIVER", "0", "there is no NVIDIA driver False"),
        ("ADAMIX_HOST_DRIVER", "13010", "None True"),
        ("ADAMIX_HOST_LOADS", "0", "its kernels do not load: no kernel image is available for execution on the device"),
    ],
)  # fmt: skip
def test_what_the_library_asks_the_driver(variable, value, words, monkeypatch):
    monkeypatch.setenv(variable, value)
    status, text = run_script(PROBLEM)
    assert status == 0, text
    assert words in text


def test_the_library_answers_while_tracing():
    """The answer is of the real library, where every other op gives fake results."""
    status, text = run_script(
        "import torch; from adamix_kernels import _extension as e\n"
        "with torch._subclasses.FakeTensorMode(): print(e.problem(), e.device_problem(0))"
    )
    assert (status, text.splitlines()[-1:]) == (0, ["None None"]), text
