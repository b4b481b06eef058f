"""PackJob: how one name of a pack is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.config import AdaMixConfig
from ..models.objectives import MULTI_LABEL, REGRESSION
from ..ops._checks import check_positive
from ..routing import LEARNED

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
PROBLEMS = (REGRESSION, "single_label_classification", MULTI_LABEL, None)


@dataclass(frozen=True)
class PackJob:
    """One name's training in a PackTrainer: what is adapted, and AdamW with its own rate, schedule, seed and counter.

    w <- w - lr_t (m / (sqrt(v) + eps) + weight_decay w), as torch.optim.AdamW; biases and norms do not decay.

    Args:
        config: what is adapted, how many experts, how they are routed (per batch or per sample) and what the
            consistency of the two passes weighs (0: one pass).
        lr: learning rate. weight_decay, betas, eps: of AdamW.
        schedule: "constant", "constant_with_warmup", "linear" or "cosine", as transformers.get_scheduler makes it.
        warmup_steps: updates until lr is reached. total_steps: updates of the whole training; needed by "linear",
            "cosine" and PackTrainer.train.
        max_grad_norm: the name's gradients are clipped to this norm by themselves; None: never.
        label_smoothing: of the cross-entropy.
        labels: names of the classes, in id order; None: those of the model. The head gets as many columns.
        problem: problem_type as in a model's configuration; None: told by the labels.
        seed: of its first values, experts, dropout and order of rows, which no other name changes.

    Raises TypeError, ValueError: an argument is no such thing.

    Example:
        >>> job = PackJob(AdaMixConfig(num_experts=2, bottleneck=4), lr=1e-3, schedule="linear", total_steps=100)
        >>> job.config.num_experts, job.seed
        (2, 0)
    """

    config: AdaMixConfig
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0
    labels: Sequence[str] | None = None
    problem: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.config, AdaMixConfig):
            raise TypeError(f"config: got {type(self.config).__name__}, expected an AdaMixConfig")
        if self.config.routing == "token":
            raise ValueError(
                "config.routing: got 'token', expected 'batch' or 'sample', of which a pack trains several"
            )
        if self.config.routing == LEARNED:
            raise ValueError(
                "config.routing: got 'learned', expected 'batch' or 'sample': a pack trains no gates. "
                "AdaMixTrainer does; pack what merge(model, gates='mean') gives"
            )
        for name in ("lr", "weight_decay", "eps", "label_smoothing"):
            _number(name, getattr(self, name))
        if not isinstance(self.betas, Sequence) or len(self.betas) != 2 or not all(_below_one(b) for b in self.betas):
            raise ValueError(f"betas: got {self.betas!r}, expected two numbers from 0 to below 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: got {self.schedule!r}, expected one of {', '.join(map(repr, SCHEDULES))}")
        check_positive(0, warmup_steps=self.warmup_steps, seed=self.seed)
        if self.total_steps is not None:
            check_positive(total_steps=self.total_steps)
        elif self.schedule in ("linear", "cosine"):
            raise ValueError(f"total_steps: got None for the schedule {self.schedule!r}, expected how many updates")
        if self.max_grad_norm is not None:
            _number("max_grad_norm", self.max_grad_norm, above=True)
        if not self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: got {self.label_smoothing!r}, expected a number from 0 to below 1")
        if self.problem not in PROBLEMS:
            raise ValueError(f"problem: got {self.problem!r}, expected one of {', '.join(map(repr, PROBLEMS))}")
        if self.labels is not None:
            names = list(self.labels) if isinstance(self.labels, Sequence) else []
            if isinstance(self.labels, str) or not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"labels: got {self.labels!r}, expected the names of the classes, or None")
            if len(set(names)) < len(names):
                raise ValueError(f"labels: got {self.labels!r}, expected each name once")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        labels = None if self.labels is None else list(self.labels)
        return {**values, "config": self.config.to_dict(), "betas": list(self.betas), "labels": labels}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PackJob:
        """Raises TypeError, ValueError for anything to_dict() did not give."""
        return cls(**{**values, "config": AdaMixConfig.from_dict(values["config"]), "betas": tuple(values["betas"])})


def _number(name: str, value: object, above: bool = False) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0 or (above and value == 0):  # type: ignore[operator]  # fits says that it is a number
        raise ValueError(f"{name}: got {value!r}, expected a number {'above 0' if above else 'of at least 0'}")


def _below_one(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
