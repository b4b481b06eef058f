"""Checkpoints of other projects: read the reference project's, write PEFT's and AdapterHub's."""

from ._clip import clip_predictions
from .adapterhub import export_adapterhub
from .official import load_official
from .peft import export_peft

__all__ = ["clip_predictions", "export_adapterhub", "export_peft", "load_official"]
