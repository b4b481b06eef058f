"""Real tasks for the demo and the command line: text data, encoders, and what a run was about."""

from ..models.pooling import mean_pool
from .batches import accuracy, collator, predict, tokenize
from .encoders import DEFAULT_MODEL, Encoder, load_causal, load_classifier, resolve_model
from .loading import load
from .run_file import Run, read_run, write_run
from .text import EMBEDDED, TextClassification, TextSplit, load_text_classification

__all__ = [
    "DEFAULT_MODEL",
    "EMBEDDED",
    "Encoder",
    "Run",
    "TextClassification",
    "TextSplit",
    "accuracy",
    "collator",
    "load",
    "load_causal",
    "load_classifier",
    "load_text_classification",
    "mean_pool",
    "predict",
    "read_run",
    "resolve_model",
    "tokenize",
    "write_run",
]
