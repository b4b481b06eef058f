"""AdaMix, mixture-of-adaptations fine-tuning, as fused kernels and drop-in modules.

Importing this package needs torch alone; what needs transformers is imported when it is first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._backends import BackendState, BackendUnavailableError
from ._extras import installed, needed
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

if TYPE_CHECKING:
    from .convert import export_adapterhub as export_adapterhub
    from .convert import export_peft as export_peft
    from .convert import load_official as load_official
    from .models.centroid import store_centroid as store_centroid
    from .models.checkpoint import load_adamix as load_adamix
    from .models.checkpoint import save_adamix as save_adamix
    from .models.config import AdaMixConfig as AdaMixConfig
    from .models.contexts import disable as disable
    from .models.contexts import eval_routing as eval_routing
    from .models.contexts import use_experts as use_experts
    from .models.doubling import double_batch as double_batch
    from .models.gating import gate_losses as gate_losses
    from .models.gating import use_tasks as use_tasks
    from .models.inject import adapt as adapt
    from .models.merging import learn_merging as learn_merging
    from .models.merging import merge as merge
    from .models.merging import unmerge as unmerge
    from .models.prefix import both_passes as both_passes
    from .models.summary import print_trainable_parameters as print_trainable_parameters
    from .models.summary import summary as summary
    from .models.trainer import AdaMixTrainer as AdaMixTrainer
    from .models.trainer import AdaMixTrainerMixin as AdaMixTrainerMixin
    from .modules import AdaMixLoss as AdaMixLoss
    from .modules import AdaptedLayer as AdaptedLayer
    from .modules import RoutedAdapter as RoutedAdapter
    from .modules import RoutedLoRALinear as RoutedLoRALinear
    from .packs.folder import load_pack as load_pack
    from .packs.folder import save_pack as save_pack
    from .packs.folder import unpack as unpack
    from .packs.job import PackJob as PackJob
    from .packs.pack import add_expert as add_expert
    from .packs.pack import pack as pack
    from .packs.pack import remove_expert as remove_expert
    from .packs.pack import replace_expert as replace_expert
    from .packs.route import nearest as nearest
    from .packs.training import PackTrainer as PackTrainer
    from .routing import Router as Router
    from .tasks.loading import load as load
    from .verifying import backends as backends
    from .verifying import verify as verify

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
    "gate_losses": "models.gating",
    "use_tasks": "models.gating",
    "disable": "models.contexts",
    "use_experts": "models.contexts",
    "eval_routing": "models.contexts",
    "save_adamix": "models.checkpoint",
    "load_adamix": "models.checkpoint",
    "store_centroid": "models.centroid",
    "pack": "packs.pack",
    "add_expert": "packs.pack",
    "replace_expert": "packs.pack",
    "remove_expert": "packs.pack",
    "unpack": "packs.folder",
    "save_pack": "packs.folder",
    "load_pack": "packs.folder",
    "nearest": "packs.route",
    "PackJob": "packs.job",
    "PackTrainer": "packs.training",
    "load": "tasks.loading",
    "backends": "verifying",
    "verify": "verifying",
    "double_batch": "models.doubling",
    "both_passes": "models.prefix",
    "AdaMixTrainer": "models.trainer",
    "AdaMixTrainerMixin": "models.trainer",
    "load_official": "convert",
    "export_peft": "convert",
    "export_adapterhub": "convert",
}
# What their modules import; without it, `import *` leaves them out, and naming one says how to install it.
_NEEDS_TRANSFORMERS = ("AdaMixTrainer", "AdaMixTrainerMixin", "PackJob", "PackTrainer")

__all__ = [
    "__version__",
    "AdaMixLossOutput",
    "BackendState",
    "BackendUnavailableError",
    "adamix_loss",
    "consistency_loss",
    "linear_adamix_loss",
    "merge_experts",
    "merge_lora",
    "routed_adapter",
    "routed_lora",
    *(name for name in _LAZY if name not in _NEEDS_TRANSFORMERS or installed("transformers")),
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed(name):
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_LAZY})
