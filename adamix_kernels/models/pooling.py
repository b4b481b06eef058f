"""What a classification head reads: what the model has it read, or the mean of the last hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

POOLINGS = ("auto", "mean", "model")
MARK = "adamix_pooling"  # of the model's configuration, which a plain checkpoint keeps


def pooling_of(model: nn.Module) -> str | None:
    """What set_pooling made of `model`, "mean" or "model"; None where it was not called."""
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and any(hook in base._forward_hooks.values() for hook in _HOOKS.values()):
        return "mean"
    return "model" if getattr(getattr(model, "config", None), MARK, None) == "model" else None


def set_pooling(model: nn.Module, pooling: str) -> str:
    """Makes the head read the mean ("mean"), leaves it what it has ("model"), or takes the mean where it can be
    ("auto"); marks the model's config, and returns what it is now, "mean" or "model".

    Raises ValueError: the head reads the mean already, and pooling is "model"; or pooling is "mean", and the head reads
    neither a pooler nor the first token.
    """
    owner: Any = model
    taken = "model" if pooling == "model" else "mean"
    if pooling_of(model) == "mean":
        if taken == "model":
            raise ValueError(
                "pooling: got 'model' for a model whose head reads the mean, expected 'mean', or a new model"
            )
    elif taken == "mean":
        place = head_reads(model)
        if place is not None:
            owner.base_model.register_forward_hook(_HOOKS[place], with_kwargs=True)
        elif pooling == "mean":
            raise ValueError(
                f"pooling: got 'mean' for a {type(model).__name__}, whose head reads neither a pooler nor the first "
                "token, expected 'model'"
            )
        else:
            taken = "model"
    setattr(owner.config, MARK, taken)
    return taken


@torch.no_grad()
def head_reads(model: nn.Module) -> str | None:
    """ "pooler", "first" (the first token's last hidden state), or None for anything else.

    Tried on the head alone, in evaluation mode: which change of what the base gives changes the logits. A BERT's
    reads its pooler; a RoBERTa's the first token, and so does a BigBird's, which has a pooler; a decoder's the last.
    """
    base: Any = getattr(model, "base_model", model)
    if base is model:
        return None
    training = model.training
    model.eval()
    try:
        plain, pooler, first, others = (_head(model, base, change) for change in (None, "pooler", "first", "others"))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):  # it wants more than text
        return None
    finally:
        model.train(training)
    if not torch.equal(plain, pooler):
        return "pooler"
    return "first" if not torch.equal(plain, first) and torch.equal(plain, others) else None


def _head(model: nn.Module, base: Any, change: str | None) -> torch.Tensor:
    """The logits of three tokens, where the base gives the same states and pooler's output but for one of them."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    owner: Any = model
    width, at = owner.config.hidden_size, {"dtype": owner.dtype, "device": owner.device}
    states = torch.linspace(-1, 1, 3 * width, **at).view(1, 3, width).clone()
    pooled = torch.linspace(-1, 2 if change == "pooler" else 1, width, **at).view(1, width)
    if change == "first":
        states[:, 0] = states[:, 0].flip(-1)
    elif change == "others":
        states[:, 1:] = states[:, 1:].flip(-1)
    ids = torch.full((1, 3), int(owner.config.pad_token_id == 0), dtype=torch.int64, device=at["device"])
    had = vars(base).get("forward")
    base.forward = lambda *_args, **_options: BaseModelOutputWithPooling(
        last_hidden_state=states, pooler_output=pooled if getattr(base, "pooler", None) is not None else None
    )
    try:
        logits: torch.Tensor = model(ids).logits
    finally:
        if had is None:
            del base.forward
        else:
            base.forward = had
    return logits


def mean_pool(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """sum_s mask_s h_s / max(1, sum_s mask_s). states: [B, S, H]. mask: [B, S], 1 for text, 0 for padding (None: 1).

    -> [B, H]; zeros of a row that is all padding, as for SentenceRouter.
    """
    if mask is None:
        return states.mean(1)
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def pool_by_mean(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook on the encoder: its pooler's output becomes the mean, everything else stays."""
    output["pooler_output"] = _mean(kwargs, output.last_hidden_state)
    return output


def mean_first(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook on the encoder: its first token's last state becomes the mean, everything else stays."""
    states = output.last_hidden_state
    output["last_hidden_state"] = torch.cat([_mean(kwargs, states).unsqueeze(1), states[:, 1:]], 1)
    return output


def _mean(kwargs: dict[str, Any], states: torch.Tensor) -> torch.Tensor:
    # With prefix tuning the mask is longer: the prefix stands before the text.
    mask = kwargs.get("attention_mask")
    return mean_pool(states, None if mask is None else mask[:, -states.shape[1] :])


_HOOKS = {"pooler": pool_by_mean, "first": mean_first}
