"""backend="auto" proves kernels before it uses them: the whole path on stand-ins for a GPU, and every kind of fault."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import verify_stand_ins
from verify_stand_ins import FAULTS, PLAIN

import adamix_kernels
from adamix_kernels import _auto, _backends, verifying
from adamix_kernels.ops import _direct
from adamix_kernels.verifying import prover, table, verdicts
from adamix_kernels.verifying.machine import Job, jobs
from adamix_kernels.verifying.verdicts import Store

HERE = Path(__file__).parent
ADAPTER = Job("routed_adapter", "triton", "float32", "narrow")


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """A cache folder, a table and warnings of the test's own; the child finds the stand-ins."""
    monkeypatch.setenv("ADAMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADAMIX_AUTO", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
    monkeypatch.setattr(verifying, "_told", set())
    monkeypatch.setattr(verdicts, "_warned", set())
    before = _auto.freeze({})
    yield
    _auto.restore(before)


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def faults(monkeypatch):
    """faults({"op backend dtype shape": name}) for the processes that verify."""
    return lambda given: monkeypatch.setenv(FAULTS, json.dumps(given))


@pytest.fixture
def no_child(monkeypatch):
    """A test in which no process may be started."""
    monkeypatch.setattr(prover.Child, "__enter__", lambda self: pytest.fail("a process was started"))


@pytest.fixture
def calls(monkeypatch):
    """backend="triton" and "cuda" in this process: the reference, each call of which is noted."""
    noted = []
    load = _backends._load
    modules = {}

    def loaded(op, backend):
        if backend == "reference":
            return load(op, backend)
        return modules.setdefault((op, backend), verify_stand_ins.disguised(op, backend, {}, noted))

    monkeypatch.setattr(_backends, "_load", loaded)
    monkeypatch.setattr(_backends, "_problem", lambda op, backend, device, dtype: None)
    _backends._asked.cache_clear()
    _backends._selected.cache_clear()
    yield noted
    _backends._asked.cache_clear()
    _backends._selected.cache_clear()


def adapter(experts=3, r=16, dtype=torch.float32):
    x = torch.randn(2, 3, 32, dtype=dtype)
    down, up = torch.randn(experts, r, 32, dtype=dtype), torch.randn(1, 32, r, dtype=dtype)
    return adamix_kernels.routed_adapter(x, down, None, up, None, torch.tensor([0, 1]), None)


def right(job=ADAPTER, **changes):
    return replace(verdicts.verdict(job, PLAIN, verdicts.RIGHT, cases=3), **changes)


# One kernel of each fault, in dtypes and classes of their own, beside kernels that are right.
FAULTY = {
    "routed_adapter triton float32 narrow": ("factor", "wrong", "errs|factor"),
    "routed_adapter triton bfloat16 narrow": ("factor", "wrong", "errs|factor"),
    "routed_adapter triton float16 narrow": ("tail", "wrong", "tails, tokens, misaligned: result 0"),
    "routed_adapter triton float32 wide": ("random", "wrong", "gave other bits when called again"),
    "routed_adapter cuda float32 narrow": ("beyond", "wrong", "wrote behind the end of a tensor float32"),
    "routed_adapter cuda float16 narrow": ("unwritten", "wrong", "are not finite"),
    "routed_lora triton float32 narrow": ("raises", "crashed", "RuntimeError: no kernel image is available"),
    "routed_lora triton float16 narrow": ("segfaults", "crashed", "samples: was ended by SIGSEGV"),
    "routed_lora triton float32 wide": ("hangs", "crashed", "tokens: gave no answer within 1 s"),
    "routed_lora cuda float32 narrow": ("row", "wrong", "one row"),
    "merge triton float32 any": ("overwrites", "wrong", "changed its argument 0"),
    "routed_adapter cuda bfloat16 narrow": (None, "right", ""),
    "routed_lora cuda bfloat16 narrow": (None, "right", ""),
    "merge cuda float32 any": (None, "right", ""),
    "consistency triton float32 few": (None, "right", ""),
}


def test_every_fault_is_found_and_kept_and_the_reference_is_taken(store, faults, calls, recwarn):
    faults({job: fault for job, (fault, _, _) in FAULTY.items() if fault})
    wanted = [Job(*words.split()) for words in FAULTY]
    report = verifying.settle([(PLAIN, wanted)], seconds=120, one_case=1, store=store)
    found = {" ".join(verdict.job): verdict for verdict in report.verdicts}
    for words, (_, state, why) in FAULTY.items():
        assert found[words].state == state, found[words]
        assert any(part in found[words].why for part in why.split("|")), found[words]
        assert store.read(Job(*words.split()), PLAIN) == found[words]
    told = [str(w.message) for w in recwarn if w.category is RuntimeWarning and "are not used" in str(w.message)]
    assert len(told) == 1
    assert "11 kernels are not used" in told[0]

    # The reference where the preferred kernel is wrong and no other is right; a right one of the second choice else.
    auto = {key[1:]: backend for key, backend in report.chosen.items()}
    assert auto["routed_adapter", "float32", "narrow"] == "reference"
    assert auto["routed_lora", "float32", "wide"] == "reference"
    assert auto["routed_adapter", "bfloat16", "narrow"] == "cuda"
    assert auto["consistency", "float32", "few"] == "triton"
    adapter()
    assert calls == []
    adapter(dtype=torch.bfloat16)
    assert calls == [("routed_adapter", "cuda")]


def test_the_right_kernel_is_chosen_and_runs_and_a_later_process_starts_none(store, calls, monkeypatch):
    needs = [("routed_adapter", torch.float32, 48), ("merge", torch.float32, 0)]
    report = verifying.verify_on(PLAIN, needs)
    assert {v.state for v in report.verdicts} == {"right"}
    # By the table: for an A100 in float32 the CUDA kernels alone have counts of adapters.
    assert {v.job.backend for v in report.verdicts if v.op == "routed_adapter"} == {"cuda"}
    adapter()
    assert calls == [("routed_adapter", "cuda")]
    adapter(r=200)  # wide: nobody asked for it
    assert len(calls) == 1
    assert verifying.verify_on(PLAIN, needs) is None
    # Another process: the same from the store.
    _auto.restore(_auto.Table({}))
    monkeypatch.setattr(prover.Child, "__enter__", lambda self: pytest.fail("a process was started"))
    assert verifying.verify_on(PLAIN, needs).chosen == report.chosen
    adapter()
    assert len(calls) == 2


def test_a_changed_table_is_asked_at_once_whatever_was_kept(calls):
    key = "routed_adapter", torch.device("cpu"), torch.float32, "narrow"
    for turn, backend in enumerate(["triton", "cuda", "reference", "cuda"]):
        _auto.freeze({key: backend})
        with contextlib.nullcontext() if turn % 2 else _direct.switched_off():
            for _ in range(2):
                adapter()
        expected = [] if backend == "reference" else [("routed_adapter", backend)] * 2
        assert calls == expected
        calls.clear()


def test_direct_calls_ask_the_table_too(calls, monkeypatch):
    """The table of served backends keeps an answer beside the table it came from."""
    served = []
    for backend in ("triton", "cuda"):
        module = _backends._load("routed_adapter", backend)
        module.direct = type("Direct", (), {
            "find": lambda self, *a, name=backend: served.append(name), "make": lambda self, *a: None,
        })()  # fmt: skip
    for backend in ("triton", "cuda", "triton"):
        _auto.freeze({("routed_adapter", torch.device("cpu"), torch.float32, "narrow"): backend})
        adapter()
        assert served[-1] == backend


@pytest.mark.parametrize("request_", ["reference", "triton", "cuda"])
def test_an_explicit_request_asks_no_table(calls, request_):
    _auto.freeze({("merge", torch.device("cpu"), torch.float32, "any"): "cuda"})
    adamix_kernels.merge_experts(torch.ones(2, 3), backend=request_)
    assert calls == ([] if request_ == "reference" else [("merge", request_)])


def test_the_classes_of_shapes_are_those_of_the_sizes():
    assert [_auto.shape_class("routed_lora", n) for n in (1, 256, 257)] == ["narrow", "narrow", "wide"]
    assert [_auto.shape_class("consistency", n) for n in (2, 4096, 4097)] == ["few", "few", "many"]
    assert _auto.shape_class("merge", 10**9) == "any"


# The store


def test_a_verdict_is_found_again_and_a_time_that_went_back_changes_nothing(store):
    verdict = right(when="2199-01-01T00:00:00+00:00")
    store.write(verdict, PLAIN)
    assert store.read(ADAPTER, PLAIN) == verdict


@pytest.mark.parametrize("field", ["name", "capability", "processors", "driver"])
def test_another_gpu_or_driver_knows_nothing(store, field):
    store.write(right(), PLAIN)
    value = getattr(PLAIN, field)
    assert store.read(ADAPTER, replace(PLAIN, **{field: value + 1 if isinstance(value, int) else value + "x"})) is None
    assert store.read(ADAPTER, replace(PLAIN, device="cuda:7")) == store.read(ADAPTER, PLAIN)


@pytest.mark.parametrize("field", ["op", "backend", "dtype", "shape"])
def test_another_job_knows_nothing(store, field):
    store.write(right(), PLAIN)
    assert store.read(ADAPTER._replace(**{field: "other"}), PLAIN) is None


def test_other_versions_and_changed_sources_know_nothing(store, monkeypatch, tmp_path):
    from adamix_kernels.verifying import machine

    store.write(right(), PLAIN)
    for change in (
        lambda m: m.setattr(torch, "__version__", "9.9"),
        lambda m: m.setattr(torch.version, "cuda", "99.0"),
        lambda m: m.setattr(machine, "__version__", "9.9"),
        lambda m: m.setattr(machine, "_version", lambda package: "9.9"),
        lambda m: m.setattr(machine, "sources", lambda op, backend: "another hash"),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            assert store.read(ADAPTER, PLAIN) is None
    assert store.read(ADAPTER, PLAIN) is not None


def test_the_hash_of_the_sources_sees_sources_library_and_measured_tables(monkeypatch, tmp_path):
    from adamix_kernels.verifying import machine

    library, measured = tmp_path / "lib.so", tmp_path / "table.json"
    library.write_bytes(b"1")
    measured.write_text("1")
    hashed = lambda *given: machine._sources.__wrapped__(*given)  # noqa: E731
    first = hashed("merge", "cuda", library, None), hashed("merge", "triton", None, str(measured))
    library.write_bytes(b"2")
    measured.write_text("2")
    assert hashed("merge", "cuda", library, None) != first[0]
    assert hashed("merge", "triton", None, str(measured)) != first[1]
    assert hashed("merge", "triton", None, None) != hashed("routed_lora", "triton", None, None)
    # A file of the op, changed.
    copy = tmp_path / "adamix_kernels"
    for name in ("ops/merge/reference.py", "ops/_direct.py", "_triton_utils.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("1")
    monkeypatch.setattr(machine, "_PACKAGE", copy)
    for name in ("ops/merge/reference.py", "ops/_direct.py", "_triton_utils.py"):
        before = hashed("merge", "triton", None, None)
        (copy / name).write_text("2")
        assert hashed("merge", "triton", None, None) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text('{"half'),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2})),
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"key": {"op": "merge"}})),
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict": {"state": "right"}})),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_damaged_and_foreign_files_cost_one_warning(store, damage):
    store.write(right(), PLAIN)
    damage(store.path(PLAIN.key(ADAPTER)))
    with pytest.warns(RuntimeWarning, match="the verdict kept there is not used") as told:
        assert store.read(ADAPTER, PLAIN) is None
        assert store.read(ADAPTER, PLAIN) is None
    assert len(told) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_folder_costs_one_warning_and_no_verdict(store, monkeypatch, code):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(verdicts.os, "fsync", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be kept there") as told:
        store.write(right(), PLAIN)
        store.write(right(), PLAIN)
    assert len(told) == 1
    assert [path for path in store.folder.iterdir() if path.name != "lock"] == []  # nothing half written stays
    assert store.read(ADAPTER, PLAIN) is None


def test_a_folder_that_cannot_be_made_is_worked_without(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    with pytest.warns(RuntimeWarning, match="cannot be kept there"):
        assert prover.prove([ADAPTER], PLAIN, store, seconds=60)[ADAPTER].state == "right"


def _hold(folder, held, release):
    with Store(Path(folder)).lock(time.monotonic() + 10) as mine:
        held.put(mine)
        release.wait(20)


def test_two_processes_verify_once(store, no_child):
    """Who waited looks again, and finds what the other has kept."""
    context = multiprocessing.get_context("fork")
    held, release = context.Queue(), context.Event()
    other = context.Process(target=_hold, args=(store.folder.parent, held, release))
    other.start()
    assert held.get(timeout=20) is True
    threading.Timer(0.3, lambda: (store.write(right(), PLAIN), release.set())).start()
    found = prover.prove([ADAPTER], PLAIN, store, seconds=20)
    other.join()
    assert found[ADAPTER].state == "right"


def test_who_never_gets_the_lock_knows_nothing_and_does_not_hang(store, no_child):
    context = multiprocessing.get_context("fork")
    held, release = context.Queue(), context.Event()
    other = context.Process(target=_hold, args=(store.folder.parent, held, release))
    other.start()
    held.get(timeout=20)
    began = time.monotonic()
    found = prover.prove([ADAPTER], PLAIN, store, seconds=0.3)
    release.set()
    other.join()
    assert found[ADAPTER].state == "unknown"
    assert "another process has been verifying" in found[ADAPTER].why
    assert time.monotonic() - began < 10


KILLED = """
import sys
sys.path.insert(0, {here!r})
import verify_stand_ins
from adamix_kernels.verifying import prover, verdicts
from adamix_kernels.verifying.machine import Job
wanted = [Job("merge", "triton", "float32", "any"), Job("routed_lora", "triton", "float32", "wide")]
prover.prove(wanted, verify_stand_ins.PLAIN, verdicts.Store(), seconds=60, one_case=60,
             progress=lambda done, total, words: print(done, words, flush=True))
"""


def test_killed_while_verifying_keeps_what_was_done_frees_the_lock_and_leaves_no_process(store, faults):
    faults({"routed_lora triton float32 wide": "hangs"})
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(here=str(HERE))], stdout=subprocess.PIPE, text=True)
    children = []
    for line in process.stdout:
        if line.startswith("1 routed_lora"):
            children = _children(process.pid)
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert children
    done, left = Job("merge", "triton", "float32", "any"), Job("routed_lora", "triton", "float32", "wide")
    assert store.read(done, PLAIN).state == "right"
    assert store.read(left, PLAIN) is None
    with store.lock(time.monotonic() + 5) as mine:
        assert mine
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


