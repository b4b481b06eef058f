"""The numerics part in its small size, and that a wrong op, a wrong unit or a missing backend shows."""

import json
import math

import pytest
import torch

from adamix_kernels import functional
from reliability import kernel_children, numerics
from reliability.numerics import measure
from reliability.numerics.cases import cases


def _only(monkeypatch, op):
    chosen = [case for case in cases() if case.op_name == op]
    monkeypatch.setattr(measure, "cases", lambda: iter(chosen))
    return {figure.about: figure for figure in numerics.run("small", ["reference"])}


def test_every_op_errs_at_most_twice_as_much_as_pytorch():
    figures = list(numerics.run("small", ["reference"]))
    assert [figure.about for figure in figures if not figure.passed] == []
    ops = {figure.about.partition(",")[0] for figure in figures[1:]}
    assert ops == {name for name in functional.__all__ if name.islower()}
    assert len(figures) == 1 + 2 * len(ops)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_op_that_is_slightly_off_shows(monkeypatch, direction):
    real = functional.merge_experts

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t * (1 + 3e-6) if direction == "forward" else t.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 3e-6) if direction == "backward" else grad

    monkeypatch.setattr(functional, "merge_experts", lambda *args, **options: Off.apply(real(*args, **options)))
    figures = _only(monkeypatch, "merge_experts")
    assert not figures[f"merge_experts, reference, {direction}"].passed
    other = "backward" if direction == "forward" else "forward"
    assert figures[f"merge_experts, reference, {other}"].passed


def test_a_result_that_is_not_finite_shows(monkeypatch):
    real = functional.merge_experts
    monkeypatch.setattr(functional, "merge_experts", lambda *args, **options: real(*args, **options) / 0)
    assert not _only(monkeypatch, "merge_experts")["merge_experts, reference, forward"].passed


def test_the_measure_of_an_error():
    exact = torch.tensor([1.0, -8.0], dtype=torch.float64)
    assert measure.relative_error(torch.tensor([1.0, -8.0]), exact) == 0
    assert measure.relative_error(torch.tensor([1.5, -8.0]), exact) == 0.5 / 8
    assert measure.relative_error(torch.tensor([1.0, -math.inf]), exact) == math.inf
    assert measure.relative_error(torch.tensor([0.0]), torch.zeros(1)) == 0
    assert measure.relative_error(torch.tensor([1e-30]), torch.zeros(1)) == math.inf


@pytest.mark.parametrize("dtype", measure.DTYPES)
@pytest.mark.parametrize("size", [3.0, 1.0, 1e-6, 1e-9])
def test_a_correctly_rounded_result_is_within_one_unit(dtype, size):
    exact = torch.linspace(-size, size, 101, dtype=torch.float64) / 1.7
    assert measure.relative_error(exact.to(dtype), exact) <= measure.rounding(exact, dtype)


def test_a_backend_that_is_missing_fails_and_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.delenv("ADAMIX_CUDA_HOST", raising=False)
    monkeypatch.setattr(kernel_children, "_HOST_LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(measure, "cases", lambda: iter(()))
    (figure,) = numerics.run("small", ["reference", "cuda"])
    assert not figure.passed
    assert "python -m adamix_kernels._build --host plain" in figure.value


def test_a_childs_last_line_is_its_result_and_its_failure_is_ours(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text(json.dumps([1, {"two": 2}]))
    variables = kernel_children.environment("reference")
    assert kernel_children.finish(kernel_children.start("json.tool", "--compact", str(path), variables=variables)) == [
        1,
        {"two": 2},
    ]
    failing = kernel_children.start("json.tool", str(tmp_path / "absent"), variables=variables)
    with pytest.raises(RuntimeError, match=r"absent exited with"):
        kernel_children.finish(failing)
