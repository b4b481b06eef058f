"""The kinds of task: how each becomes rows, scores and predictions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..models.targets import saved_modules
from ..recipes.metrics import CLASS_METRICS, NUMBER_METRICS, TEXT_METRICS, Scores, label_scores, text_scores
from ..tasks import TextSplit, collator, predict, tokenize
from ..tasks.batches import with_tasks
from ..tasks.cuts import Cuts
from ..tasks.encoders import positions
from ..tasks.generation import IGNORED, beam_decode, context_ids, encode_texts, pair_collator, token_loss

METRICS = {"classification": CLASS_METRICS, "regression": NUMBER_METRICS, "generation": TEXT_METRICS}
DEFAULT_METRICS = {"classification": ("accuracy",), "regression": ("pearson", "spearman"), "generation": ()}
GENERATION_TOKENS = 64
GENERATION = {"max_new_tokens": GENERATION_TOKENS, "beams": 4, "length_penalty": 0.8, "no_repeat_ngram": 4}
FALLING = ("loss", "rmse", "ter")  # less is better
PLAIN = ("nist", "cider", "rmse", "loss")  # no percentages


def written(name: str, value: float) -> str:
    """ "accuracy 82.40 %" """
    return f"{name} {value:.4f}" if name in PLAIN else f"{name} {value:.2f} %"


@dataclass
class LabelKind:
    """Classification or regression: one row of logits a text.

    Attributes: names: of the labels, in id order. metrics: of checked_metrics; the first one leads. cuts: of all texts
    that it was given.
    """

    kind: str
    names: list[str]
    tokenizer: Any
    max_tokens: int
    metrics: tuple[str, ...] = ()
    batch_size: int = 64
    cuts: Cuts = field(default_factory=Cuts)

    @property
    def leading(self) -> str:
        return self.metrics[0]

    @property
    def collate(self) -> Any:
        return collator(self.tokenizer)

    def encode(self, split: TextSplit) -> list[dict[str, Any]]:
        return tokenize(split, self.tokenizer, self.max_tokens, self.cuts)

    def encode_inputs(self, texts: list[str], pairs: list[str] | None) -> list[dict[str, Any]]:
        more = [] if pairs is None else [pairs]
        encoded = self.tokenizer(texts, *more, truncation=True, max_length=self.max_tokens)
        self.cuts.count(encoded, self.max_tokens)
        return [{name: encoded[name][i] for name in encoded} for i in range(len(texts))]

    def scores(self, predicted: Sequence[float], labels: Sequence[float]) -> Scores:
        """predicted: classes, or numbers. Percent; the root mean squared error of a regression has its labels' unit."""
        if self.kind == "classification":
            return _class_scores(self.metrics, predicted, labels, len(self.names))
        scores = label_scores([name for name in self.metrics if name != "rmse"], predicted, labels)
        squares = [(p - y) ** 2 for p, y in zip(predicted, labels, strict=True)]
        scores.values["rmse"] = math.sqrt(sum(squares) / len(squares))
        return scores

    def chosen(self, logits: torch.Tensor) -> list[float]:
        """Classes, or numbers, of logits [rows, classes or 1]."""
        values: list[float] = (logits.argmax(-1) if self.kind == "classification" else logits[:, 0]).tolist()
        return values

    def trainer_metrics(self, prediction: Any) -> dict[str, float]:
        """compute_metrics of a Trainer: as fractions, as scikit-learn and scipy have them.

        The leading one is always there, as the Trainer may choose by it; -inf where it is not defined.
        """
        logits = torch.as_tensor(prediction.predictions)
        values = self.scores(self.chosen(logits), prediction.label_ids.reshape(-1).tolist()).values
        return {self.leading: -math.inf} | {n: value if n in PLAIN else value / 100 for n, value in values.items()}

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.kind == "classification":
            return F.cross_entropy(logits, labels)
        return F.mse_loss(logits[:, 0], labels)

    def evaluate(self, model: nn.Module, split: TextSplit, progress: bool) -> Scores:
        rows = self.encode(split)
        logits = predict(model, rows, self.collate, self.batch_size, progress=progress)
        return self.scores(self.chosen(logits), [row["labels"] for row in rows])

    def predictions(
        self, model: nn.Module, texts: list[str], pairs: list[str] | None, tasks: list[int] | None = None
    ) -> list[dict[str, Any]]:
        """{"label", "probabilities"} of each text, or its {"score"}. tasks: of the texts, for gates by task."""
        rows = self.encode_inputs(texts, pairs)
        rows = rows if tasks is None else with_tasks(rows, tasks)
        logits = predict(model, rows, self.collate, self.batch_size)
        return [self.answer(row) for row in logits]

    def answer(self, logits: torch.Tensor) -> dict[str, Any]:
        """{"label", "probabilities"} or {"score"} of one text's logits [classes or 1]; in a pack there may be more."""
        made = logits[:1] if self.kind == "regression" else logits[: len(self.names)]
        row = made if self.kind == "regression" else made.softmax(-1)
        if not bool(row.isfinite().all()):  # a column of -inf is a label that a name of a pack has not
            shown = ", ".join(f"{value:g}" for value in made.tolist()[:4])
            raise ValueError(
                f"run: got the outputs {shown} for a text, expected finite numbers: its training went wrong (try a "
                "lower --learning_rate), or the base model's weights are damaged"
            )
        if self.kind == "regression":
            return {"score": row[0].item()}
        by_name = {name: round(p, 6) for name, p in zip(self.names, row.tolist(), strict=True)}
        return {"label": self.names[int(row.argmax())], "probabilities": by_name}


