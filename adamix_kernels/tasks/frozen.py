"""The frozen encoder with a trained head, on features computed once: what an adaptation must be better than."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..models.pooling import mean_pool

WARMUP, WEIGHT_DECAY, EVAL_ROWS = 0.06, 0.01, 64
HEAD_LEARNING_RATE = 2e-2


def length_batches(lengths: Sequence[int], batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of every training batch, of like lengths: the same for the same lengths and seed."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = get_length_grouped_indices(list(lengths), batch_size, generator=generator)
        made = [order[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
        yield from (made[i] for i in torch.randperm(len(made), generator=generator).tolist())


def warmed_up(groups: list[tuple[float, list[nn.Parameter]]], steps: int) -> tuple[Any, Any]:
    """(optimizer, schedule): AdamW, linear warm-up over the first 6% of the steps, then linear decay to zero.

    Args:
        groups: (learning rate, parameters).
    """
    warmup = max(1, round(WARMUP * steps))
    optimizer = torch.optim.AdamW([{"params": p, "lr": lr} for lr, p in groups], weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    return optimizer, schedule


@torch.no_grad()
def mean_features(
    model: nn.Module, rows: Sequence[dict[str, Any]], collate: Callable[..., Any], on_batch: Callable[[int], Any] = int
) -> torch.Tensor:
    """Means of the last hidden states over each text [rows, H], float32 on the CPU, without dropout.

    They are what the head of load_classifier(pooling="mean") reads. The model is left in evaluation mode.

    Args:
        on_batch: called with the number of rows after each batch.

    Raises ValueError for a model without one state per token.
    """
    model.eval()
    device = next(model.parameters()).device
    encoder: Any = model.base_model
    pooled = []
    for start in range(0, len(rows), EVAL_ROWS):
        inputs = dict(collate(list(rows[start : start + EVAL_ROWS])))
        del inputs["labels"]
        inputs = {name: value.to(device) for name, value in inputs.items()}
        states = getattr(encoder(**inputs), "last_hidden_state", None)  # [B, S, H]
        mask = inputs["attention_mask"]
        if states is None or states.shape[:2] != mask.shape:
            raise ValueError(f"model: got a {type(model).__name__}, expected one state for each token")
        pooled.append(mean_pool(states, mask).float().cpu())
        on_batch(len(states))
    return torch.cat(pooled)


def train_linear(
    head: nn.Module,
    features: torch.Tensor,
    labels: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batches: Iterator[list[int]],
    steps: int,
    learning_rate: float = HEAD_LEARNING_RATE,
    on_step: Callable[[float, float], Any] = lambda _loss, _seconds: None,
) -> nn.Module:
    """Trains `head` on features [rows, H], batch by batch; returns it.

    Args:
        loss: of (head's output, labels). steps: as many as `batches` has.
        on_step: called with the loss and the seconds of each step.
    """
    optimizer, schedule = warmed_up([(learning_rate, list(head.parameters()))], steps)
    for rows in batches:
        start = time.perf_counter()
        value = loss(head(features[rows]), labels[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        on_step(value.item(), time.perf_counter() - start)
    return head
