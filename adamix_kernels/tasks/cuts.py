"""How many texts were longer than there was room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Cuts:
    """Counts, with the tokenizer's own work.

    Attributes:
        texts, cut: tokenized so far, and those of them that lost tokens. exact: False after a tokenizer in Python,
            which does not tell: `cut` are then those that are as long as a text may be.
    """

    texts: int = 0
    cut: int = 0
    exact: bool = True

    def count(self, encoded: Any, max_tokens: int) -> None:
        """encoded: of tokenizer([text, ...], truncation=True, max_length=max_tokens)."""
        ids, own = encoded["input_ids"], encoded.encodings
        full = [number for number, row in enumerate(ids) if len(row) >= max_tokens]
        self.exact = self.exact and own is not None
        self.add(len(ids), len(full) if own is None else sum(bool(own[number].overflowing) for number in full))

    def count_one(self, encoded: Any, max_tokens: int) -> None:
        """encoded: of tokenizer(text, truncation=True) at max_tokens or more."""
        ids, own = encoded["input_ids"], encoded.encodings
        self.exact = self.exact and own is not None
        full = len(ids) >= max_tokens
        self.add(1, len(ids) > max_tokens or (full and (own is None or bool(own[0].overflowing))))

    def add(self, texts: int, cut: int) -> None:
        self.texts, self.cut = self.texts + texts, self.cut + cut

    def told(self, max_tokens: int) -> str | None:
        """A sentence, or None where nothing was cut."""
        if not self.cut:
            return None
        how = f"longer than {max_tokens} tokens" if self.exact else f"{max_tokens} tokens long or more"
        return f"{self.cut} of {self.texts} texts {'is' if self.cut == 1 else 'are'} {how}, and cut to that"
