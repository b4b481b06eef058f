"""Both passes in one batch: doubling a model's inputs, and taking the first pass out of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..ops._passes import looked

# Arguments without a batch axis, whose first dimension may equal the batch size by chance.
_UNBATCHED = frozenset({"cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask"})
BATCHED = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "attention_mask")


def double_batch(inputs: Any, batch_size: int | None = None) -> Any:
    """[B, ...] -> [2B, ...]: every tensor of a batch twice, the first B rows pass 1, the others pass 2.

    Args:
        inputs: a tensor, or dicts, BatchEncodings, lists and tuples of tensors, nested at will. Tensors whose
            first dimension is not B (scalars, broadcast position ids), arguments known to have no batch axis
            (head_mask, cache_position) and whatever is no tensor stay as they are.
        batch_size: B; None reads it from input_ids (or inputs_embeds, ...), else from the first tensor.

    Returns a new container of the same type; `inputs` is not changed.

    Raises:
        ValueError: batch_size is None and `inputs` holds no tensor with a first dimension.

    Source: AdaMix section 3.2 runs the passes one after the other; one doubled forward computes the same.

    Example:
        >>> double_batch({"input_ids": torch.tensor([[1, 2], [3, 4]])})["input_ids"].tolist()
        [[1, 2], [3, 4], [1, 2], [3, 4]]
    """
    batch_size = find_batch_size(inputs) if batch_size is None else batch_size
    looked()
    return _apply(inputs, lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == batch_size else t)


def take_rows(inputs: Any, rows: torch.Tensor, batch_size: int) -> Any:
    """Rows of every tensor of a batch of batch_size, in another order, some of them twice; the rest as double_batch."""
    looked()
    return _apply(inputs, lambda t: t.index_select(0, rows.to(t.device)) if t.dim() and t.shape[0] == batch_size else t)


def split_passes(outputs: Any, batch_size: int) -> tuple[Any, Any]:
    """[2B, ...] -> ([B, ...], [B, ...]): the outputs of pass 1 and of pass 2.

    Args:
        outputs: what the model made of a doubled batch, containers as in double_batch (a ModelOutput stays
            one); whatever is no tensor of 2B rows is shared by both.
        batch_size: B.
    """
    rows = 2 * batch_size
    halves = (slice(0, batch_size), slice(batch_size, rows))
    first, second = (
        _apply(outputs, lambda t, half=half: t[half] if t.dim() and t.shape[0] == rows else t) for half in halves
    )
    return first, second


def find_batch_size(inputs: Any) -> int:
    """B of a batch. Raises ValueError when it holds no tensor with a first dimension."""
    if isinstance(inputs, Mapping):
        for name in BATCHED:
            value = inputs.get(name)
            if isinstance(value, torch.Tensor) and value.dim():
                return value.shape[0]
    for tensor in _tensors(inputs):
        if tensor.dim():
            return tensor.shape[0]
    raise ValueError(f"inputs: got {type(inputs).__name__} without a tensor [B, ...], expected the inputs of a model")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _UNBATCHED:
                yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _apply(value: Any, change: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        items = {name: item if name in _UNBATCHED else _apply(item, change) for name, item in value.items()}
        rebuild: Callable[[dict[str, Any]], Any] = type(value)
        return items if type(value) is dict else rebuild(items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_apply(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_apply(item, change) for item in value)
    return value
