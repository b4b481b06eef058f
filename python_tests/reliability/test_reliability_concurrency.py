"""The concurrency part in its small size, and that each of its figures can fail."""

import time

import torch

from reliability import concurrency
from reliability.children import Child, killed
from reliability.concurrency import ranks, threads, workers


def test_the_part_in_its_small_size():
    assert [figure for figure in concurrency.run("small") if not figure.passed] == []


def test_threads_share_what_is_global():
    """The generator is one for all threads: what is drawn at once is not what is drawn in turn."""

    def draw():
        torch.manual_seed(3)
        time.sleep(0.05)
        return torch.rand(1).item()

    together = threads.at_once([draw, draw])
    assert together != [draw(), draw()]


def test_two_models_with_another_seed_differ():
    assert threads.course("BERT, adapters", 1) != threads.course("BERT, adapters", 2)


def test_a_worker_of_other_bits_is_found_out(monkeypatch):
    sent = []
    monkeypatch.setattr(workers.Computed, "__getitem__", lambda _self, number: workers.results(number)[0] + 1)
    workers.compare(sent.append)
    torch.set_num_threads(1)
    assert sent == [(0, 24)]


def _sleep(send):
    send("sleeping")
    time.sleep(60)


def test_a_hanging_process_is_ended_and_told_of(monkeypatch):
    child = Child(_sleep)
    assert child.next_message() == "sleeping"
    assert child.end(0.1) is None
    assert killed(child.process.exitcode)
    monkeypatch.setattr(ranks, "outcome", lambda *_: (60.0, None, -9))
    assert not ranks._figure(ranks.DEATHS[0], 1).passed
    monkeypatch.setattr(ranks, "outcome", lambda *_: (1.0, 0, -9))
    assert not ranks._figure(ranks.DEATHS[0], 1).passed
