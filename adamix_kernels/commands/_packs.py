"""What adamix predict does with a pack: names of rows, and answers of each name's own task and labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.contexts import use_experts
from ..models.header import PACK_NAME
from ..models.hub import resolve_folder
from ..packs.route import AUTO, Nearest, nearest
from ..packs.state import Pack, pack_of
from ..tasks import InputRow, Run
from ..tasks.run_file import run_of
from ._kinds import GenerationKind, Kind, LabelKind, make_kind
from ._runs import load_whole, same_labels, told_run

NEAREST = "nearest"


@dataclass
class PackRun:
    """A pack with its tokenizer. kinds: of each name. adapter: for all rows, or None. threshold: of the routing. pairs:
    by name, see on_pairs."""

    model: nn.Module
    tokenizer: Any
    kinds: dict[str, Kind]
    adapter: str | None
    threshold: float | str | None
    pairs: dict[str, bool | None]

    @property
    def batch_size(self) -> int:
        return next(iter(self.kinds.values())).batch_size

    def check(self, row: InputRow) -> InputRow:
        """Raises ValueError, naming the place, for a row whose name is none of the pack, or of other texts."""
        if row.name is not None and row.name not in self.kinds:
            raise ValueError(f"{row.place}: got the adapter {row.name!r}, expected one of {', '.join(self.kinds)}")
        name = row.name or self.adapter
        wanted = set(self.pairs.values()) if name is None else {self.pairs[name]}
        return check_pair(row, wanted.pop() if len(wanted) == 1 else None)

    def answers(self, rows: Sequence[InputRow]) -> list[dict[str, Any]]:
        """One forward a batch, whatever its names; each prediction with its adapter, and, routed, its similarity."""
        encoded = [self._encoded(row, self._longest(row)) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -len(encoded[i]["input_ids"]))
        found: list[dict[str, Any]] = [{} for _ in rows]
        self.model.eval()
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            for i, answer in zip(some, self._batch([rows[i] for i in some], [encoded[i] for i in some]), strict=True):
                found[i] = answer
        return found

    def _longest(self, row: InputRow) -> int:
        """Tokens at which the row is cut: as in the training of its name, and of the longest where it has none yet."""
        name = row.name or self.adapter
        return max(kind.max_tokens for kind in self.kinds.values()) if name is None else self.kinds[name].max_tokens

    def _encoded(self, row: InputRow, most: int) -> Any:
        more = [] if row.pair is None else [row.pair]
        return self.tokenizer(row.text, *more, truncation=True, max_length=most)

    def _inputs(self, rows: Sequence[InputRow], encoded: Sequence[Any], most: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows padded, those of more than `most` tokens cut anew."""
        cut = [
            one if len(one["input_ids"]) <= length else self._encoded(row, length)
            for row, one, length in zip(rows, encoded, most, strict=True)
        ]
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in self.tokenizer.pad(cut, return_tensors="pt").items()}

    def _routed(self, rows: list[InputRow], encoded: list[Any]) -> Nearest:
        """nearest(), each name by the texts as its training cut them: its centroid is of such texts."""
        longest = max(len(one["input_ids"]) for one in encoded)
        groups: dict[int, list[str]] = {}
        for name, kind in self.kinds.items():
            groups.setdefault(min(kind.max_tokens, longest), []).append(name)
        found = [
            nearest(
                self.model, threshold=self.threshold, names=names, **self._inputs(rows, encoded, [most] * len(rows))
            )
            for most, names in groups.items()
        ]
        return Nearest.best_of(found)

    @torch.inference_mode()
    def _batch(self, rows: list[InputRow], encoded: list[Any]) -> list[dict[str, Any]]:
        routed: Nearest | None = None
        if self.adapter is None and rows[0].name is None:
            routed = self._routed(rows, encoded)
            names, kept = routed.nearest, [i for i, name in enumerate(routed.names) if name is not None]
        else:
            names, kept = [row.name or str(self.adapter) for row in rows], list(range(len(rows)))
        answers: list[dict[str, Any]] = [{"label": None, "probabilities": {}} for _ in rows]
        if kept:
            chosen, asked = [names[i] for i in kept], [rows[i] for i in kept]
            lengths = [self.kinds[name].max_tokens for name in chosen]
            for i, name in zip(kept, chosen, strict=True):
                if isinstance(kind := self.kinds[name], LabelKind):
                    kind.cuts.count_one(encoded[i], kind.max_tokens)
            made = self._labels(chosen, self._inputs(asked, [encoded[i] for i in kept], lengths), asked)
            for i, answer in zip(kept, made, strict=True):
                answers[i] = answer
        for i, answer in enumerate(answers):
            answer["adapter"] = names[i] if i in kept else None
            if routed is not None:
                answer["similarity"] = round(routed.similarity[i], 6)
        return answers

    def _labels(
        self, names: list[str], inputs: dict[str, torch.Tensor], rows: list[InputRow]
    ) -> list[dict[str, Any]]:  # fmt: skip
        kinds = [self.kinds[name] for name in names]
        if isinstance(kinds[0], GenerationKind):
            return self._written(names, rows)
        with use_experts(self.model, names):
            model: Any = self.model
            logits = model(**inputs).logits.float().cpu()
        found = []
        for kind, row in zip(kinds, logits, strict=True):
            assert isinstance(kind, LabelKind)
            found.append(kind.answer(row))
        return found

    def _written(self, names: list[str], rows: list[InputRow]) -> list[dict[str, Any]]:
        """Names that were trained on texts of another length, or write longer ones, are a batch of their own."""
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            kind = self.kinds[name]
            assert isinstance(kind, GenerationKind)
            groups.setdefault(repr((kind.max_tokens, sorted(kind.settings.items()))), []).append(i)
        found: list[dict[str, Any]] = [{} for _ in rows]
        for group in groups.values():
            kind = self.kinds[names[group[0]]]
            assert isinstance(kind, GenerationKind)
            some = [rows[i] for i in group]
            texts, pairs = [row.text for row in some], [row.pair for row in some if row.pair is not None]
            with use_experts(self.model, [names[i] for i in group]):
                made = in_one_batch(kind, len(some)).predictions(self.model, texts, pairs or None)
            for i, answer in zip(group, made, strict=True):
                found[i] = answer
        return found


