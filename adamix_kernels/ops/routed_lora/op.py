"""Routed LoRA's dispatcher ops and their derivative."""

from __future__ import annotations

from .._routed_ops import LORA, RoutedOps
from .signatures import Backward, Forward

OPS = RoutedOps("routed_lora", LORA, Forward, Backward)
routed_lora_op, routed_lora_backward_op = OPS.forward, OPS.backward
routed_lora_inplace_op = OPS.inplace
