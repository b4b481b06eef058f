"""Model cards: what a saved folder is, how it was made, how to load it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .._version import __version__
from ..routing import LEARNED
from ._files import replace_file
from .config import AdaMixConfig
from .gate_config import experts_of
from .state import adamix_state
from .targets import model_type

_CARD = "README.md"
_PAPER = "https://arxiv.org/abs/2205.12410"
_UNKNOWN = "BASE_MODEL"


def write_card(folder: Path, text: str) -> None:
    """Writes README.md; one that is there already stays, since a person may have written it."""
    path = folder / _CARD
    if not path.exists():
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def base_name(model: nn.Module) -> str | None:
    """What the base is called: its id on the Hub, or the last name of its folder on this disk; None: unknown."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if name is not None and (os.path.isabs(name) or os.path.exists(name)):
        return Path(name).resolve().name
    return name


def base_or_blank(model: nn.Module) -> str:
    """base_name, or a word to be replaced."""
    return base_name(model) or _UNKNOWN


def adamix_card(model: nn.Module, tags: Sequence[str] = ()) -> str:
    """Of a folder that adamix_kernels.load reads."""
    state = adamix_state(model)
    config = state.config
    kind = f"adapters of width {config.bottleneck}" if config.method == "adapter" else f"LoRA of rank {config.r}"
    many = "the mean of " if state.merged else ""
    return card(
        model,
        facts=["library_name: adamix_kernels"],
        tags=["adamix", config.method, *filter(None, [model_type(model)]), *tags],
        title=f"{type(model).__name__}, fine-tuned with AdaMix",
        what=f"{kind[0].upper()}{kind[1:]}: {many}{_experts(config)}, shared side: {config.share or 'none'}. "
        "The folder holds what was trained, not the base model; AutoModel.from_pretrained does not read it.",
        usage=[
            "from adamix_kernels import load  # with its extra [hf]",
            "",
            'model, tokenizer = load("THIS_FOLDER_OR_REPOSITORY")',
        ],
    )


def _experts(config: AdaMixConfig) -> str:
    """How many, where layers may have other numbers."""
    found = experts_of(config)
    if isinstance(config.experts_pattern, list):
        return f"{', '.join(map(str, found))} experts by depth"
    return f"{found[0] if len(set(found)) == 1 else f'{min(found)} to {max(found)}'} experts"


def _method(model: nn.Module) -> str:
    state = adamix_state(model)
    if state.config.routing != LEARNED:
        return "experts routed at random in training, averaged afterwards"
    router, top_k = state.config.router, state.config.top_k
    chosen = "" if top_k is None else f", the {top_k} largest of a {'text' if router == 'sentence' else 'token'}"
    merged = ", merged by the mean of these" if state.merged else ""
    gates = "gates out of the experts themselves" if router == "arrow" else "learned gates"
    return f"here its experts are weighed by {gates} (router: {router}{chosen}){merged}"


def card(
    model: nn.Module,
    facts: Sequence[str],
    tags: Sequence[str],
    title: str,
    what: str,
    usage: list[str],
    method: str | None = None,
) -> str:
    """method: in place of what the model's configuration says that it was trained by."""
    base = base_or_blank(model)
    named = getattr(getattr(model, "config", None), "_name_or_path", None)
    on_hub = base == named and base.count("/") <= 1
    lines = [
        "---",
        *([f"base_model: {base}"] if on_hub else []),
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
        f"[AdaMix]({_PAPER}): {method or _method(model)}.",
        "",
        "```python",
        *usage,
        "```",
    ]
    return "\n".join(lines) + "\n"
