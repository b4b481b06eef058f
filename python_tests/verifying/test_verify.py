"""backend="auto" proves kernels before it uses them: the whole path on stand-ins for a GPU, and every kind of fault."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
import verify_stand_ins
from verify_cases import apart, faults, no_child, right, store
from verify_stand_ins import PLAIN

import adamix_kernels
from adamix_kernels import _auto, _backends, verifying
from adamix_kernels.ops import _direct
from adamix_kernels.verifying import child, prover, table
from adamix_kernels.verifying.machine import Job, jobs
from adamix_kernels.verifying.verdicts import Store

__all__ = ["apart", "faults", "no_child", "store"]


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
    "routed_lora triton float32 wide": ("hangs", "crashed", "tokens: gave no answer within 4 s"),
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
    report = verifying.settle([(PLAIN, wanted)], seconds=240, one_case=4, store=store)
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


@pytest.mark.parametrize(
    ("words", "state"), [("CUDA out of memory. Tried to allocate (2, 3) elements", "unknown"), ("no image", "crashed")]
)
def test_a_gpu_that_others_have_filled_says_nothing_of_a_kernel(monkeypatch, words, state):
    def problem(self, backend):
        raise RuntimeError(words)

    monkeypatch.setattr(child.Check, "problem", problem)
    found = child.verify(Job("merge", "cuda", "float32", "any"), PLAIN, lambda case: None)
    assert (found["state"], words in found["why"]) == (state, True)


def test_the_right_kernel_is_chosen_and_runs_and_a_later_process_starts_none(store, calls, monkeypatch):
    needs = [("routed_adapter", torch.float32, 48), ("merge", torch.float32, 0)]
    report = verifying.verify_on(PLAIN, needs)
    assert {v.state for v in report.verdicts} == {"right"}
    # By the table: for an A100 in float32 the CUDA kernels have counts of adapters.
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


def test_what_has_too_few_dimensions_is_still_named(calls):
    with pytest.raises(ValueError, match="x: got"):
        adamix_kernels.routed_adapter(torch.tensor(1.0), torch.ones(3), None, torch.ones(3), None, None, None)


def test_every_op_says_what_its_class_of_shapes_goes_by():
    """A call of select whose module is used passes the size; fakes only ask whether a request can be met."""
    root = Path(_backends.__file__).parent / "ops"
    missing = []
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text())
        asides = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "select" and id(node) not in asides:
                op = getattr(node.args[0], "value", None)
                if op != "merge" and len(node.args) < 5:
                    missing.append(f"{path.relative_to(root)}:{node.lineno}")
    assert not missing


@pytest.mark.parametrize("request_", ["reference", "triton", "cuda"])
def test_an_explicit_request_asks_no_table(calls, request_):
    _auto.freeze({("merge", torch.device("cpu"), torch.float32, "any"): "cuda"})
    adamix_kernels.merge_experts(torch.ones(2, 3), backend=request_)
    assert calls == ([] if request_ == "reference" else [("merge", request_)])


def test_every_op_and_class_of_shapes_has_cases_and_a_preference():
    from adamix_kernels.verifying.cases import cases

    assert set(_auto.SHAPES) == set(_backends.OPS)
    for op, shapes in _auto.SHAPES.items():
        for shape in shapes:
            made = cases(op, shape)
            words = " ".join(f"{case.name} {case.placed}" for case in made)
            assert "misaligned" in words
            assert "strided" in words
            assert len({case.name for case in made}) == len(made)
            for capability in (70, 75, 80, 86, 90, 100, 120):
                assert table.preferred(capability, op, "float16", shape).source


def test_the_classes_of_shapes_are_those_of_the_sizes():
    assert [_auto.shape_class("routed_lora", n) for n in (1, 256, 257)] == ["narrow", "narrow", "wide"]
    assert [_auto.shape_class("consistency", n) for n in (2, 4096, 4097)] == ["few", "few", "many"]
    assert _auto.shape_class("merge", 10**9) == "any"


def test_calls_read_nothing_and_start_nothing(no_child, monkeypatch):
    monkeypatch.setattr(Store, "read_record", lambda self, key: pytest.fail("the disk was read"))
    adapter()
    compiled = torch.compile(lambda x: adamix_kernels.merge_experts(x), backend="eager", fullgraph=True)
    compiled(torch.ones(3, 4))


def test_the_committed_preferences_are_what_the_records_give():
    from benchmarks import prefer

    assert table.FILE.read_text() == prefer.text(), "python -m benchmarks.prefer --write"
    assert prefer.PAGE.read_text() == prefer.page()


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
    for job in wanted:
        store.write(right(job), PLAIN)
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
