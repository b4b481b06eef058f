"""Every kind of bad input, and that each way to answer one wrongly is seen."""

import pytest
import torch

from adamix_kernels.functional import merge_experts
from reliability import bad_input
from reliability.bad_input.kinds import Kind, problem

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_kind_is_refused_by_name():
    figures = list(bad_input.run("small"))
    assert [f"{figure.about}: {figure.value}" for figure in figures if not figure.passed] == []


def _raises(error):
    raise error


def _works_first():
    merge_experts(torch.ones(2, 3))
    raise ValueError("x: got it too late")


def _writes():
    _TENSOR.add_(1)
    raise ValueError("x: got it")


_TENSOR = torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: None, "nothing was raised"),
        (lambda: _raises(RuntimeError("x: got 1")), "RuntimeError"),
        (lambda: _raises(AttributeError("x")), "AttributeError"),
        (lambda: _raises(ValueError("got a wrong box")), "does not name x"),
        (_works_first, "merge.experts_forward ran"),
        (_writes, "an input was changed"),
    ],
)
def test_a_wrong_answer_is_seen(call, words):
    assert words in problem(Kind("a kind", "x", call, (_TENSOR,)))


def test_a_right_answer_is_right():
    assert problem(Kind("a kind", "x", lambda: _raises(TypeError("x: got 1, expected 2")), (_TENSOR,))) is None
