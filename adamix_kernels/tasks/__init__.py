"""Real tasks for the demo and the command line: text data and encoders."""

from .encoders import DEFAULT_MODEL, Encoder, load_classifier, resolve_model
from .text import EMBEDDED, TextClassification, TextSplit, load_text_classification

__all__ = [
    "DEFAULT_MODEL",
    "EMBEDDED",
    "Encoder",
    "TextClassification",
    "TextSplit",
    "load_classifier",
    "load_text_classification",
    "resolve_model",
]
