"""What the reference project would have saved of a small model."""

from __future__ import annotations

import torch

from adamix_kernels.convert._official_format import adapter_slots, lora_slots

from ..small_models import adapted


def official_state(kind: str, seed: int = 3) -> dict:
    """The keys and tensors of its file, by the grammar that load_official reads."""
    model = adapted(kind, seed)
    state = {}
    for path in model.adamix.paths:
        layer = model.get_submodule(path)
        if model.adamix.config.method == "lora":
            slots = lora_slots(f"{path}.", layer)
        else:
            slots = adapter_slots(f"{path.rpartition('.')[0]}.ExpertSoup.", layer.adapter)
        values = dict(layer.named_parameters())
        for key, targets in slots.items():
            value = values[targets[0].name].detach()
            state[key] = (value if targets[0].expert is None else value[targets[0].expert]).clone()
    if kind.startswith("GPT-2"):
        return {"model_state_dict": {f"module.{key}": value for key, value in state.items()}}
    state |= {f"classifier.{name}": value.detach().clone() for name, value in model.classifier.named_parameters()}
    return {key: value.contiguous() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
