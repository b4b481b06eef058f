"""Warns where an adapted model trains without its second pass, with one that measures dropout, in 16-bit parameters, or
where it has learned nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import nn

from ..ops._passes import LOOKS
from ..routing import LEARNED
from .state import AdaMixState

logger = logging.getLogger(__name__)

# Forwards after which a missing trace is believed, should no backward be noticed.
_PATIENCE = 4
# From here on a symmetric KL between two dropout masks outweighs the cross-entropy.
_LARGE_WEIGHT = 10.0
# Bits of a value.
_SIGNIFICANT = {torch.bfloat16: 8, torch.float16: 11}
# A cross-entropy that ends above this part of its first has not fallen; fewer logs do not tell.
_STANDSTILL, _LOGS = 0.98, 8
# Of the head, which is trained.
_HEADS_OWN = ("classifier_dropout", "summary_first_dropout")


class PassWatch:
    """Counts the training forwards of one model until it knows whether both passes are looked at.

    Two forwards with a backward and no trace (see ops/_passes.py) in between: a stock Trainer, or a loop that does
    not know of AdaMix. Two forwards without a backward may be the two passes, one after the other. A copy of the model
    counts anew.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self.count = 0
        self.backwards = False
        self.hook: Any = None

    def __reduce__(self) -> tuple[type[PassWatch], tuple[()]]:
        return PassWatch, ()

    def forward(self, model: nn.Module, state: AdaMixState) -> None:
        """Before a training forward that is not compiled. Warns if need be, and leaves the state when it knows."""
        if not _needs_two_passes(model, state):
            return
        self.forwards += 1
        if self.forwards == 1:
            warn_of_dropout(model, state)
            self.count = LOOKS.count
            trained = next((p for p in model.parameters() if p.requires_grad), None)
            self.hook = None if trained is None else trained.register_hook(self._after_backward)
            return
        looked = LOOKS.compiled or LOOKS.count != self.count
        if not (looked or self.backwards or self.forwards >= _PATIENCE):
            return
        state.watch = None
        if self.hook is not None:
            self.hook.remove()
        if not looked:
            logger.warning(
                "%s trains without AdaMix's second pass: consistency_weight is %g, but no batch is doubled and no "
                "consistency loss is computed%s. Train with "
                "AdaMixTrainer (AdaMixTrainerMixin before another trainer: class T(AdaMixTrainerMixin, SFTTrainer)), "
                "use double_batch and adamix_loss in a loop of your own, or adapt with consistency_weight=0 for one "
                "pass.",
                type(model).__name__,
                state.config.consistency_weight,
                ", and the halves of each batch go to different experts" if state.router.level == "batch" else "",
            )

    def _after_backward(self, _gradient: torch.Tensor) -> None:
        self.backwards = True


def _needs_two_passes(model: nn.Module, state: AdaMixState) -> bool:
    return state.config.consistency_weight != 0 and state.router.passes == 2 and _draws(model, state)


def _draws(model: nn.Module, state: AdaMixState) -> bool:
    """Whether a training forward draws experts, and the caller or trained merge scores do not say which."""
    router = state.router
    if state.merged or not router.enabled or router.force_merged or router.experts is not None:
        return False
    layer = model.get_submodule(state.paths[0])
    scores = (p for name, p in layer.named_parameters() if name.endswith("_score"))
    return not any(p.requires_grad for p in scores)  # learn_merging: the merged experts train


def warn_of_dropout(model: nn.Module, state: AdaMixState) -> None:
    """Once a model: a large consistency weight on a frozen base that drops units, in each pass others."""
    weight = state.config.consistency_weight
    if state.told_of_dropout or weight < _LARGE_WEIGHT or state.router.passes != 2:
        return
    state.told_of_dropout = True
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    found = dict(_dropouts(values))
    if not found:
        return
    logger.warning(
        "consistency_weight is %g, and the frozen base has dropout (%s): each pass drops other units, and the KL "
        "measures that, %g-fold, before it measures the experts. Load the model without: from_pretrained(..., %s); the "
        "reference project's GPT-2, which has the weight 100, has no such dropout.",
        weight,
        ", ".join(f"{name}={value:g}" for name, value in found.items()),
        weight,
        ", ".join(f"{name.rpartition('.')[2]}=0.0" for name in found),
    )


def warn_of_rounding(model: nn.Module) -> None:
    """Before a training of 16-bit parameters, which the head of a 16-bit base is: banks are in float32."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.dtype in _SIGNIFICANT}
    if trained:
        first, dtype = next((name, p.dtype) for name, p in trained.items())
        logger.warning(
            "%d trained parameters are %s (%s, ...): an optimizer's step of less than about 1/%d of a value is rounded "
            "away. Load the base in float32, from_pretrained(..., dtype=torch.float32), and train with bf16=True.",
            len(trained),
            str(dtype).removeprefix("torch."),
            first,
            2 ** _SIGNIFICANT[dtype],
        )


def _dropouts(values: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, float]]:
    """(field, probability) of every dropout in a configuration, those of its parts too."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            if name.endswith("_config"):
                yield from _dropouts(value, f"{outer}{name}.")
        elif ("drop" in name) and name not in _HEADS_OWN and isinstance(value, (int, float)) and 0 < value < 1:
            yield outer + name, value


def warn_of_standstill(history: Sequence[Mapping[str, Any]], model: nn.Module, state: AdaMixState) -> None:
    """After a training of drawn experts: its last quarter's cross-entropy is where its first quarter's was.

    history: the trainer's logs.
    """
    values = [log["cross_entropy"] for log in history if "cross_entropy" in log]
    quarter = len(values) // 4
    if state.config.num_experts == 1 or state.config.routing == LEARNED or len(values) < _LOGS:
        return
    if not _draws(model, state):
        return
    first, last = mean(values[:quarter]), mean(values[-quarter:])
    if last > _STANDSTILL * first:
        logger.warning(
            "cross-entropy did not fall in this training: %.3f in the first quarter of its steps, %.3f in the last. "
            "Try %sa lower learning rate with more epochs: above some rate, which is lower than one adapter's, drawn "
            "experts drift apart faster than they learn",
            first,
            last,
            "" if state.config.share else "share='up' (one bank for all experts on a side, as published) or ",
        )
