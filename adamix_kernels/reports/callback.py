"""TrainingReport: a callback for AdaMixTrainer that leaves a picture, a JSON file and TensorBoard scalars."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .._extras import needed
from ..models._files import make_folder, write_json
from ..models.gate_training import NAMES
from . import figures
from .observers import Agreement, DrawCounter
from .routings import routing_scores

with needed("TrainingReport"):
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)

REPORT_NAME = "training_report"


class TrainingReport(TrainerCallback):
    """Losses and agreement of the passes over steps, expert usage, merged experts against single ones.

    At the end of training `folder` holds training_report.png, training_report.json and, where tensorboard is
    installed, event files in tensorboard/ with the scalars adamix/loss, adamix/cross_entropy, adamix/consistency,
    adamix/agreement (with learned gates adamix/balance_loss and adamix/z_loss) and, at the last step,
    adamix/usage/expert_N and adamix/<score_name>/{merged,expert_N,random}.

    Args:
        folder: made if it is not there. Only the first process writes, what it saw itself.
        score: score(model) -> number, the model being in evaluation mode and routed as the report asks; None leaves
            that panel out. It is called once merged, once an expert and `draws` times with random routing per sample.
        score_name: what the number is.
        tensorboard: True asks for it, False does without, None takes it where it is installed.

    The agreement is that of sequence classifiers; models that predict tokens have none here. A compiled model is
    not watched: its usage and agreement stay empty.

    Raises:
        ModuleNotFoundError: tensorboard=True and torch.utils.tensorboard cannot be imported.
        ValueError: at the start of training, the model is not adapted.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        score: Callable[[nn.Module], float] | None = None,
        score_name: str = "accuracy",
        draws: int = 5,
        tensorboard: bool | None = None,
    ):
        self.folder, self.score, self.score_name, self.draws = Path(folder), score, score_name, draws
        self.points: list[dict[str, float | None]] = []
        self.usage: list[list[float]] = []
        self.routings: dict[str, Any] = {}
        self._writer_class = None if tensorboard is False else _summary_writer(required=bool(tensorboard))
        self._writer: Any = None
        self._counter: DrawCounter | None = None
        self._agreement: Agreement | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._counter, self._agreement = DrawCounter(model), Agreement(model)
        self.points, self.usage, self.routings = [], [], {}
        if getattr(args, "torch_compile", False):
            logger.warning("TrainingReport: a compiled model is not watched, expert usage and agreement stay empty")
            return
        self._counter.start()
        self._agreement.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or "learning_rate" not in logs or self._agreement is None:
            return
        names = ("loss", "cross_entropy", "consistency", *(name for name in NAMES if name in logs))
        point = {"step": state.global_step, **{n: logs.get(n) for n in names}, "agreement": self._agreement.take()}
        self.points.append(point)
        if state.is_world_process_zero:
            self._scalars({n: v for n, v in point.items() if n != "step"}, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._counter is None or self._agreement is None:
            return
        self._counter.stop()
        self._agreement.stop()
        if not state.is_world_process_zero:
            return
        self.usage = self._counter.shares()
        if self.score is not None:
            self.routings = routing_scores(model, self.score, self.draws)
        last = {f"usage/expert_{n}": sum(column) / len(column) for n, column in enumerate(zip(*self.usage))}
        if self.routings:
            single = {f"expert_{n}": v for n, v in enumerate(self.routings["experts"])}
            random = self.routings["random"]
            every = {"merged": self.routings["merged"], **single}
            if random:
                every["random"] = sum(random) / len(random)
            last |= {f"{self.score_name}/{n}": v for n, v in every.items()}
        self._scalars(last, state.global_step)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.write()

    def write(self) -> Path:
        """Writes the JSON file and the picture as they stand; returns the picture's path."""
        folder = make_folder(self.folder)
        values = {"points": self.points, "usage": self.usage, "score": self.score_name, "routings": self.routings}
        write_json(folder / f"{REPORT_NAME}.json", values)
        plt = figures.pyplot()
        figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
        steps = [p["step"] for p in self.points]
        names = ("loss", "cross_entropy", "consistency", *(n for n in NAMES if any(n in p for p in self.points)))
        losses = {n.replace("_", "-"): [p.get(n) for p in self.points] for n in names}
        figures.draw_curves(panels[0, 0], steps, losses, "training loss")
        agreement = {"agreement": [p["agreement"] for p in self.points]}
        figures.draw_curves(panels[0, 1], steps, agreement, "both passes give the same class")
        if self.usage:
            figures.draw_usage(panels[1, 0], self.usage)
        if self.routings:
            groups = {"random routing": self.routings["random"], "one expert": self.routings["experts"]}
            figures.draw_routings(panels[1, 1], groups, [self.routings["merged"]], self.score_name)
        for panel, shown in ((panels[1, 0], self.usage), (panels[1, 1], self.routings)):
            panel.set_axis_on() if shown else panel.set_axis_off()
        return figures.save_figure(figure, folder / f"{REPORT_NAME}.png")

    def _scalars(self, values: dict[str, float | None], step: int) -> None:
        if self._writer_class is None:
            return
        if self._writer is None:
            self._writer = self._writer_class(str(make_folder(self.folder) / "tensorboard"))
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(f"adamix/{name}", value, step)


def _summary_writer(required: bool) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if required:
            raise ModuleNotFoundError("tensorboard: got True, but the package tensorboard is not installed") from error
        return None
    return SummaryWriter
