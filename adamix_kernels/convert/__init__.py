"""Checkpoints of other projects: read the reference project's, write PEFT's and AdapterHub's."""

from .adapterhub import export_adapterhub
from .official import load_official
from .peft import export_peft

__all__ = ["export_adapterhub", "export_peft", "load_official"]
