"""Real tasks for the demo and the command line: text data, encoders, and what a run was about."""

from ..models.pooling import mean_pool
from ._bases import load_base
from ._sources import EMBEDDED
from .batches import accuracy, collator, predict, tokenize
from .encoders import DEFAULT_MODEL, Encoder, load_causal, load_classifier, resolve_model
from .inputs import InputRow, read_inputs
from .loading import load
from .reading import load_split, load_task
from .run_file import Run, read_run, write_run
from .text import Columns, TextSplit, TextTask

__all__ = [
    "DEFAULT_MODEL",
    "EMBEDDED",
    "Columns",
    "Encoder",
    "InputRow",
    "Run",
    "TextSplit",
    "TextTask",
    "accuracy",
    "collator",
    "load",
    "load_base",
    "load_causal",
    "load_classifier",
    "load_split",
    "load_task",
    "mean_pool",
    "predict",
    "read_inputs",
    "read_run",
    "resolve_model",
    "tokenize",
    "write_run",
]
