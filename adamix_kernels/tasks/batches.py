"""Text to padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..models.gate_training import tasks_of
from ..models.gating import TASK_IDS
from .cuts import Cuts
from .text import TextSplit


def tokenize(
    split: TextSplit, tokenizer: Any, max_tokens: int, cuts: Cuts | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """One dict a row, unpadded: what the tokenizer makes of it, at most max_tokens ids; `labels`, and `task_ids`.

    cuts: counts the rows that are longer.
    """
    pairs = [] if split.pairs is None else [split.pairs]
    encoded = tokenizer(split.texts, *pairs, truncation=True, max_length=max_tokens)
    if cuts is not None:
        cuts.count(encoded, max_tokens)
    rows = [{**{k: encoded[k][i] for k in encoded}, "labels": label} for i, label in enumerate(split.labels)]
    return rows if split.tasks is None else with_tasks(rows, split.tasks)


def with_tasks(rows: list[dict[str, Any]], tasks: Sequence[int]) -> list[dict[str, Any]]:
    """The rows with `task_ids`, which gates by task take."""
    return [{**row, TASK_IDS: task} for row, task in zip(rows, tasks, strict=True)]


def without_tasks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as a model without gates takes them."""
    return [{name: value for name, value in row.items() if name != TASK_IDS} for row in rows]


def collator(tokenizer: Any) -> Any:
    """Rows to tensors [B, S], padded to the longest row of the batch; a callable for Trainer as well."""
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)


@torch.inference_mode()
def predict(
    model: nn.Module,
    rows: list[dict[str, Any]],
    collate: Callable[..., Any],
    batch_size: int = 64,
    progress: bool = False,
) -> torch.Tensor:
    """Logits [rows, classes] in float32 on the CPU, in the rows' order; the model is left in evaluation mode."""
    from tqdm.auto import tqdm

    model.eval()
    device = next(model.parameters()).device
    # Longest first: batches of similar length need little padding.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    logits = []
    for start in tqdm(range(0, len(order), batch_size), unit="batch", disable=not progress):
        inputs = dict(collate([rows[i] for i in order[start : start + batch_size]]))
        inputs.pop("labels", None)
        inputs = {k: v.to(device) for k, v in inputs.items()}
        with tasks_of(model, inputs):
            logits.append(model(**inputs).logits.float().cpu())
    return torch.cat(logits)[torch.tensor(order).argsort()]


def accuracy(logits: torch.Tensor, rows: list[dict[str, Any]]) -> float:
    """Share of rows whose largest logit is their label's, in percent."""
    labels = torch.tensor([row["labels"] for row in rows])
    return 100 * (logits.argmax(-1) == labels).float().mean().item()
