"""Whether a model has as many positions as a recipe needs, asked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..tasks.encoders import positions as positions_of
from .config import Recipe


def check_positions(
    recipe: Recipe, model: nn.Module, rows: Sequence[dict[str, Any]], tokenizer: Any, contexts: Sequence[str] = ()
) -> None:
    """rows: what is trained on, with input_ids. contexts: what texts are written for, in evaluation.

    Raises ValueError, naming the recipe's field to lower.
    """
    positions = positions_of(model)
    if positions is None:
        return
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    if longest > positions:
        raise ValueError(
            f"max_tokens: got {recipe.max_tokens} and a row of {longest} tokens, expected at most {positions}, the "
            f"positions of {recipe.model!r}: --set max_tokens {positions}"
        )
    if recipe.kind != "generation":
        return
    new = recipe.generation.get("max_new_tokens", 64)
    limit = recipe.generation.get("max_context", 512)
    width = max((len(tokenizer(c, add_special_tokens=False)["input_ids"]) + 1 for c in contexts), default=0)
    needed = min(width, limit) + new
    if needed > positions:
        raise ValueError(
            f"generation: got a context of {min(width, limit)} tokens and max_new_tokens={new}, expected at most "
            f"{positions} together, the positions of {recipe.model!r}: lower generation.max_context (--set "
            f"generation.max_context {max(1, positions - new)}) or generation.max_new_tokens"
        )
