"""What a training was begun with, which adamix train --resume is held against."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..models._files import read_versioned, write_sealed_json
from ..models.base_weights import others
from ..models.config import AdaMixConfig
from ..models.header import CHECKPOINT_NAME, read_header
from ..models.run_values import run_folder
from ..tasks import Run, TextTask, read_run, write_run
from ..tasks.run_file import RUN_NAME

BEGUN_NAME = "adamix_begun.json"
_VERSION = 1
# The optimizer's state has its own of most of these, and the order of the rows is drawn by the seeds.
_SETTINGS = (
    "seed", "data_seed", "learning_rate", "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon",
)  # fmt: skip
# May change on the way; what comes out is then of neither.
_PACE = (
    "num_train_epochs", "max_steps", "warmup_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "world_size", "max_grad_norm", "optim", "bf16", "fp16",
)  # fmt: skip
_COLUMNS = ("text_column", "text_pair_column", "label_column")
_OF_RUN = ("task", "label_names", *_COLUMNS, "task_column", "task_names", "dev_fraction", "max_tokens", "pooling")
_SPELLED = {"label_names": "labels", "task_names": "tasks", "world_size": "processes"}  # what is no option
_SHOWN = 3


@dataclass(frozen=True)
class Begun:
    """rows: a digest of the task's rows. settings, pace: values by option."""

    run: Run
    config: AdaMixConfig
    rows: str
    settings: dict[str, Any]
    pace: dict[str, Any]

    @classmethod
    def of(cls, options: Any, run: Run, config: AdaMixConfig, task: TextTask) -> Begun:
        """options: of adamix train, after what they leave open was chosen."""
        arguments = options.arguments
        settings = {name: _plain(getattr(arguments, name)) for name in _SETTINGS}
        settings["head_learning_rate"] = options.fit.head_learning_rate
        settings["max_train_rows"] = options.data.max_train_rows
        pace = {name: _plain(getattr(arguments, name)) for name in _PACE}
        return cls(run, config, _digest(task), settings, pace)

    def write(self, folder: str) -> None:
        """The run file, too, so that a checkpoint of an interrupted run can be used."""
        values = {"version": _VERSION, "rows": self.rows, "settings": self.settings, "pace": self.pace}
        write_sealed_json(Path(folder) / BEGUN_NAME, values)
        write_run(folder, self.run)

    def check(self, checkpoint: str | None, out: str, model: nn.Module) -> list[str]:
        """What a person should be told before it goes on; model: the base, before it is adapted.

        Raises ValueError, before anything is written, where --out, or the run of the checkpoint, is of another model,
        other rows, or settings that a checkpoint cannot change.
        """
        header = {} if checkpoint is None else _header(checkpoint)
        places = {os.path.realpath(out): Path(out)}
        beside = None if checkpoint is None else run_folder(Path(checkpoint).absolute())
        if beside is not None:
            places.setdefault(os.path.realpath(beside), beside)
        notes: list[str] = []
        found = self._config_differs(header)
        for place in places.values():
            if (place / RUN_NAME).is_file():
                run, stored = read_run(place), _read(place)
                found = [*self._differs(run, stored, model, header), *found]
                notes += self._paced(stored)
            if found:
                shown = found[:_SHOWN]
                was, now = (" and ".join(pair[side] for pair in shown) for side in (0, 1))
                raise ValueError(
                    f"resume: the training in {str(place)!r} was begun with {was}, got {now}, expected the same "
                    "command, or another --out, without --resume"
                )
        return notes

    def _differs(
        self, run: Run, stored: dict[str, Any], model: nn.Module, header: dict[str, Any]
    ) -> list[tuple[str, str]]:
        """(what it was, what it is now) of all that may not change."""
        found = []
        here = dict(model.named_parameters())
        weights = {n: v for n, v in (header.get("base_model", {}).get("weights") or {}).items() if n in here}
        copied = not others(model, weights) if weights else _same_name(run.model, self.run.model)
        if not copied and not _same_place(run.model, self.run.model):
            found.append((f"--model {run.model}", f"--model {self.run.model}"))
        elsewhere = not _same_place(run.data, self.run.data)
        other_rows = "rows" in stored and stored["rows"] != self.rows
        if elsewhere and (other_rows if "rows" in stored else not _same_name(run.data, self.run.data)):
            found.append((f"--data {run.data}", f"--data {self.run.data}"))
        unknown = () if run.text_column else _COLUMNS  # an older run
        pairs = [(n, getattr(run, n), getattr(self.run, n)) for n in _OF_RUN if n not in unknown]
        pairs += [(n, stored.get("settings", {}).get(n, value), value) for n, value in self.settings.items()]
        found += [(_said(n, was), _said(n, now)) for n, was, now in pairs if was != now]
        if other_rows and not found:
            found.append((f"other rows of --data {run.data}", "those that are there now"))
        return found

    def _config_differs(self, header: dict[str, Any]) -> list[tuple[str, str]]:
        if not header:
            return []
        was, now = (_as_read(config) for config in (AdaMixConfig.from_dict(header["config"]), self.config))
        names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        return [(_said(name, was.get(name)), _said(name, now.get(name))) for name in names]

    def _paced(self, stored: dict[str, Any]) -> list[str]:
        before = stored.get("pace", {})
        changed = [n for n, now in self.pace.items() if n in before and before[n] != now]
        if not changed:
            return []
        was, now = (" and ".join(_said(n, values[n]) for n in changed) for values in (before, self.pace))
        return [f"the training was begun with {was}, and goes on with {now}: the result is not that of one command"]


def _read(place: Path) -> dict[str, Any]:
    """Empty for a run of an older release."""
    path = place / BEGUN_NAME
    return read_versioned(path, "a run of adamix train", "a run's beginning", (_VERSION,)) if path.is_file() else {}


def _header(checkpoint: str) -> dict[str, Any]:
    path = Path(checkpoint) / CHECKPOINT_NAME
    return read_header(path) if path.is_file() else {}


def _same_place(was: str, now: str) -> bool:
    return was == now or (os.path.exists(was) and os.path.exists(now) and os.path.samefile(was, now))


def _same_name(was: str, now: str) -> bool:
    """_same_place, or a run was moved away from what it is of, which is known by its last name alone then."""
    return _same_place(was, now) or (not os.path.exists(was) and was == Path(now).name)


def _said(name: str, value: Any) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    spelled = _SPELLED.get(name, f"--{name}")
    return f"{spelled} {'none' if value is None or shown == '' else shown}"


def _plain(value: Any) -> Any:
    """Of an enumeration its value."""
    return str(value.value) if hasattr(value, "value") else value


def _as_read(config: AdaMixConfig) -> dict[str, Any]:
    return {n: list(v) if isinstance(v, (tuple, set, frozenset)) else v for n, v in config.to_dict().items()}


def _digest(task: TextTask) -> str:
    found = hashlib.sha256(repr(task.label_names).encode())
    for split in (task.train, task.dev):
        for column in (split.texts, split.pairs or (), split.labels, split.tasks or ()):
            found.update(b"|%d|" % len(column))
            for value in column:
                text = (value if isinstance(value, str) else repr(value)).encode("utf-8", "surrogatepass")
                found.update(b"%d:" % len(text))
                found.update(text)
    return found.hexdigest()
