"""Who serves which token: experts drawn at random (Router), and gates that weigh them (the GateRouters)."""

from ..ops.mixture_lora.api import MixtureOutput, mixture_lora
from ..ops.router.api import RouterOutput, router_gates
from .arrow import ArrowRouter, leading_directions
from .draws import LEARNED, LEVELS, Router, check_level, process_rank
from .gates import GateRouter, Gates, balance_loss, dense_gates, z_loss
from .kinds import ROUTERS, gate_router
from .linear import LinearRouter, SentenceRouter, ThresholdRouter
from .tasks import TaskRouter, spread_heads

__all__ = [
    "LEARNED",
    "LEVELS",
    "ROUTERS",
    "ArrowRouter",
    "GateRouter",
    "Gates",
    "LinearRouter",
    "MixtureOutput",
    "Router",
    "RouterOutput",
    "SentenceRouter",
    "TaskRouter",
    "ThresholdRouter",
    "balance_loss",
    "check_level",
    "dense_gates",
    "gate_router",
    "leading_directions",
    "mixture_lora",
    "process_rank",
    "router_gates",
    "spread_heads",
    "z_loss",
]