@dataclass
class GenerationKind:
    """A causal model that goes on from a text. settings: of beam_decode."""

    tokenizer: Any
    max_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    batch_size: int = 8
    cuts: Cuts = field(default_factory=Cuts)
    kind = "generation"
    leading = "loss"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.settings = {**GENERATION, **self.settings}
        new = self.settings["max_new_tokens"]
        if new >= self.max_tokens:
            raise ValueError(f"max_new_tokens: got {new}, expected less than the {self.max_tokens} tokens of a text")

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        return pair_collator(self.tokenizer)

    def encode(self, split: TextSplit) -> list[dict[str, Any]]:
        texts = [str(text) for text in split.labels]
        read, most = contexts(split.texts, split.pairs), self.max_tokens
        return encode_texts(read, texts, self.tokenizer, most, keep_text=True, cuts=self.cuts)

    def evaluate(self, model: nn.Module, split: TextSplit, progress: bool) -> Scores:
        """The loss per token and, where metrics are asked for, those of the decoded texts."""
        loss = token_loss(model, self.encode(split), self.collate, self.batch_size)
        scores = Scores({"loss": loss})
        if self.metrics:
            known = TextSplit(contexts(split.texts, split.pairs), None, split.labels).references()
            made = self._decode(model, list(known), progress)
            found = text_scores(self.metrics, made, list(known.values()), "words")
            scores.values.update(found.values)
            scores.missing.update(found.missing)
        return scores

    def predictions(
        self, model: nn.Module, texts: list[str], pairs: list[str] | None, tasks: list[int] | None = None
    ) -> list[dict[str, Any]]:
        read = contexts(texts, pairs)
        self.cuts.add(len(read), sum(len(context_ids(text, self.tokenizer)) > self.room for text in read))
        return [{"generated": text} for text in self._decode(model, read, False)]

    @property
    def room(self) -> int:
        """Tokens of a context."""
        return self.max_tokens - int(self.settings["max_new_tokens"])

    def _decode(self, model: nn.Module, texts: list[str], progress: bool) -> list[str]:
        from tqdm.auto import tqdm

        options = {**self.settings, "max_context": self.room, "batch_size": self.batch_size}
        made: list[str] = []
        with tqdm(total=len(texts), unit="text", disable=not progress) as bar:
            for start in range(0, len(texts), self.batch_size):
                part = texts[start : start + self.batch_size]
                made += beam_decode(model, self.tokenizer, part, **options)
                bar.update(len(part))
        return made


