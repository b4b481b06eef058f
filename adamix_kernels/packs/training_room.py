"""What a PackTrainer has room for, checked before anything changes; and its model as one name alone sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from .._backends import check_request
from ..models.inject import check_bare
from ..models.merging import unmerge
from ..models.state import check_model
from ..ops._checks import check_positive
from . import training_folder
from .banks import TrainedBank
from .job import PackJob
from .own import Own, processes, swapped
from .reading import Folder
from .slots import Shape

Jobs = Mapping[str, PackJob | Folder]


class NoNames:
    """What use_experts, merge and save_adamix find on a model whose names are being trained."""

    def use(self, *_arguments: Any) -> AbstractContextManager[None]:
        raise ValueError('model: got a pack that is being trained, expected `with trainer.alone("name") as model`')

    def set_centroid(self, *arguments: Any) -> None:
        self.use(*arguments)


def checked(
    model: nn.Module, jobs: Jobs | Folder, capacity: int | None, max_rank: int, max_experts: int, backend: str
) -> tuple[Jobs, int]:
    """PackTrainer's arguments: the jobs by name, and the capacity. Raises TypeError, ValueError."""
    check_model(model)
    check_request(backend)
    check_bare(model)
    if isinstance(jobs, (str, os.PathLike)):
        jobs = training_folder.names_in(Path(jobs))
    if not isinstance(jobs, Mapping) or not jobs:
        raise ValueError(f"jobs: got {jobs!r}, expected names with a PackJob or a folder each, one at least")
    room = len(jobs) if capacity is None else capacity
    check_positive(capacity=room, max_rank=max_rank, max_experts=max_experts)
    if room < len(jobs):
        raise ValueError(f"capacity: got {capacity} for {len(jobs)} jobs, expected as many at least")
    return jobs, room


def free_slot(name: str, owns: Iterable[Own], capacity: int) -> int:
    """The first place that none of `owns` has. Raises ValueError where there is none."""
    taken = {own.slot for own in owns}
    slot = next((n for n in range(capacity) if n not in taken), None)
    if slot is None:
        raise ValueError(f"name: got {name!r} and {capacity} names already, expected a larger capacity")
    return slot


def check_room(own: Own, banks: Mapping[str, TrainedBank], heads: Mapping[str, nn.Module], experts: int) -> None:
    """Raises ValueError for a name that does not fit what was made at the start."""
    more = sorted((set(own.layers) - set(banks)) | (set(own.heads) - set(heads)))
    if more:
        raise ValueError(f"{more[0]}: got a job that trains it, expected the layers and heads of the first jobs alone")
    for path, layer in own.layers.items():
        here, new = banks[path].shape, Shape.of(layer)
        if dataclasses.replace(new, rank=here.rank) != here or new.rank > here.rank:
            raise ValueError(f"{path}: got {new}, expected {here} with a rank of at most {here.rank} (max_rank)")
    if own.job.config.num_experts > experts:
        raise ValueError(f"num_experts: got {own.job.config.num_experts}, expected at most {experts} (max_experts)")


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError for fewer rows of a name than there are processes."""
    check_positive(batch_size=batch_size)
    if batch_size < processes():
        raise ValueError(
            f"batch_size: got {batch_size} for {processes()} processes, expected at least {processes()}: a process "
            "without rows would keep the others waiting"
        )


@contextlib.contextmanager
def alone(model: Any, own: Own, bare: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it `model` is what adapt() gave for `own`; bare: the base's modules by path. A merge is undone."""
    config = getattr(model, "config", None)
    before, facts = model.adamix, None if config is None else dict(vars(config))
    had = getattr(model, "num_labels", None)
    with swapped(model, {**bare, **own.layers, **own.heads}):
        model.adamix = own.state
        if own.job.labels is not None and config is not None:
            config.id2label = dict(enumerate(own.job.labels))
            config.label2id = {label: n for n, label in enumerate(own.job.labels)}
            config.problem_type = own.job.problem
            if had is not None:
                model.num_labels = len(own.job.labels)
        try:
            yield
        finally:
            if own.state.merged:
                unmerge(model)
            model.adamix = before
            if config is not None and facts is not None:
                vars(config).clear()
                vars(config).update(facts)
            if had is not None:
                model.num_labels = had


def job_of(job: PackJob | Folder, saved: training_folder.Saved | None) -> PackJob:
    return job if isinstance(job, PackJob) else saved.job  # type: ignore[union-attr]  # read, where it is a folder


def is_over(name: str, own: Own) -> bool:
    """Raises ValueError for a job without total_steps."""
    if own.job.total_steps is None:
        raise ValueError(f"{name}: got a job without total_steps, expected how many updates train() makes")
    return own.steps >= own.job.total_steps
