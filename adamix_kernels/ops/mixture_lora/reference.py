"""Reference backend of the mixture: the router's, then gated LoRA's."""

from __future__ import annotations

from typing import Any

import torch

from ..gated_lora.reference import forward as weigh
from ..router.reference import forward as route
from ._composed import composed


def forward(*arguments: Any, inplace: bool = False) -> tuple[torch.Tensor, ...]:
    return composed(route, weigh, arguments, inplace)
