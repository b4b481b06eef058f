"""The ops' public functions, in one place."""

from .ops.consistency.api import AdaMixLossOutput, adamix_loss, consistency_loss, linear_adamix_loss
from .ops.merge.api import merge_experts, merge_lora
from .ops.routed_adapter.api import routed_adapter
from .ops.routed_lora.api import routed_lora

__all__ = [
    "AdaMixLossOutput",
    "adamix_loss",
    "consistency_loss",
    "linear_adamix_loss",
    "merge_experts",
    "merge_lora",
    "routed_adapter",
    "routed_lora",
]
