"""What a task is made of: texts, what belongs to each, and which columns they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ._draw import sample_rows

KINDS = ("classification", "regression", "generation")


@dataclass(frozen=True)
class TextSplit:
    """One split: texts, the second text of each pair (None for single sentences), and a label for each row.

    labels: class ids (int) in a classification, numbers (float) in a regression, texts to write in a generation, where
    one text with several references is several rows. tasks: an id of the tasks that the rows are of, for gates by task.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: Sequence[int | float | str]
    tasks: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> TextSplit:
        """Some rows, by their numbers."""
        pairs = None if self.pairs is None else [self.pairs[i] for i in rows]
        tasks = None if self.tasks is None else [self.tasks[i] for i in rows]
        return TextSplit([self.texts[i] for i in rows], pairs, [self.labels[i] for i in rows], tasks)

    def head(self, rows: int | None) -> TextSplit:
        """The first `rows` rows; all of them when rows is None. `sample` is fairer: files are often sorted."""
        return self.take(range(len(self))[:rows])

    def sample(self, rows: int | None, seed: int = 0) -> TextSplit:
        """`rows` rows drawn by the seed without replacement, in the split's order; all when rows is None or more.

        Class ids (int) are drawn in proportion to each class, to within one row.

        Raises ValueError when rows is below 1.
        """
        if rows is not None and rows < 1:
            raise ValueError(f"rows: got {rows}, expected at least 1, or None for all")
        if rows is None or rows >= len(self):
            return self
        classes = self.labels if all(isinstance(label, int) for label in self.labels) else [0] * len(self)
        return self.take(sample_rows(classes, rows, seed))

    def references(self) -> dict[str, list[str]]:
        """text -> every label of it as a string, texts in order of appearance: a generation's references."""
        found: dict[str, list[str]] = {}
        for text, label in zip(self.texts, self.labels):
            found.setdefault(text, []).append(str(label))
        return found


@dataclass(frozen=True)
class Columns:
    """The columns that were read. None: the data has none (a second text), or is of another layout (E2E's)."""

    text: str | None
    pair: str | None
    label: str | None


@dataclass(frozen=True)
class TextTask:
    """A task: label i of a classification is called label_names[i] in every split.

    Attributes:
        kind: "classification", "regression" (label_names is then ["score"]) or "generation" (no label_names).
        columns: those that were read. For a generation, text is what is read, label what is to be written.
        notes: what a person should be told, a sentence each: a dev split drawn from train, rows left out, ...
        task_names: what the ids of `tasks` are called, where a column tells the rows' tasks.
    """

    name: str
    kind: str
    label_names: list[str]
    train: TextSplit
    dev: TextSplit
    test: TextSplit | None = None
    columns: Columns = field(default_factory=lambda: Columns(None, None, None))
    notes: tuple[str, ...] = ()
    task_names: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Outputs of a head for this task: the classes, or 1 in a regression; 0 in a generation."""
        return len(self.label_names)
