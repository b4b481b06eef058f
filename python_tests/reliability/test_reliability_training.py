"""The training part in its small size, and that each of its figures can fail."""

import itertools

import pytest
import torch

from reliability import training
from reliability.training import kills, nans, scaling

KIND = "BERT, adapters"


@pytest.mark.nightly
def test_the_part_in_its_small_size():
    assert [figure for figure in training.run("small") if not figure.passed] == []


def test_a_resume_to_other_bits_is_found_out(monkeypatch):
    ends = itertools.count()
    monkeypatch.setattr(kills, "finish", lambda *_: ("done", str(next(ends)), [], ["step"]))
    monkeypatch.setattr(kills, "kill_at_random", lambda *_: "save: rename")
    assert not kills._figure(0, 2).passed
    monkeypatch.setattr(kills, "finish", lambda *_: ("done", "same", [], ["step"]))
    assert kills._figure(0, 2).passed
    monkeypatch.setattr(kills, "kill_at_random", lambda *_: None)
    assert not kills._figure(0, 2).passed  # nobody was killed


def test_without_the_check_nothing_stops():
    path, name, expert = nans.places(KIND)[0]
    assert nans.stop(KIND, nans.adapted(KIND), f"{path}.{name}", expert, check="0") == (None, False)


def test_a_scaler_that_does_not_skip_is_found_out(monkeypatch):
    def step(self, optimizer):
        self.unscale_(optimizer)
        optimizer.step()

    monkeypatch.setattr(torch.amp.GradScaler, "step", step)
    assert [figure.passed for figure in scaling.figures()] == [False, False]
