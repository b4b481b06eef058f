"""What each kind of recipe trains on and is measured by: data, a fresh model, scores."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from ..tasks import (
    TextSplit,
    TextTask,
    collator,
    load_causal,
    load_classifier,
    load_task,
    predict,
    resolve_model,
    tokenize,
)
from ..tasks._draw import sample_rows
from ..tasks.encoders import known_settings, load_model
from ..tasks.generation import IGNORED, beam_decode, check_causal, encode_texts, pair_collator, token_loss
from ..tasks.table_data import Pair, TableData, load_tables, references
from .config import Recipe
from .metrics import Scores, label_scores, text_scores
from .positions import check_positions
from .prompt import encode_prompts, prompt_for, read_at_mask, word_ids
from .shots import draw_shots

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Smaller runs, the same for every method.

    train_rows: drawn by the run's seed, classes in proportion. dev_rows: drawn too, the same for every seed.
    shots: training rows drawn by the run's seed, as many of each class.
    """

    train_rows: int | None = None
    dev_rows: int | None = None
    shots: int | None = None

    def __post_init__(self) -> None:
        for name in ("train_rows", "dev_rows", "shots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1, or None for all")


class LabelProblem:
    """Classification or regression with a head on the encoder.

    Attributes: collate (rows to tensors), loss (for transformers.Trainer: None is the model's own).
    """

    loss: Callable[..., torch.Tensor] | None = None

    def __init__(self, recipe: Recipe, limits: Limits):
        self.recipe, self.limits = recipe, limits
        self.encoder = resolve_model(recipe.model)
        self.settings = known_settings(self.encoder, recipe.model_config)
        self.task: TextTask = load_task(recipe.data, task="regression" if recipe.regression else "classification")
        for note in self.task.notes:
            logger.warning("%s", note)
        self._dev: list[dict[str, Any]] | None = None

    def fresh(self) -> nn.Module:
        """A new model, its head drawn from the global generator."""
        model: nn.Module
        model, self.tokenizer = load_classifier(
            self.encoder, self.task.label_names, self.recipe.pooling, settings=self.settings
        )
        self.collate = collator(self.tokenizer)
        return model

    def train_rows(self, seed: int) -> list[dict[str, Any]]:
        split = self.task.train.sample(self.limits.train_rows, seed)
        shots = self.limits.shots or self.recipe.shots
        return self._encode(draw_shots(split, shots, seed) if shots else split)

    def dev_rows(self) -> list[dict[str, Any]]:
        if self._dev is None:
            self._dev = self._encode(self.task.dev.sample(self.limits.dev_rows))
        return self._dev

    def check(self, model: nn.Module, rows: list[dict[str, Any]]) -> None:
        """Raises ValueError where the model has too few positions for the rows."""
        check_positions(self.recipe, model, rows, self.tokenizer)

    def scores(self, model: nn.Module) -> Scores:
        """Metrics on dev, of the model in evaluation mode."""
        rows = self.dev_rows()
        logits = predict(model, rows, self.collate, self.recipe.training.get("per_device_eval_batch_size", 64))
        return self.scores_of(logits, [row["labels"] for row in rows])

    def scores_of(self, logits: torch.Tensor, labels: list[Any]) -> Scores:
        if self.recipe.minimum is not None:
            logits = logits.clamp(min=self.recipe.minimum)
        predicted = logits[:, 0] if self.recipe.regression else logits.argmax(-1)
        return label_scores(self.recipe.metrics, predicted.tolist(), labels)

    def _encode(self, split: TextSplit) -> list[dict[str, Any]]:
        return tokenize(split, self.tokenizer, self.recipe.max_tokens)