Kind = LabelKind | GenerationKind


def warn_of_cuts(logger: logging.Logger, kinds: Mapping[str, Kind], written: bool = False) -> None:
    """A warning of each kind, by its name where it has one, that was given texts longer than it takes.

    written: texts were generated, for which a context has less room.
    """
    for name, kind in kinds.items():
        room = kind.room if written and isinstance(kind, GenerationKind) else kind.max_tokens
        if told := kind.cuts.told(room):
            logger.warning("%s%s", f"{name}: " if name else "", told)


def contexts(texts: Sequence[str], pairs: Sequence[str] | None) -> list[str]:
    """What a causal model reads: the text, and the second one of a pair after a blank."""
    return list(texts) if pairs is None else [f"{t} {p}" for t, p in zip(texts, pairs, strict=True)]


def most_new_tokens(longest: int) -> int:
    """Of a generated text, by default, where a text with its context has `longest` tokens."""
    return max(1, min(GENERATION_TOKENS, longest // 2))


def longest_text(model: Any, tokenizer: Any) -> int:
    """Tokens that the model has positions for, and its tokenizer gives."""
    most = int(tokenizer.model_max_length)
    return min(positions(model) or most, most)


def without_text(rows: Sequence[dict[str, Any]]) -> int:
    """How many rows of encode_texts have nothing to learn."""
    return sum(all(label == IGNORED for label in row["labels"]) for row in rows)


def make_kind(
    task: str,
    names: Sequence[str],
    tokenizer: Any,
    max_tokens: int,
    metrics: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
    batch_size: int | None = None,
) -> Kind:
    """metrics: of checked_metrics, or none, where nothing is measured. Raises ValueError for wrong settings."""
    more: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    if task == "generation":
        return GenerationKind(tokenizer, max_tokens, settings or {}, tuple(metrics), **more)
    return LabelKind(task, list(names), tokenizer, max_tokens, tuple(metrics), **more)


@torch.no_grad()
def start_at(model: nn.Module, value: float) -> None:
    """Gives a head of one output the bias `value`: the mean of the labels, or else the first epochs go to find it."""
    last = [m for _, head in saved_modules(model, None) for m in head.modules() if isinstance(m, nn.Linear)]
    if last and last[-1].out_features == 1 and last[-1].bias is not None:
        last[-1].bias.fill_(value)


def checked_metrics(task: str, asked: Sequence[str]) -> tuple[str, ...]:
    """What to measure, out of names or words like "f1,accuracy". What nobody asked for may be missing its library.

    Raises ValueError for a metric that is none of the task's, or whose library is not installed.
    """
    known = METRICS[task]
    asked = [name for word in asked for name in word.split(",") if name]
    wrong = [name for name in asked if name not in known]
    if wrong:
        raise ValueError(f"metrics: got {wrong[0]!r} for {task}, expected some of {', '.join(known)}")
    asked_or_default = tuple(asked) or DEFAULT_METRICS[task]
    if task == "generation":
        missing = text_scores(asked_or_default, ["a b c d e f"], [["a b c d e f"]]).missing if asked else {}
    else:
        missing = _class_scores(asked_or_default, [0, 1, 2], [0, 1, 2], 3).missing
    missing = {name: why for name, why in missing.items() if "needs" in why}
    if asked and missing:
        name, why = next(iter(missing.items()))
        raise ValueError(f"metrics: got {name!r}, which {why}")
    left = tuple(name for name in asked_or_default if name not in missing)
    return left or (("rmse",) if task == "regression" else ())


def _class_scores(metrics: Sequence[str], predicted: Sequence[float], labels: Sequence[float], classes: int) -> Scores:
    """label_scores, but the accuracy, which needs no library."""
    scores = label_scores([name for name in metrics if name != "accuracy"], predicted, labels, classes)
    if "accuracy" in metrics:
        right = sum(p == y for p, y in zip(predicted, labels, strict=True))
        values = {**scores.values, "accuracy": 100 * right / len(labels)}
        scores.values = {name: values[name] for name in metrics if name in values}
    return scores
