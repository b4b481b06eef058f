"""Thin nn.Modules over the ops."""

from .adapter import AdaptedLayer, RoutedAdapter
from .lora import RoutedLoRALinear
from .loss import AdaMixLoss

__all__ = ["AdaMixLoss", "AdaptedLayer", "RoutedAdapter", "RoutedLoRALinear"]