# What stops it


def test_time_that_ran_out_is_unknown_and_not_kept(store):
    found = prover.prove([ADAPTER], PLAIN, store, seconds=0.01)
    assert (found[ADAPTER].state, found[ADAPTER].why) == ("unknown", "time ran out before it")
    assert store.read(ADAPTER, PLAIN) is None


def test_a_child_that_cannot_start_is_no_verdict(store):
    found = prover.prove([ADAPTER], replace(PLAIN, setup="no_such_module:setup"), store, seconds=60)
    assert found[ADAPTER].state == "unknown"
    assert "ended with status 1: ModuleNotFoundError" in found[ADAPTER].why


@pytest.mark.parametrize("how", ["off", "table"])
def test_modes_that_start_no_process(store, monkeypatch, no_child, calls, how):
    monkeypatch.setenv("ADAMIX_AUTO", how)
    store.write(right(ADAPTER._replace(backend="cuda")), PLAIN)
    report = verifying.settle([(PLAIN, jobs(("routed_adapter",), ("float32",)))], seconds=9, store=store)
    expected = "cuda" if how == "table" else "reference"
    assert report.chosen[PLAIN.name, "routed_adapter", "float32", "narrow"] == expected
    assert report.chosen[PLAIN.name, "routed_adapter", "float32", "wide"] == "reference"


