"""What a classification head reads: the model's own pooler, or the mean of the last hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

POOLINGS = ("auto", "mean", "model")
MARK = "adamix_pooling"  # of the model's configuration, which a plain checkpoint keeps


def pooling_of(model: nn.Module) -> str | None:
    """What set_pooling made of `model`, "mean" or "model"; None where it was not called."""
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and pool_by_mean in base._forward_hooks.values():
        return "mean"
    return "model" if getattr(getattr(model, "config", None), MARK, None) == "model" else None


def set_pooling(model: nn.Module, pooling: str) -> None:
    """Makes the head read the mean ("mean"), or leaves it what it has ("model"), and marks the model's config.

    Raises ValueError: the head reads the mean already, and pooling is "model".
    """
    before = pooling_of(model)
    if before == "mean" != pooling:
        raise ValueError("pooling: got 'model' for a model whose head reads the mean, expected 'mean', or a new model")
    owner: Any = model
    if pooling == "mean" != before:
        owner.base_model.register_forward_hook(pool_by_mean, with_kwargs=True)
    setattr(owner.config, MARK, pooling)


@torch.no_grad()
def reads_pooler(model: nn.Module) -> bool:
    """Whether the logits change when the pooler's output does: tried on the head alone, in evaluation mode.

    A BERT's do. A RoBERTa's head takes the first token itself and a decoder's the last one: neither has a pooler.
    A BigBird has one, and its head does not look at it.
    """
    base: Any = getattr(model, "base_model", model)
    if base is model or getattr(base, "pooler", None) is None:
        return False
    training = model.training
    model.eval()
    try:
        logits = [_head(model, base, shift) for shift in (0.0, 1.0)]
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):  # it wants more than text
        return False
    finally:
        model.train(training)
    return not torch.equal(*logits)


def _head(model: nn.Module, base: Any, shift: float) -> torch.Tensor:
    """The logits of three tokens, where the base gives the same states and another pooler's output with each shift."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    owner: Any = model
    width, at = owner.config.hidden_size, {"dtype": owner.dtype, "device": owner.device}
    states = torch.linspace(-1, 1, 3 * width, **at).view(1, 3, width)
    pooled = torch.linspace(-1, 1 + shift, width, **at).view(1, width)
    had = vars(base).get("forward")
    base.forward = lambda *_args, **_options: BaseModelOutputWithPooling(states, pooled)
    try:
        logits: torch.Tensor = model(torch.zeros(1, 3, dtype=torch.int64, device=at["device"])).logits
    finally:
        if had is None:
            del base.forward
        else:
            base.forward = had
    return logits


def mean_pool(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """sum_s mask_s h_s / sum_s mask_s. states: [B, S, H]. mask: [B, S], 1 for text, 0 for padding (None: 1).

    -> [B, H].
    """
    if mask is None:
        return states.mean(1)
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def pool_by_mean(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook on the encoder: its pooler's output becomes the mean, everything else stays."""
    if getattr(output, "pooler_output", None) is not None:
        states = output.last_hidden_state
        # With prefix tuning the mask is longer: the prefix stands before the text.
        mask = kwargs.get("attention_mask")
        output["pooler_output"] = mean_pool(states, None if mask is None else mask[:, -states.shape[1] :])
    return output
