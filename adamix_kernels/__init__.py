"""AdaMix, mixture-of-adaptations fine-tuning, as fused kernels and drop-in modules.

Importing this package needs torch alone; what needs transformers is imported when it is first named.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._backends import BackendState, BackendUnavailableError, backends
from ._version import __version__
from .functional import (
    AdaMixLossOutput,
    adamix_loss,
    consistency_loss,
    linear_adamix_loss,
    merge_experts,
    merge_lora,
    routed_adapter,
    routed_lora,
)

_LAZY = {
    "AdaMixLoss": "modules",
    "AdaptedLayer": "modules",
    "RoutedAdapter": "modules",
    "RoutedLoRALinear": "modules",
    "Router": "routing",
    "AdaMixConfig": "models.config",
    "adapt": "models.inject",
    "print_trainable_parameters": "models.summary",
    "summary": "models.summary",
    "merge": "models.merging",
    "unmerge": "models.merging",
    "learn_merging": "models.merging",
    "disable": "models.contexts",
    "use_experts": "models.contexts",
    "eval_routing": "models.contexts",
    "save_adamix": "models.checkpoint",
    "load_adamix": "models.checkpoint",
    "load": "tasks.loading",
    "double_batch": "models.doubling",
    "AdaMixTrainer": "models.trainer",
    "AdaMixTrainerMixin": "models.trainer",
    "load_official": "convert",
    "export_peft": "convert",
    "export_adapterhub": "convert",
}

__all__ = [
    "__version__",
    "AdaMixLossOutput",
    "BackendState",
    "BackendUnavailableError",
    "adamix_loss",
    "backends",
    "consistency_loss",
    "linear_adamix_loss",
    "merge_experts",
    "merge_lora",
    "routed_adapter",
    "routed_lora",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