def test_a_wrong_word_in_the_variable_is_named(monkeypatch):
    monkeypatch.setenv("ADAMIX_AUTO", "fast")
    with pytest.raises(ValueError, match="ADAMIX_AUTO: got 'fast', expected one of off, table, verify, time"):
        verifying.verify()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ops": ["matmul"]}, "ops: got 'matmul', expected some of 'routed_adapter'"),
        ({"backends": ["reference"]}, "backends: got 'reference', expected some of 'triton', 'cuda'"),
        ({"dtypes": [torch.float64]}, "dtypes: got float64, expected some of float16"),
    ],
)
def test_wrong_arguments_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        verifying.verify(**given)


def test_nothing_is_verified_while_something_traces_or_in_a_forked_process(no_child, monkeypatch):
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError, match="is tracing"):
        verifying.verify()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
        verifying.verify()
    assert verifying.verify_for(torch.device("cuda", 0), [("merge", torch.float32, 0)]) is None
    monkeypatch.undo()
    reader, writer = os.pipe()
    if not os.fork():
        try:
            verifying.verify()
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        assert "was forked" in answer.read()
    os.wait()


def test_calls_read_nothing_and_start_nothing(no_child, monkeypatch):
    monkeypatch.setattr(Store, "read_record", lambda self, key: pytest.fail("the disk was read"))
    adapter()
    compiled = torch.compile(lambda x: adamix_kernels.merge_experts(x), backend="eager", fullgraph=True)
    compiled(torch.ones(3, 4))


