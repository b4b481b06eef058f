"""`python -m reliability.memory.child BACKEND SIZE`: the figures of one backend as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from . import of_backend

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([asdict(figure) for figure in of_backend(*sys.argv[1:])]))
