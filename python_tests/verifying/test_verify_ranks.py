"""Processes of one job: one of a node verifies, all choose alike or take the reference, nobody waits for ever."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from verify_cases import apart, no_child, right, store
from verify_stand_ins import PLAIN

from adamix_kernels import _auto, verifying
from adamix_kernels.verifying import ranks
from adamix_kernels.verifying.machine import Job

__all__ = ["apart", "no_child", "store"]
ONE, TWO = Job("merge", "cuda", "float32", "any"), Job("routed_lora", "triton", "float16", "narrow")
KEY, OTHER = ("merge", "float32", "any"), ("routed_lora", "float16", "narrow")


@pytest.fixture(autouse=True)
def _first_meeting(monkeypatch):
    monkeypatch.setattr(ranks, "_over", False)


def meet(places, work, arrive=20.0, absent=()):
    """[work(Ranks) of each process], in threads."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    made = [ranks.Ranks(store, n, len(places), place, "test", arrive) for n, place in enumerate(places)]
    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(lambda one: None if one.rank in absent else work(one), made))


def test_the_first_of_each_node_and_kind_verifies_what_all_of_them_need():
    asked = {}

    def work(one):
        machine = replace(PLAIN, name="another" if one.rank == 3 else PLAIN.name)

        def prove(jobs):
            asked[one.rank] = jobs
            return [right(job) for job in jobs]

        return one.verdicts(machine, [TWO] if one.rank == 1 else [ONE], 5, prove)

    found = meet(["a", "a", "b", "b"], work)
    assert asked == {0: [ONE, TWO], 2: [ONE], 3: [ONE]}
    assert [{v.job for v in verdicts} for verdicts in found] == [{ONE, TWO}, {ONE, TWO}, {ONE}, {ONE}]


def test_where_two_differ_all_take_the_reference_for_that_key_alone():
    mine = [{KEY: "cuda", OTHER: "triton"}, {KEY: "triton", OTHER: "triton"}, {KEY: "cuda", OTHER: "triton"}]
    found = meet(["a", "a", "b"], lambda one: one.agree(mine[one.rank], 5))
    assert found == [{KEY: "reference", OTHER: "triton"}] * 3


def test_a_key_that_one_does_not_have_is_no_agreement():
    mine = [{KEY: "cuda"}, {}]
    assert meet(["a", "a"], lambda one: one.agree(mine[one.rank], 5)) == [{KEY: "reference"}, {}]


def test_who_is_late_decides_nothing_alone():
    """One gives up; the other, who comes when all is there, follows."""

    def work(one):
        if one.rank:
            time.sleep(1.0)
        return one.agree({KEY: "cuda"}, 0.0)

    assert meet(["a", "a"], work, arrive=0.1) == [{KEY: "reference"}] * 2


def test_one_that_does_not_come_is_not_waited_for_for_ever(monkeypatch):
    began = time.monotonic()
    found = meet(["a", "a"], lambda one: one.verdicts(PLAIN, [ONE], 0.1, lambda jobs: []), arrive=0.2, absent=[1])
    assert found == [None, None]
    assert time.monotonic() - began < 10


def test_giving_up_means_the_reference_one_warning_and_no_more_meetings(no_child, monkeypatch):
    store = dist.HashStore()
    alone = ranks.Ranks(store, 0, 2, "a", "test", arrive=0.1)
    with pytest.warns(RuntimeWarning, match="other processes of this job have not come") as told:
        report = verifying.verify_on(PLAIN, [("merge", torch.float32, 0)], group=alone)
    assert len(told) == 1
    assert report.chosen == {(PLAIN.name, *KEY): "reference"}
    assert {v.state for v in report.verdicts} == {"unknown"}
    with pytest.raises(RuntimeError, match="have not come"):
        ranks.met()


def test_launched_processes_without_a_group_take_the_reference(monkeypatch, no_child):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.warns(RuntimeWarning, match="cannot agree before torch.distributed.init_process_group"):
        assert verifying.verify_on(PLAIN, [("merge", torch.float32, 0)]).chosen == {}
    assert _auto.table.backend("merge", torch.device("cpu"), torch.float32, 0) == "reference"


def _process(rank, folder, cache, backends, answers):
    os.environ["ADAMIX_CACHE"] = cache
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    kept = verifying.Store()
    if rank == 0:
        for backend in backends:
            kept.write(right(ONE._replace(backend=backend)), PLAIN)
    os.environ["ADAMIX_AUTO"] = "table"
    report = verifying.verify_on(PLAIN, [("merge", torch.float32, 0)])
    answers.put((rank, list(report.chosen.values())))
    dist.destroy_process_group()


def test_a_real_group_meets_through_its_own_store(tmp_path):
    """The second process has another, empty cache, and takes what the first one found."""
    context = torch.multiprocessing.get_context("fork")
    answers = context.Queue()
    started = [
        context.Process(target=_process, args=(n, tmp_path, str(tmp_path / str(n)), ["triton", "cuda"], answers))
        for n in range(2)
    ]
    for process in started:
        process.start()
    found = sorted(answers.get(timeout=60) for _ in started)
    for process in started:
        process.join()
    assert found[0][1] == found[1][1] == ["cuda"]
