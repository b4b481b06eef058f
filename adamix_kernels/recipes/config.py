"""Recipe: one experiment as JSON, a file of the user's or a task of a family in configs/."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models.config import AdaMixConfig
from .metrics import CLASS_METRICS, NUMBER_METRICS, TEXT_METRICS, TOKENS

RECIPE_VERSION = 1
KINDS = ("classification", "prompt", "generation")
EVALUATIONS = ("merged", "random", "fixed")
SELECT = ("best", "last")
NUMBERS = ("learning_rate", "num_train_epochs", "per_device_train_batch_size")  # that every training has
_KINDS: dict[type, tuple[tuple[str, ...], str]] = {
    str: (("name", "model", "data", "pooling"), "a text"),
    list: (("metrics", "default_methods", "evaluations"), "a JSON list"),
    dict: (("training", "model_config", "methods", "prompt", "generation"), "a JSON object"),
}
GENERATION = (
    "beams", "length_penalty", "no_repeat_ngram", "max_new_tokens", "max_context", "batch_size", "stop_ids", "tokens",
    "references",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """An experiment: model, data, what is trained, how long, and what is measured.

    Attributes:
        name: "glue/bert-base/mnli", or the file's name.
        kind: "classification" (a head on the encoder), "prompt" (a masked model fills in the label's word) or
            "generation" (a causal model writes the text of a table).
        model: of tasks.resolve_model: folder or hub id. pooling: see tasks.load_classifier.
        model_config: settings of the base model in place of its own, such as {"resid_pdrop": 0.0}; what the model has
            no such setting for is left out with a warning.
        data: folder or hub name; data_format: "e2e", "webnlg" or "dart" (generation).
        regression: the label is a number (STS-B). minimum: what predictions below it are taken for, in evaluation
            (the released RoBERTa clips STS-B's at 0); None leaves them.
        metrics: names of recipes.metrics; the first one chooses the best epoch and leads the table.
        max_tokens: of a text, or of context and text together.
        training: fields of transformers.TrainingArguments (learning_rate, num_train_epochs and
            per_device_train_batch_size among them), and warmup_ratio.
        adamix: fields of AdaMixConfig.
        methods: per method, its options and its learning_rate where it has its own.
        default_methods: what is run unless methods are named. seeds: how many.
        shots: training rows, drawn by the seed evenly over the classes; None takes all.
        prompt: template with {text}, {pair}, {mask}; words: label word -> names of its label; bare_text drops the
            text's last punctuation mark; lower_pair lowers the pair's first letter.
        generation: beams, length_penalty, no_repeat_ngram, max_new_tokens, max_context, batch_size, stop_ids (token
            ids that end a text besides the tokenizer's own), references (a text is compared with the first so many;
            all by default), and tokens, of which the metrics are made: "spaces", "words" or "mteval" (see
            metrics.text_scores).
        select: "best" epoch on dev, or the "last".
        evaluations: of an AdaMix model: "merged", "random" routing, every "fixed" expert.
        source: where the numbers come from.

    Raises ValueError for a kind, metric, evaluation, selection or setting of generation that is none of these, for a
    learning rate, epochs, a batch, seeds, tokens or shots that are no number above 0, for a field of another JSON type,
    and for wrong AdaMix fields.
    """

    name: str
    kind: str
    model: str
    data: str
    metrics: list[str]
    training: dict[str, Any]
    adamix: dict[str, Any]
    max_tokens: int = 128
    pooling: str = "model"
    model_config: dict[str, Any] = field(default_factory=dict)
    data_format: str | None = None
    regression: bool = False
    minimum: float | None = None
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    default_methods: list[str] = field(default_factory=lambda: ["adamix"])
    seeds: int = 1
    shots: int | None = None
    prompt: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    select: str = "last"
    evaluations: list[str] = field(default_factory=lambda: list(EVALUATIONS))
    source: str = ""
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        if self.version != RECIPE_VERSION:
            raise ValueError(f"version: got {self.version!r}, expected {RECIPE_VERSION}")
        for kind, (names, words) in _KINDS.items():
            for name in names:
                if not isinstance(getattr(self, name), kind):
                    raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {words}")
        for method, own in self.methods.items():
            if not isinstance(own, dict):
                raise ValueError(f"methods.{method}: got {own!r}, expected a JSON object")
        for name, number in (("seeds", self.seeds), ("max_tokens", self.max_tokens), ("shots", self.shots)):
            least = isinstance(number, int) and not isinstance(number, bool) and number >= 1
            if not least and not (name == "shots" and number is None):
                raise ValueError(f"{name}: got {number!r}, expected a whole number above 0")
        for name, value, known in (("kind", self.kind, KINDS), ("select", self.select, SELECT)):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        unknown = set(self.evaluations) - set(EVALUATIONS)
        if unknown or not self.evaluations:
            raise ValueError(f"evaluations: got {self.evaluations!r}, expected some of {', '.join(EVALUATIONS)}")
        metrics = TEXT_METRICS if self.kind == "generation" else CLASS_METRICS + NUMBER_METRICS
        if not self.metrics or set(self.metrics) - set(metrics):
            raise ValueError(f"metrics: got {self.metrics!r}, expected some of {', '.join(metrics)}")
        if set(self.generation) - set(GENERATION) or self.generation.get("tokens", "spaces") not in TOKENS:
            raise ValueError(
                f"generation: got {self.generation!r}, expected some of {', '.join(GENERATION)}, tokens being one of "
                f"{', '.join(TOKENS)}"
            )
        limit = self.generation.get("references")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValueError(f"generation.references: got {limit!r}, expected a whole number above 0, or null for all")
        for name, number in ((name, self.training[name]) for name in NUMBERS if name in self.training):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
                raise ValueError(f"training.{name}: got {number!r}, expected a number above 0")
        if self.kind == "prompt" and not {"template", "words"} <= set(self.prompt):
            raise ValueError(f"prompt: got the keys {sorted(self.prompt)}, expected template and words among them")
        if self.minimum is not None and not self.regression:
            raise ValueError(f"minimum: got {self.minimum!r}, expected None where the label is no number")
        AdaMixConfig.from_dict(self.adamix)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def changed(self, changes: dict[str, Any]) -> Recipe:
        """With dotted keys replaced: {"training.num_train_epochs": 3}. Raises ValueError for an unknown field."""
        values = self.to_dict()
        for key, value in changes.items():
            *path, last = key.split(".")
            target = values
            for part in path:
                target = target.setdefault(part, {})
                if not isinstance(target, dict):
                    raise ValueError(f"{key}: {part!r} is not an object of the recipe")
            target[last] = value
        return from_dict(values)


def from_dict(values: dict[str, Any]) -> Recipe:
    """Raises ValueError for a key that is not a field, or a missing one."""
    known = {f.name: f for f in dataclasses.fields(Recipe)}
    unknown = sorted(set(values) - set(known))
    needed = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING and n not in values]
    if unknown or needed:
        raise ValueError(f"recipe: got the unknown keys {unknown}, and lacks {needed}")
    return Recipe(**values)


def load_recipe(name: str) -> Recipe:
    """A recipe by its name (see recipe_names), or from a JSON file as Recipe.to_dict writes it.

    Raises ValueError: neither such a name nor a file, or a file that is no recipe; the message names it.
    """
    for recipe_name, values in _packaged():
        if recipe_name == name:
            return from_dict(values)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"recipe: got {name!r}, expected a JSON file or one of the names of `adamix recipe list`")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"got a JSON {type(values).__name__}, expected an object")
        return from_dict({"name": path.stem, **values})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def recipe_names() -> list[str]:
    """Names of the recipes of this package."""
    return [name for name, _ in _packaged()]


def _packaged() -> Iterator[tuple[str, dict[str, Any]]]:
    folder = importlib.resources.files(__package__) / "configs"
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".json"):
            continue
        family = json.loads(file.read_text(encoding="utf-8"))
        for task, values in family["tasks"].items():
            name = f"{family['family']}/{task}"
            yield name, {"name": name, **_merged(family["common"], values)}


def _merged(common: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` over `common`, objects within objects."""
    both = dict(common)
    for key, value in values.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both
