"""The routed adapter's dispatcher ops and their derivative."""

from __future__ import annotations

from .._routed_ops import ADAPTER, RoutedOps
from .signatures import Backward, Forward

OPS = RoutedOps("routed_adapter", ADAPTER, Forward, Backward)
routed_adapter_op, routed_adapter_backward_op = OPS.forward, OPS.backward