class PromptProblem(LabelProblem):
    """Classification by a masked language model that fills in the label's word."""

    @staticmethod
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Mean cross-entropy over the rows of an update, of the label words alone."""
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        return F.cross_entropy(outputs["logits"].float(), labels, reduction="sum") / count

    def fresh(self) -> nn.Module:
        from transformers import AutoModelForMaskedLM

        model, self.tokenizer = load_model(AutoModelForMaskedLM, self.encoder, new_head=False, **self.settings)
        self.prompt = prompt_for(self.recipe.prompt, self.task.label_names)
        self.collate = collator(self.tokenizer)
        return read_at_mask(model, self.tokenizer.mask_token_id, word_ids(self.prompt, self.tokenizer))

    def _encode(self, split: TextSplit) -> list[dict[str, Any]]:
        return encode_prompts(split, self.tokenizer, self.prompt, self.recipe.max_tokens)


class TextProblem:
    """Text from tables with a causal model. dev_rows limits contexts as well as rows."""

    def __init__(self, recipe: Recipe, limits: Limits):
        self.recipe, self.limits = recipe, limits
        self.encoder = resolve_model(recipe.model)
        self.settings = known_settings(self.encoder, recipe.model_config)
        self.data: TableData = load_tables(recipe.data, recipe.data_format or "e2e")

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Mean cross-entropy per token of an update, smoothed as the recipe says.

        As transformers' own, which does not take PEFT's prefix tuning together with label smoothing.
        """
        logits, labels = outputs["logits"][:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
        smoothing = self.recipe.training.get("label_smoothing_factor", 0.0)
        total = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    def fresh(self) -> nn.Module:
        model: nn.Module
        model, self.tokenizer = load_causal(self.encoder, self.settings)
        check_causal(model, self.encoder.name)
        self.collate = pair_collator(self.tokenizer)
        return model

    def check(self, model: nn.Module, rows: list[dict[str, Any]]) -> None:
        """Raises ValueError where the model has too few positions for the rows, or for context and new tokens."""
        check_positions(self.recipe, model, rows, self.tokenizer, list(references(self.data.judged)))

    def train_rows(self, seed: int) -> list[dict[str, Any]]:
        return self._encode(_some(self.data.train, self.limits.train_rows, seed))

    def dev_rows(self) -> list[dict[str, Any]]:
        return self._encode(_some(self.data.dev, self.limits.dev_rows))

    def _encode(self, pairs: list[Pair]) -> list[dict[str, Any]]:
        contexts, texts = [pair.context for pair in pairs], [pair.text for pair in pairs]
        return encode_texts(contexts, texts, self.tokenizer, self.recipe.max_tokens)

    def scores(self, model: nn.Module) -> Scores:
        """Text metrics on the test part (dev where there is none), and the dev loss per token.

        Where the training part has the categories of some tables and not of others (WebNLG), each metric also of
        either: "bleu_seen", "bleu_unseen".
        """
        settings = dict(self.recipe.generation)
        tokens = settings.pop("tokens", "spaces")
        known = references(self.data.judged, settings.pop("references", None))
        contexts = _some(list(known), self.limits.dev_rows)
        texts = beam_decode(model, self.tokenizer, contexts, **settings)
        scores = text_scores(self.recipe.metrics, texts, [known[c] for c in contexts], tokens)
        for part, rows in self.data.parts(contexts).items():
            of_part = text_scores(
                self.recipe.metrics, [texts[i] for i in rows], [known[contexts[i]] for i in rows], tokens
            )
            scores.values |= {f"{name}_{part}": value for name, value in of_part.values.items()}
            scores.missing |= {f"{name}_{part}": why for name, why in of_part.missing.items()}
        size = self.recipe.training.get("per_device_eval_batch_size", 4)
        scores.values["loss"] = token_loss(model, self.dev_rows(), self.collate, size)
        return scores


def _some(values: list[T], rows: int | None, seed: int = 0) -> list[T]:
    """`rows` values drawn by the seed, in their order; all where rows is None or more."""
    if rows is None or rows >= len(values):
        return values
    return [values[i] for i in sample_rows([0] * len(values), rows, seed)]


PROBLEMS = {"classification": LabelProblem, "prompt": PromptProblem, "generation": TextProblem}