def test_no_gpu_is_said(no_child):
    assert verifying.verify().problem == "torch sees no GPU"
    assert verifying.verify_for(torch.device("cpu"), [("merge", torch.float32, 0)]) is None


# What is preferred


def test_the_committed_preferences_are_what_the_records_give():
    from benchmarks import prefer

    assert table.FILE.read_text() == prefer.text(), "python -m benchmarks.prefer --write"


def test_preferences_hold_from_a_capability_up():
    assert table.preferred(75, "merge", "float32", "any") == table.preferred(70, "merge", "float32", "any")
    assert table.preferred(90, "merge", "float32", "any").order[-1] == "reference"
    assert table.preferred(61, "merge", "float32", "any").order == ("reference",)
    assert "H100" in table.preferred(90, "consistency", "bfloat16", "many").source


def test_measured_times_go_before_counts_and_may_put_the_reference_first():
    from benchmarks import prefer

    counts = {("merge", "float32", "any", 80): {"triton": {"a": 0.9, "b": 0.2}, "cuda": {"a": 0.8}}}
    row = prefer._row(counts, {}, "merge", "float32", "any", 80)
    assert row["order"] == ["triton", "cuda", "reference"]
    times = {("merge", "float32", "any", 80): {"triton": {"a": 3.0}, "cuda": {"a": 5.0}, "reference": {"a": 4.0}}}
    row = prefer._row(counts, times, "merge", "float32", "any", 80)
    assert row == {"order": ["cuda", "reference"], "source": "times on the A100"}


