"""Real tasks for the demo and the command line: text data, encoders, and what a run was about."""

from .batches import accuracy, collator, predict, tokenize
from .encoders import DEFAULT_MODEL, Encoder, load_classifier, mean_pool, resolve_model
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
    "load_classifier",
    "load_text_classification",
    "mean_pool",
    "predict",
    "read_run",
    "resolve_model",
    "tokenize",
    "write_run",
]
