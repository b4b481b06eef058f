"""Verdicts on the disk, and the processes that reach them: what is damaged, full, shared, killed, late or changed."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from verify_cases import ADAPTER, apart, faults, no_child, right, store
from verify_stand_ins import PLAIN

from adamix_kernels import verifying
from adamix_kernels.verifying import prover, verdicts
from adamix_kernels.verifying.machine import Job, jobs
from adamix_kernels.verifying.verdicts import Store

__all__ = ["apart", "faults", "no_child", "store"]


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
        found = [store.read(ADAPTER, PLAIN) for _ in range(2)]
    assert found == [None, None]
    assert len(told) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_folder_costs_one_warning_and_no_verdict(store, monkeypatch, code):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(verdicts.os, "fsync", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be kept there") as told:
        _ = [store.write(right(), PLAIN) for _ in range(2)]
    assert len(told) == 1
    assert [path for path in store.folder.iterdir() if path.name != "lock"] == []  # nothing half written stays
    assert store.read(ADAPTER, PLAIN) is None


def test_a_folder_that_cannot_be_made_is_worked_without(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    assert store.read(ADAPTER, PLAIN) is None
    with store.lock(time.monotonic()) as mine:
        assert mine
    with pytest.warns(RuntimeWarning, match="cannot be kept there"):
        store.write(right(), PLAIN)


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


def _verify_and_say(writer, wanted):
    with os.fdopen(writer, "w") as said:
        prover.prove(wanted, PLAIN, Store(), seconds=60, one_case=60, progress=lambda done, total, words: print(
            done, words, file=said, flush=True))  # fmt: skip


def test_killed_while_verifying_keeps_what_was_done_frees_the_lock_and_leaves_no_process(store, faults):
    faults({"routed_lora triton float32 wide": "hangs"})
    done, left = Job("merge", "triton", "float32", "any"), Job("routed_lora", "triton", "float32", "wide")
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_verify_and_say, args=(writer, [done, left]))
    process.start()
    os.close(writer)
    children = []
    with os.fdopen(reader) as said:
        for line in said:
            if line.startswith("1 routed_lora"):
                children = _children(process.pid)
                os.kill(process.pid, signal.SIGKILL)
                break
    process.join()
    assert children
    assert store.read(done, PLAIN).state == "right"
    assert store.read(left, PLAIN) is None
    with store.lock(time.monotonic() + 5) as mine:
        assert mine
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid):
    return [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


# What stops it


def test_time_that_ran_out_is_unknown_and_not_kept(store):
    found = prover.prove([ADAPTER], PLAIN, store, seconds=0.01)
    assert (found[ADAPTER].state, found[ADAPTER].why) == ("unknown", "time ran out before it")
    assert store.read(ADAPTER, PLAIN) is None


def test_a_child_that_cannot_start_is_no_verdict(store, monkeypatch):
    monkeypatch.setattr(prover, "_START", "import sys; sys.exit('CUDA-capable device(s) is/are busy')")
    found = prover.prove([ADAPTER], PLAIN, store, seconds=60)
    assert found[ADAPTER].state == "unknown"
    assert found[ADAPTER].why.endswith("ended with status 1: CUDA-capable device(s) is/are busy")
    assert store.read(ADAPTER, PLAIN) is None


@pytest.mark.parametrize("how", ["off", "table"])
def test_modes_that_start_no_process(store, monkeypatch, no_child, how):
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


def test_no_gpu_is_said(no_child):
    assert verifying.verify().problem == "torch sees no GPU"
    assert verifying.verify_for(torch.device("cpu"), [("merge", torch.float32, 0)]) is None


def test_processes_share_the_work_and_an_interrupt_ends_them_and_keeps_no_crash(store, faults):
    merging, hangs = Job("merge", "triton", "float32", "any"), Job("routed_lora", "triton", "float32", "wide")
    faults({" ".join(hangs): "hangs"})
    said, before = [], set(_children(os.getpid()))  # other tests' processes of this one, such as a compiler's

    def interrupted(done, total, words):
        said.append((done, total))
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        # The hanging one has a process of its own, or the other would never be done.
        prover.prove([hangs, merging], PLAIN, store, 600, one_case=600, processes=2, progress=interrupted)
    assert said[-1] == (1, 2)
    assert store.read(merging, PLAIN).state == "right"
    assert store.read(hangs, PLAIN) is None
    end = time.monotonic() + 10
    while (left := set(_children(os.getpid())) - before) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
