"""What a trained AdaMix model scores merged, with each expert by itself, and routed at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..models.contexts import eval_routing, use_experts
from ..models.gating import routed_layers


def routing_scores(
    model: nn.Module, score: Callable[[nn.Module], float], draws: int = 5, level: str = "sample", seed: int = 0
) -> dict[str, Any]:
    """{"merged": score, "experts": [score of each], "random": [score of each draw]}, in evaluation mode.

    With learned gates "merged" is the score by these.

    Args:
        model: adapted, not merged; its mode is put back, and so is the random generator.
        score: of the model as it then routes, for instance its accuracy on a dev set.
        draws: random routings, at `level` ("batch", "sample" or "token"), with the seeds seed, seed + 1, ...

    Raises ValueError: `model` is not adapted or is merged, or `level` is none of these.

    Source: the violin plot of the AdaMix paper, merged against random routing.
    """
    experts = min(part.num_experts for part in routed_layers(model).values())
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            single, random = [], []
            for expert in range(experts):
                with use_experts(model, expert):
                    single.append(score(model))
            for draw in range(draws):
                torch.manual_seed(seed + draw)
                with eval_routing(model, level):
                    random.append(score(model))
            return {"merged": score(model), "experts": single, "random": random}
    finally:
        model.train(training)
