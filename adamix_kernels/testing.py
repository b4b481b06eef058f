"""What the tests of every backend measure with: an error budget instead of hand-picked tolerances, poisoned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch


@contextlib.contextmanager
def poisoned_memory(poison: bool = True) -> Iterator[None]:
    """Everything that is allocated without a value holds NaN until it is written, in C++ too."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn" if poison else before)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def error_in_budget(
    result: torch.Tensor,
    exact: torch.Tensor,
    same_dtype: torch.Tensor,
    multiple: float = 2.0,
) -> tuple[bool, str]:
    """Whether max|result - exact| <= multiple * max|same_dtype - exact| + eps(dtype) * max|exact|.

    Args:
        result: what a backend computed, any floating dtype.
        exact: the float64 result for the same (already rounded) inputs.
        same_dtype: what plain PyTorch computes in result's dtype.
        multiple: how many times PyTorch's own error is allowed.

    Returns:
        (within budget, a sentence with the figures).
    """
    if exact.numel() == 0:
        return result.shape == exact.shape, "empty"
    error, own, budget = error_and_budget(result, exact, same_dtype, multiple)
    return error <= budget, f"error {error:.3e}, PyTorch's own {own:.3e}, budget {budget:.3e}"


def error_and_budget(
    result: torch.Tensor, exact: torch.Tensor, same_dtype: torch.Tensor, multiple: float = 2.0
) -> tuple[float, float, float]:
    """(max|result - exact|, max|same_dtype - exact|, budget) of `error_in_budget`, of tensors that are not empty."""
    error = (result.double() - exact).abs().max().item()
    own = (same_dtype.double() - exact).abs().max().item()
    slack = torch.finfo(result.dtype).eps * exact.abs().max().item()
    return error, own, multiple * own + slack


def assert_in_budget(
    function: Callable[..., Sequence[torch.Tensor]],
    plain: Callable[..., Sequence[torch.Tensor]],
    *tensors: torch.Tensor,
    multiple: float = 2.0,
) -> None:
    """Asserts that `function` errs at most `multiple` times as much as `plain` does, both against plain in float64.

    function, plain: take the tensors, return a sequence of tensors (outputs, gradients).
    tensors: inputs in the dtype under test.
    """
    exact = plain(*(t.double() for t in tensors))
    for number, (result, want, own) in enumerate(zip(function(*tensors), exact, plain(*tensors), strict=True)):
        fits, figures = error_in_budget(result, want, own, multiple)
        assert fits, f"output {number}: {figures}"
