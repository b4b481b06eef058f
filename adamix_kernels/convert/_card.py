"""Model cards of exported folders: what it is, how it was made, how to load it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from .._version import __version__
from ..models._files import replace_file
from ..models.state import adamix_state
from ..models.targets import model_type

_CARD = "README.md"
_PAPER = "https://arxiv.org/abs/2205.12410"
_UNKNOWN = "BASE_MODEL"


def write_card(folder: Path, text: str) -> None:
    """Writes README.md; one that is there already stays, since a person may have written it."""
    path = folder / _CARD
    if not path.exists():
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def peft_card(model: nn.Module, expert: int | None) -> str:
    config = adamix_state(model).config
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    labels = f", num_labels={classes}" if "Classification" in type(model).__name__ and classes else ""
    which = "the mean of" if expert is None else f"expert {expert} of"
    return _card(
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
            f"base = {type(model).__name__}.from_pretrained({_base(model)!r}{labels})",
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        ],
    )


def adapterhub_card(model: nn.Module, name: str) -> str:
    state = adamix_state(model)
    adapted: Any = model.get_submodule(state.paths[0])
    width = adapted.adapter.bottleneck
    return _card(
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
            f"model = AutoAdapterModel.from_pretrained({_base(model)!r})",
            'model.load_adapter("THIS_FOLDER", set_active=True)',
        ],
    )


def _card(model: nn.Module, facts: list[str], tags: list[str], title: str, what: str, usage: list[str]) -> str:
    base = _base(model)
    on_hub = base != _UNKNOWN and base.count("/") <= 1 and not os.path.exists(base)
    base_line = [f"base_model: {base}"] if on_hub else []
    lines = [
        "---",
        *base_line,
        *facts,
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {title}",
        "",
        what,
        "",
        f"Base model: `{base}` ({type(model).__name__}). Made by adamix_kernels {__version__}; the method is",
        f"[AdaMix]({_PAPER}): experts routed at random in training, averaged afterwards.",
        "",
        "```python",
        *usage,
        "```",
    ]
    return "\n".join(lines) + "\n"


def base_name(model: nn.Module) -> str | None:
    """What the base is called where others can find it; None for a folder by its absolute path, which is this
    machine's alone."""
    name: str | None = getattr(getattr(model, "config", None), "_name_or_path", None)
    return None if not name or os.path.isabs(name) else name


def _base(model: nn.Module) -> str:
    return base_name(model) or _UNKNOWN
