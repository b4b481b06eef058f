"""One name's training on the disk: its adaptation as save_adamix writes it, and the state of its optimizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .._version import __version__
from ..models._files import (
    make_folder,
    one_writer,
    read_versioned,
    write_safetensors_by_digest,
    write_sealed_json,
)
from ..models.checkpoint import load_adamix, save_adamix
from ..models.header import read_tensors
from .job import PackJob
from .own import Own
from .reading import Folder

JOB_NAME = "adamix_job.json"
_VERSION = 1


class Saved(NamedTuple):
    """folder: of the adaptation. values: of the JSON. tensors: of the optimizer, "<number of the parameter>.<key>"."""

    job: PackJob
    folder: Path
    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def write(own: Own, model: nn.Module, place: Path) -> None:
    """model: in trainer.alone(). A new folder beside the old one; the JSON, written last, says which counts.

    Another process that saves into `place` is waited for: either would remove the folder that the other's JSON names.
    """
    with one_writer(make_folder(place)):
        _write(own, model, place)


def _write(own: Own, model: nn.Module, place: Path) -> None:
    number = 0
    while (fresh := place / f"step-{own.steps}{f'-{number}' if number else ''}").exists():
        number += 1
    save_adamix(model, fresh)
    state = own.optimizer.state_dict()
    tensors = {f"{n}.{key}": torch.as_tensor(v) for n, kept in state["state"].items() for key, v in kept.items()}
    file, digest = write_safetensors_by_digest(fresh, "optimizer", tensors)
    values = {
        "version": _VERSION,
        "package_version": __version__,
        "job": own.job.to_dict(),
        "steps": own.steps,
        "paused": own.paused,
        "folder": fresh.name,
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
        "schedule": {k: v for k, v in own.scheduler.state_dict().items() if k != "lr_lambdas"},
        "tensors": {"file": file.name, "bytes": file.stat().st_size, "sha256": digest},
    }
    write_sealed_json(place / JOB_NAME, values)
    for old in place.glob("step-*"):
        if old != fresh:
            shutil.rmtree(old, ignore_errors=True)


def read(folder: Folder) -> Saved:
    """Raises ValueError, naming the file, for one that is missing, damaged or of another version."""
    path = Path(folder) / JOB_NAME
    writer = "the folder of a name that PackTrainer.save wrote"
    values = read_versioned(path, writer, "a name's training", (_VERSION,))
    place = path.parent / values["folder"]
    return Saved(PackJob.from_dict(values["job"]), place, values, read_tensors(place, values["tensors"]))


def names_in(folder: Path) -> dict[str, Path]:
    """name -> folder of each that PackTrainer.save wrote. Raises ValueError where there is none."""
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{JOB_NAME}"))}
    if not found:
        raise ValueError(f"jobs: got {str(folder)!r}, which holds no {JOB_NAME}, expected a folder of PackTrainer.save")
    return found


def restore(own: Own, model: nn.Module, saved: Saved) -> None:
    """model: in trainer.alone(own.name). Raises ValueError where the folder does not fit the model."""
    load_adamix(model, saved.folder)
    state: dict[int, dict[str, Any]] = {}
    for key, value in saved.tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = own.optimizer.state_dict()["param_groups"]
    stored = saved.values["groups"]
    for group in stored:
        group["betas"] = tuple(group["betas"])
    own.optimizer.load_state_dict(
        {"state": state, "param_groups": [{**new, "params": old["params"]} for new, old in zip(stored, groups)]}
    )
    own.scheduler.load_state_dict({**own.scheduler.state_dict(), **saved.values["schedule"]})
    own.steps, own.paused = saved.values["steps"], saved.values["paused"]
