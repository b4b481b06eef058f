"""Gated LoRA's dispatcher ops and their derivative."""

from __future__ import annotations

from .._routed_ops import LORA, RoutedOps
from .signatures import Backward, Forward

OPS = RoutedOps("gated_lora", LORA, Forward, Backward)
gated_lora_op, gated_lora_backward_op = OPS.forward, OPS.backward
gated_lora_inplace_op = OPS.inplace
