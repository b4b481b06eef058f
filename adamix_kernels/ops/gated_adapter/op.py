"""The gated adapter's dispatcher ops and their derivative."""

from __future__ import annotations

from .._routed_ops import ADAPTER, RoutedOps
from .signatures import Backward, Forward

OPS = RoutedOps("gated_adapter", ADAPTER, Forward, Backward)
gated_adapter_op, gated_adapter_backward_op = OPS.forward, OPS.backward
