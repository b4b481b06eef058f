"""The ops' public functions."""

from .ops.routed_adapter.api import routed_adapter

__all__ = ["routed_adapter"]
