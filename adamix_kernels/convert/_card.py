"""Model cards of exported folders."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.card import base_or_blank, card
from ..models.state import adamix_state
from ..models.targets import model_type


def peft_card(model: nn.Module, expert: int | None) -> str:
    config = adamix_state(model).config
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    labels = f", num_labels={classes}" if "Classification" in type(model).__name__ and classes else ""
    which = "the mean of" if expert is None else f"expert {expert} of"
    return card(
        model,
        facts=["library_name: peft"],
        tags=["adamix", "lora", "peft"],
        title="LoRA, trained with AdaMix",
        what=f"A LoRA: {which} {config.num_experts} experts of rank {config.r}, alpha {config.alpha:g}, "
        f"shared side: {config.share or 'none'}.",
        usage=[
            f"from transformers import {type(model).__name__}",
            "from peft import PeftModel",
            "",
            f"base = {type(model).__name__}.from_pretrained({base_or_blank(model)!r}{labels})",
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        ],
        method=None if expert is None else "experts trained together, of which this is one",
    )


def adapterhub_card(model: nn.Module, name: str) -> str:
    state = adamix_state(model)
    adapted: Any = model.get_submodule(state.paths[0])
    width = adapted.adapter.bottleneck
    return card(
        model,
        # The Hub's key for the library that is now called `adapters`.
        facts=["library_name: adapter-transformers"],
        tags=["adamix", "adapter-transformers", str(model_type(model))],
        title=f"Adapter `{name}`, trained with AdaMix",
        what=f"A sequential bottleneck adapter of width {width} behind each adapted output layer: the mean of "
        f"{state.config.num_experts} experts, shared side: {state.config.share or 'none'}.",
        usage=[
            "from adapters import AutoAdapterModel",
            "",
            f"model = AutoAdapterModel.from_pretrained({base_or_blank(model)!r})",
            'model.load_adapter("THIS_FOLDER", set_active=True)',
        ],
    )
