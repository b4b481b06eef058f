"""A router of gates by its name in a configuration."""

from __future__ import annotations

from typing import Any

from .arrow import ArrowRouter
from .gates import GateRouter
from .linear import LinearRouter, SentenceRouter, ThresholdRouter
from .tasks import TaskRouter

ROUTERS = ("linear", "arrow", "task", "sentence", "threshold")


def gate_router(
    kind: str, features: int, num_experts: int, *, top_k: int | None = None, num_tasks: int | None = None, **more: Any
) -> GateRouter:  # fmt: skip
    """The router of that name, on that many input features.

    Args:
        kind: one of ROUTERS. features: K. num_experts: M. top_k: for "linear", "arrow" and "sentence".
        num_tasks: for "task". more: dtype, device, balance, z.

    Raises ValueError for another name, or for what that router has no use for.
    """
    if kind not in ROUTERS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(map(repr, ROUTERS))}")
    if top_k is not None and kind in ("task", "threshold"):
        raise ValueError(f"top_k: got {top_k} for router={kind!r}, expected None: it weighs every expert")
    if (num_tasks is None) == (kind == "task"):
        raise ValueError(f"num_tasks: got {num_tasks!r} for router={kind!r}, expected it for 'task' alone")
    if kind == "task":
        assert num_tasks is not None
        return TaskRouter(num_tasks, num_experts, **more)
    if kind == "threshold":
        return ThresholdRouter(features, num_experts, **more)
    chosen = {"linear": LinearRouter, "sentence": SentenceRouter}.get(kind)
    if chosen is not None:
        return chosen(features, num_experts, top_k, **more)
    return ArrowRouter(features, num_experts, top_k, **more)
