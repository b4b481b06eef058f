"""Text from a causal model: training rows, the loss per token, and the published beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .cuts import Cuts

IGNORED = -100


def encode_texts(
    contexts: Sequence[str],
    texts: Sequence[str],
    tokenizer: Any,
    max_tokens: int,
    *,
    keep_text: bool = False,
    cuts: Cuts | None = None,
) -> list[dict[str, Any]]:
    """context, beginning, " text", end; labels are the text's and the end's ids, -100 before.

    Args:
        contexts, texts: what is read, and what is to be written after it; as many of each.
        max_tokens: of both together; longer rows lose their end.
        keep_text: longer rows lose the beginning of their context instead, and the text's end only where the text
            alone is longer.
        cuts: counts the rows that are longer.

    Source: gpt2_encode.py of the reference project with --add_bos --add_eos.
    """
    rows = []
    for context, text in zip(contexts, texts, strict=True):
        start = context_ids(context, tokenizer)
        end = [*tokenizer(" " + text, add_special_tokens=False)["input_ids"], _end(tokenizer)]
        if cuts is not None:
            cuts.add(1, len(start) + len(end) > max_tokens)
        if keep_text and len(start) + len(end) > max_tokens:
            start = start[-max(1, max_tokens - len(end)) :]
        ids, labels = start + end, [IGNORED] * len(start) + end
        rows.append(
            {
                "input_ids": ids[:max_tokens],
                "attention_mask": [1] * len(ids[:max_tokens]),
                "labels": labels[:max_tokens],
            }
        )
    return rows


def context_ids(context: str, tokenizer: Any) -> list[int]:
    """The context, and what says that the text begins: the tokenizer's beginning, its end where it has none."""
    beginning = _end(tokenizer) if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [*tokenizer(context, add_special_tokens=False)["input_ids"], beginning]


def _end(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("model: got a tokenizer without an end-of-text token, expected one for generation")
    end: int = tokenizer.eos_token_id
    return end


def pair_collator(tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Rows to tensors [B, S], padded on the right; padded labels are -100."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return {
            name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
            for name, value in fill.items()
        }

    return collate


def already_shifted(collate: Callable[..., Any]) -> Callable[..., Any]:
    """collate's batches with the label at s of the token at s + 1, for a model that does not shift them itself."""

    def shift(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = collate(rows)
        return {**batch, "labels": F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)}

    return shift


def labels_for(model: nn.Module, collate: Callable[..., Any]) -> Callable[..., Any]:
    """collate, with its labels where a training of `model` wants them: `already_shifted` or as they are."""
    from ..models.objectives import is_unshifted

    return already_shifted(collate) if is_unshifted(model) else collate


@torch.no_grad()
def check_causal(model: nn.Module, name: str) -> None:
    """Raises ValueError where the logits at a token depend on those behind it, its answer among them: an encoder's.

    Two rows of four tokens, the last of which differs, are read; nothing where the model cannot read them.
    """
    language_model: Any = model
    mode, words = model.training, int(language_model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(words // 3, words // 3 + 4).repeat(2, 1)
    ids[1, 3] += words // 2
    ids = (ids % words).to(language_model.device)
    try:
        logits = language_model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -4:]
    except (RuntimeError, ValueError, TypeError, IndexError, ImportError, AttributeError):
        return
    finally:
        model.train(mode)
    noise = 8 * torch.finfo(logits.dtype).eps * logits.abs().max()
    if (logits[0, :3] - logits[1, :3]).abs().max() > noise:
        raise ValueError(
            f"model: got {name!r} ({type(model).__name__}), which sees the tokens behind each one, and so the text "
            "that it is to write, expected a causal language model, as gpt2 (a BERT-like one with is_decoder=true in "
            "its config.json); an encoder takes classification and regression"
        )


@torch.inference_mode()
def beam_decode(
    model: nn.Module,
    tokenizer: Any,
    contexts: list[str],
    *,
    beams: int = 10,
    length_penalty: float = 0.8,
    no_repeat_ngram: int = 4,
    max_new_tokens: int = 64,
    max_context: int = 512,
    stop_ids: tuple[int, ...] | list[int] = (),
    batch_size: int = 1,
) -> list[str]:
    """One text a context: the best of `beams`, score = log p / length**length_penalty over the new tokens.

    Args:
        no_repeat_ngram: no n-gram twice among the new tokens (those of the context may come again).
        max_context: of a longer context the last tokens stay.
        stop_ids: end a text besides the tokenizer's end; ids outside the vocabulary are left out.
        batch_size: contexts decoded together, padded on the left.

    A text ends at its first empty line. The model is left in evaluation mode.

    Source: gpt2_beam.py and gpt2_decode.py of the reference project.
    """
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

    model.eval()
    language_model: Any = model
    device = next(model.parameters()).device
    vocabulary = language_model.config.vocab_size
    ends = [_end(tokenizer), *(i for i in stop_ids if i < vocabulary)]
    texts = []
    for first in range(0, len(contexts), batch_size):
        rows = [context_ids(c, tokenizer)[-max_context:] for c in contexts[first : first + batch_size]]
        width = max(map(len, rows))
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        processors = LogitsProcessorList()
        if no_repeat_ngram:
            processors.append(_AfterContext(NoRepeatNGramLogitsProcessor(no_repeat_ngram), width))
        out = language_model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_beams=beams,
            do_sample=False,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=pad,
            logits_processor=processors,
        )
        for new in out[:, width:]:
            text = tokenizer.decode(new, skip_special_tokens=True)
            texts.append(text.split("\n\n")[0].strip())
    return texts


@torch.inference_mode()
def token_loss(
    model: nn.Module, rows: Sequence[dict[str, Any]], collate: Callable[..., Any], batch_size: int = 4
) -> float:
    """Cross-entropy per token of the texts, in nats; the model is left in evaluation mode.

    Args:
        rows: of encode_texts. collate: of pair_collator.
    """
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        inputs = {k: v.to(device) for k, v in collate(list(rows[start : start + batch_size])).items()}
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, -labels.shape[1] - 1 : -1]  # a prefix may stand before
        total += F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != IGNORED).sum())
    return total / max(1, count)


class _AfterContext:
    """A logits processor that sees the new tokens alone."""

    def __init__(self, processor: Any, width: int):
        self.processor, self.width = processor, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.processor(input_ids[:, self.width :], scores)
        return out
