"""Text to padded batches."""

from __future__ import annotations

from typing import Any

from .text import TextSplit


def tokenize(split: TextSplit, tokenizer: Any, max_tokens: int) -> list[dict[str, Any]]:
    """One dict a row, unpadded: what the tokenizer makes of it, at most max_tokens ids, and `labels`."""
    pairs = [] if split.pairs is None else [split.pairs]
    encoded = tokenizer(split.texts, *pairs, truncation=True, max_length=max_tokens)
    return [{**{k: encoded[k][i] for k in encoded}, "labels": label} for i, label in enumerate(split.labels)]


def collator(tokenizer: Any) -> Any:
    """Rows to tensors [B, S], padded to the longest row of the batch; a callable for Trainer as well."""
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)