def in_one_batch(kind: GenerationKind, rows: int) -> GenerationKind:
    """The same, with all rows in one batch, as use_experts expects them."""
    return dataclasses.replace(kind, batch_size=rows)


def open_pack(
    folder: str,
    model: str | None,
    adapter: str | None,
    threshold: str | None,
    batch_size: int | None,
    settings: dict[str, Any],
) -> PackRun:
    """Raises ValueError for what is no pack, an adapter that it has not, or names that do not go together."""
    place = resolve_folder(folder, name="pack")
    if not (place / PACK_NAME).is_file():
        raise ValueError(f"pack: got {folder!r}, which holds no {PACK_NAME}, expected a folder of adamix pack")
    packed, tokenizer = load_whole(place, folder, model)
    state = pack_of(packed)
    if adapter is not None and adapter not in state.entries:
        raise ValueError(f"adapter: got {adapter!r}, expected one of {', '.join(state.entries)}")
    runs = {name: _run_of(name, packed, tokenizer, state, place) for name in state.entries}
    kinds = {name: _kind(run, tokenizer, batch_size, settings) for name, run in runs.items()}
    if len({isinstance(kind, GenerationKind) for kind in kinds.values()}) > 1:
        raise ValueError(f"pack: got {folder!r}, whose names write texts and label them, expected one of them")
    pairs = {name: on_pairs(run) for name, run in runs.items()}
    return PackRun(packed, tokenizer, kinds, adapter, _threshold(threshold), pairs)


def on_pairs(run: Run) -> bool | None:
    """Whether it was trained on pairs of texts; None where its file does not tell."""
    return bool(run.text_pair_column) if run.text_column else None


def check_pair(row: InputRow, wanted: bool | None) -> InputRow:
    """The row. Raises ValueError for a second text that is missing, or that the run knows nothing of."""
    if wanted and row.pair is None:
        raise ValueError(f"{row.place}: got one text, expected two: the run was trained on pairs (--pair, or a file)")
    if wanted is False and row.pair is not None:
        raise ValueError(f"{row.place}: got a pair, expected one text: the run was trained on single texts")
    return row


def _threshold(given: str | None) -> float | str | None:
    if given is None or given == AUTO:
        return given
    try:
        return float(given)
    except ValueError:
        raise ValueError(f"threshold: got {given!r}, expected a cosine from -1 to 1, or {AUTO}") from None


def _run_of(name: str, model: Any, tokenizer: Any, state: Pack, folder: Path) -> Run:
    values, run = state.entries[name].run, _described(name, model, tokenizer, state)
    return told if values is not None and same_labels(told := run_of(values, f"{folder}, {name}"), run) else run


def _kind(run: Run, tokenizer: Any, size: int | None, settings: dict[str, Any]) -> Kind:
    return make_kind(run.task, run.label_names, tokenizer, run.max_tokens, (), {**run.generation, **settings}, size)


def _described(name: str, model: Any, tokenizer: Any, state: Pack) -> Run:
    """A run out of what the pack tells of a name that came without its run file."""
    entry = state.entries[name]
    if "SequenceClassification" not in type(model).__name__:
        task, names = "generation", []
    elif entry.problem == "regression" or (entry.labels is not None and len(entry.labels) == 1):
        task, names = "regression", ["score"]
    else:
        count = model.config.num_labels
        task, names = "classification", entry.labels or [f"LABEL_{number}" for number in range(count)]
    return told_run(model, tokenizer, task, names)
