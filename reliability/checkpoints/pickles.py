"""Pickles that run code when they are read, offered to load_official: refused, and nothing runs."""

from __future__ import annotations

import builtins
import contextlib
import os
import pickle
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from adamix_kernels.convert import load_official

from ..record import Figure
from ..small_models import base
from .official import official_state

_KIND = "BERT, adapters"


class Call:
    """Pickled as a call of `function`, which unpickling then makes."""

    def __init__(self, function: Callable, *args):
        self._call = function, args

    def __reduce__(self):
        return self._call


def payloads(marker: Path) -> dict[str, Call]:
    """By name; each leaves the file or folder `marker` behind."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "os.mkdir": Call(os.mkdir, str(marker)),
        "subprocess.call": Call(subprocess.call, ["touch", str(marker)]),
        "exec": Call(exec, code),
        "eval": Call(eval, code),
        "open": Call(builtins.open, str(marker), "w"),
        "torch.save": Call(torch.save, 0, str(marker)),
        "getattr": Call(getattr, Call(__import__, "os"), "mkdir"),
    }


def disguises(payload: object) -> dict[str, object]:
    """Places in a checkpoint where it may hide."""
    state = official_state(_KIND)
    return {
        "alone": payload,
        "as a weight": {**state, "classifier.weight": payload},
        "wrapped": {"model_state_dict": {**state, "classifier.bias": payload}},
        "beside the weights": {"model_state_dict": state, "epoch": payload},
        "as a key's part": {("classifier", payload): 0},
    }


def files(content: object) -> dict[str, Callable[[Path], None]]:
    """The ways in which torch.load may be given it."""
    ways: dict[str, Callable[[Path], None]] = {
        "torch": lambda path: torch.save(content, path),
        "torch before 1.6": lambda path: torch.save(content, path, _use_new_zipfile_serialization=False),
    }
    for protocol in (0, 2, pickle.HIGHEST_PROTOCOL):
        ways[f"pickle {protocol}"] = lambda path, p=protocol: path.write_bytes(pickle.dumps(content, protocol=p))
    return ways


def figures() -> Iterator[Figure]:
    start = time.perf_counter()
    refused = offered = dangerous = 0
    kept = []
    with tempfile.TemporaryDirectory() as folder:
        marker, path = Path(folder) / "marker", Path(folder) / "model.bin"
        for name, payload in payloads(marker).items():
            for content in disguises(payload).values():
                for write in files(content).values():
                    write(path)
                    refused += is_refused(path, marker)
                    offered += 1
            torch.save(payload, path)
            kept.append(name)
            dangerous += runs_code(path, marker) or name == "getattr"  # which alone only imports
    took = time.perf_counter() - start
    yield Figure(
        f"malicious pickles offered as an official checkpoint ({len(kept)} calls, 5 places, 5 file formats)",
        f"{refused} of {offered} refused, model untouched, nothing run",
        f"{offered} refused",
        refused == offered,
        took,
    )
    yield Figure(
        "the same pickles read without load_official: those that are what they say",
        f"{dangerous} of {len(kept)}",
        f"{len(kept)}",
        dangerous == len(kept),
    )


def is_refused(path: Path, marker: Path, load: Callable = load_official) -> bool:
    """Whether load(model, path) raises a ValueError that names the file, runs nothing and changes nothing."""
    model = base(_KIND)
    before = _bare_picture(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on the pickle's protocol
            load(model, path)
    except ValueError as error:
        said = str(path) in str(error)
    else:
        said = False
    return not _gone(marker) and said and _bare_picture(model) == before


def runs_code(path: Path, marker: Path) -> bool:
    """What the refusal is for: torch.load without weights_only."""
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    return _gone(marker)


def _gone(marker: Path) -> bool:
    """Whether marker was there; it no longer is."""
    there = marker.exists()
    if marker.is_dir():
        marker.rmdir()
    marker.unlink(missing_ok=True)
    return there


def _bare_picture(model: torch.nn.Module) -> tuple:
    values = tuple((name, value.numpy().tobytes()) for name, value in model.state_dict().items())
    return values, getattr(model, "adamix", None)
