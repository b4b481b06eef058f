"""load: a model and its tokenizer from a saved folder, or from the Hub, in one call."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from torch import nn

from ..models.checkpoint import load_adamix
from ..models.hub import resolve_folder
from .encoders import load_causal, load_classifier, resolve_model
from .run_file import read_run


def load(
    source: str | os.PathLike[str], *, revision: str | None = None, model: str | None = None, backend: str = "auto"
) -> tuple[nn.Module, Any]:
    """(model in evaluation mode, tokenizer)."""
    folder = resolve_folder(source, revision)
    run = read_run(folder)
    if model is not None:
        run = dataclasses.replace(run, model=model)
    encoder = resolve_model(run.model)
    if run.task == "generation":
        base, tokenizer = load_causal(encoder)
    else:
        base, tokenizer = load_classifier(encoder, run.label_names, run.pooling, run.task)
    return load_adamix(base, folder, backend=backend).eval(), tokenizer
