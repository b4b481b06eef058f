"""Prompt-based classification: a masked language model fills in the word that stands for the label."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..tasks import TextSplit

_PARTS = re.compile(r"(\{text\}|\{pair\}|\{mask\})")


@dataclass(frozen=True)
class Prompt:
    """template: with {text}, {mask} and perhaps {pair}. words: one a label, in the labels' order.

    bare_text: the text without its last punctuation mark. lower_pair: the pair with a small first letter.

    Source: Gao et al. 2021 (LM-BFF), whose templates write these as sent-_0 and sentl_1.
    """

    template: str
    words: list[str]
    bare_text: bool = False
    lower_pair: bool = False

    def __post_init__(self) -> None:
        if self.template.count("{mask}") != 1 or "{text}" not in self.template:
            raise ValueError(f"template: got {self.template!r}, expected {{text}} and one {{mask}} in it")


def prompt_for(settings: dict[str, Any], label_names: list[str]) -> Prompt:
    """A recipe's prompt for a data set's labels. Raises ValueError for a label that no word stands for."""
    words = []
    for label in label_names:
        # Names come before the numbers that stand in for them where a folder has no names.
        found = [word for word, names in settings["words"].items() if label in names]
        if not found:
            raise ValueError(f"words: got {settings['words']}, expected a word for the label {label!r}")
        words.append(found[0])
    options = {k: v for k, v in settings.items() if k in ("bare_text", "lower_pair")}
    return Prompt(settings["template"], words, **options)


def word_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """The token id of each label word, as it stands after a space. Raises ValueError unless each is one token."""
    ids = []
    for word in prompt.words:
        parts = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        if len(parts) != 1 or parts[0] == tokenizer.unk_token_id:
            raise ValueError(f"words: got {word!r}, which is {len(parts)} known tokens here, expected one")
        ids += parts
    return ids


def encode_prompts(split: TextSplit, tokenizer: Any, prompt: Prompt, max_tokens: int) -> list[dict[str, Any]]:
    """One dict a row: input_ids with exactly one mask, attention_mask, and the label as its number.

    Where a row would be longer than max_tokens, its texts lose tokens at their ends, the longer one first; the
    template and the mask stay.

    Raises ValueError for a tokenizer without a mask token, or a template with {pair} for single sentences.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("tokenizer: got one without a mask token, expected that of a masked language model")
    if "{pair}" in prompt.template and split.pairs is None:
        raise ValueError(f"template: got {prompt.template!r}, but the data has single sentences")
    pairs = split.pairs or [""] * len(split)
    rows = []
    for text, pair, label in zip(split.texts, pairs, split.labels, strict=True):
        ids = _row_ids(text, pair, tokenizer, prompt, max_tokens)
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label})
    return rows


def _row_ids(text: str, pair: str, tokenizer: Any, prompt: Prompt, max_tokens: int) -> list[int]:
    if prompt.bare_text and text and text[-1] in ".?!,;:":
        text = text[:-1].rstrip()
    if prompt.lower_pair:
        pair = pair[:1].lower() + pair[1:]
    pieces: list[list[int]] = []
    cut: list[int] = []  # which pieces are texts
    space = ""
    for part in _PARTS.split(prompt.template):
        if part == "{mask}":
            pieces.append([tokenizer.mask_token_id])
            space = ""
            continue
        filled = {"{text}": text, "{pair}": pair}.get(part, part)
        if part in ("{text}", "{pair}"):
            cut.append(len(pieces))
        # A space belongs to the word after it, as byte-level vocabularies have it.
        whole = space + filled
        stripped = whole.rstrip(" ")
        space = " " if whole != stripped else ""
        pieces.append(tokenizer(stripped, add_special_tokens=False)["input_ids"] if stripped else [])
    room = max_tokens - 2
    while sum(map(len, pieces)) > room:
        longest = max(cut, key=lambda i: len(pieces[i]))
        if not pieces[longest]:
            raise ValueError(f"max_tokens: got {max_tokens}, which the template alone exceeds")
        pieces[longest] = pieces[longest][:-1]
    # The text itself must not bring a second mask.
    mask = tokenizer.mask_token_id
    inner = [i for n, piece in enumerate(pieces) for i in piece if n not in cut or i != mask]
    return [tokenizer.cls_token_id, *inner, tokenizer.sep_token_id]


def read_at_mask(model: nn.Module, mask_id: int, words: list[int]) -> nn.Module:
    """Makes a masked language model's logits [B, labels]: those of the label words at each row's mask.

    The head computes that one position alone. Returns `model`; call it before adapting or wrapping it.
    """
    reader = _Reader(mask_id, words)
    model.register_forward_pre_hook(reader.note, with_kwargs=True)
    encoder: Any = model.base_model
    encoder.register_forward_hook(reader.take)
    model.register_forward_hook(reader.keep)
    return model


class _Reader:
    """The hidden state at the mask, [B, S, H] -> [B, 1, H], and of its logits the words', [B, 1, V] -> [B, C]."""

    def __init__(self, mask_id: int, words: list[int]):
        self.mask_id = mask_id
        self.words = torch.tensor(words)
        self.place: torch.Tensor | None = None

    def note(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.place = (ids == self.mask_id).int().argmax(1)

    def take(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        states = output["last_hidden_state"]
        assert self.place is not None  # note() ran first
        index = self.place.view(-1, 1, 1).expand(-1, 1, states.shape[2])
        output["last_hidden_state"] = states.gather(1, index)
        return output

    def keep(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        logits = output["logits"]
        if self.words.device != logits.device:
            self.words = self.words.to(logits.device)
        output["logits"] = logits[:, 0].index_select(1, self.words)
        return output