def test_timing_changes_the_choice_only_beyond_its_noise():
    from adamix_kernels.verifying.timing import Time, fastest

    calm = {"triton": Time(1.0, 0.01), "cuda": Time(0.9, 0.01)}
    assert fastest("triton", calm) == "cuda"
    assert fastest("triton", {**calm, "cuda": Time(0.96, 0.001)}) == "triton"  # by less than 5%
    assert fastest("triton", {**calm, "cuda": Time(0.9, 0.04)}) == "triton"  # within three spreads
    assert fastest("cuda", calm) == "cuda"
    assert fastest("reference", {**calm, "reference": Time(3.0, 0.1)}) == "cuda"


def test_timing_is_taken_once_and_the_faster_one_is_chosen(store, monkeypatch):
    monkeypatch.setenv("ADAMIX_AUTO", "time")
    wanted = jobs(("merge",), ("float32",))
    report = verifying.settle([(PLAIN, wanted)], seconds=60, store=store)
    contest = Job("merge", "cuda+triton+reference", "float32", "any")
    times = store.read_record(PLAIN.key(contest))["times"]
    assert set(times) == {"triton", "cuda", "reference"}
    assert all(median > 0 and spread >= 0 for median, spread in times.values())
    # Another process takes the kept times: made far apart here.
    store.write_record(PLAIN.key(contest), {"times": {"triton": [1, 0.01], "cuda": [9, 0.01], "reference": [9, 0.01]}})
    monkeypatch.setattr(prover.Child, "__enter__", lambda self: pytest.fail("a process was started"))
    report = verifying.settle([(PLAIN, wanted)], seconds=60, store=store)
    assert report.chosen[PLAIN.name, "merge", "float32", "any"] == "triton"
