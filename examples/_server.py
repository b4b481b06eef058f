"""One thread with a pack's model: whatever texts wait become one forward, whatever their names."""

import queue
import threading
from concurrent import futures
from typing import NamedTuple

import torch

from adamix_kernels import nearest, use_experts
from adamix_kernels.tasks.encoders import positions

LONGEST = 128  # tokens of a text, where nothing tells at how many its name's training cut


class Busy(RuntimeError):
    """The queue is full: try again later."""


class Asked(NamedTuple):
    text: str
    name: str | None
    answer: futures.Future


def lengths(entries):
    """name -> tokens at which its training cut, of a pack's entries; those that came without a run file are not in it.
    Raises ValueError for a name of pairs of texts."""
    runs = {name: entry.run for name, entry in entries.items() if entry.run is not None}
    of_pairs = [name for name, run in runs.items() if run.get("text_pair_column")]
    if of_pairs:
        raise ValueError(
            f"pack: got {of_pairs[0]!r}, which was trained on pairs of texts, expected names of single ones: adamix "
            "predict --pack takes --pair"
        )
    return {name: run["max_tokens"] for name, run in runs.items()}


def regresses(entry):
    return entry.problem == "regression" or len(entry.labels or ()) == 1


class Server:
    """Answers as `adamix predict --pack` does.

    Args:
        model: a pack of classifiers or regressions. most: texts of one forward. waiting: texts that may wait; one more
            raises Busy. longest: see lengths.

    Raises ValueError: a model that is no such pack, no tokenizer, most or waiting below 1.
    """

    def __init__(self, model, tokenizer, most=32, waiting=256, longest=None):
        self.pack = getattr(getattr(model, "adamix", None), "pack", None)
        kind = type(model).__name__
        if self.pack is None:
            raise ValueError(f"pack: got a {kind} that is no pack, expected a folder of adamix pack or save_pack")
        if "SequenceClassification" not in kind:
            raise ValueError(f"pack: got a {kind}, expected one that labels texts: adamix predict --pack writes texts")
        if tokenizer is None:
            raise ValueError("pack: got no tokenizer in it, nor beside its base model, expected one")
        for name, value in (("most", most), ("waiting", waiting)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.model, self.tokenizer, self.most, self.longest = model.eval(), tokenizer, most, longest or {}
        self.names, self.batches, self.answered = self.pack.entries, 0, 0
        self.queue, self.door, self.closed = queue.Queue(waiting), threading.Lock(), False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def ask(self, text, name=None, timeout=60):
        """{"name", "label", "probability"}, of a regression {"name", "score"}; the similarity where no name was given.

        Raises ValueError: what was asked is wrong. Busy. TimeoutError: nobody is answered then. ConnectionError: it is
        closed. FloatingPointError: the name's outputs are no numbers.
        """
        if not isinstance(text, str):
            raise ValueError(f"text: got {type(text).__name__}, expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: got {text[error.start]!r}, half a character, expected whole ones") from None
        names = dict(self.names)  # as they may change meanwhile
        if name is not None and (not isinstance(name, str) or name not in names):
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(names)}, or none")
        without = [other for other, entry in names.items() if name is None and entry.centroid is None]
        if without:
            raise ValueError(f"name: got none, and {without[0]!r} is without a centroid, expected one of {[*names]}")
        asked = Asked(text, name, futures.Future())
        with self.door:
            if self.closed:
                raise ConnectionError("closing")
            try:
                self.queue.put_nowait(asked)
            except queue.Full:
                raise Busy(f"{self.queue.maxsize} texts are waiting") from None
        try:
            return asked.answer.result(timeout)
        except futures.TimeoutError:
            asked.answer.cancel()  # no forward for nobody
            raise TimeoutError(f"no answer within {timeout:g} s") from None

    def labels(self):
        """Of each name, in id order."""
        return {name: ["score"] if regresses(entry) else entry.labels for name, entry in dict(self.names).items()}

    def alive(self):
        return self.thread.is_alive()

    def waiting(self):
        """How many texts wait."""
        return self.queue.qsize()

    def close(self):
        """What waits is answered first."""
        with self.door:
            if not self.closed:
                self.closed = True
                self.queue.put(None)
        self.thread.join()

    def _run(self):
        some = [self.queue.get()]
        while some:
            while some[-1] is not None and len(some) < self.most and not self.queue.empty():
                some.append(self.queue.get())
            self._answer([one for one in some if one is not None and one.answer.set_running_or_notify_cancel()])
            some = [] if some[-1] is None else [self.queue.get()]

    def _answer(self, some):
        if not some:
            return
        try:
            answers = self._answers([one.text for one in some], [one.name for one in some])
            told = list(zip(some, answers, strict=True))
        except Exception as error:  # whoever asked shall know, nobody else, and the thread goes on
            if len(some) > 1:
                for one in some:
                    self._answer([one])
                return
            told = [(some[0], error)]
        self.batches, self.answered = self.batches + 1, self.answered + len(some)
        for one, found in told:
            give = one.answer.set_exception if isinstance(found, Exception) else one.answer.set_result
            give(found)

    @torch.inference_mode()
    def _answers(self, texts, names):
        """Of each an answer, or its error."""
        with self.pack.lock:  # names and labels stay what they are
            at = [i for i, name in enumerate(names) if name is None]
            routed = dict(zip(at, self._routed([texts[i] for i in at]))) if at else {}
            chosen = [routed[i][0] if i in routed else name for i, name in enumerate(names)]
            with use_experts(self.model, chosen):
                rows = self.model(**self._inputs(texts, [self._cut(name) for name in chosen])).logits.float().cpu()
            found = [self._said(name, row) for name, row in zip(chosen, rows, strict=True)]
        for i, (_, similarity) in routed.items():
            if isinstance(found[i], dict):
                found[i]["similarity"] = similarity
        return found

    def _routed(self, texts):
        """(name, similarity) of each, every name by the text as its training cut it: its centroid is of such texts."""
        longest, groups = self._inputs(texts, [max(map(self._cut, self.names))] * len(texts))["input_ids"].shape[1], {}
        for name in self.names:
            groups.setdefault(min(self._cut(name), longest), []).append(name)
        found = [
            nearest(self.model, names=some, **self._inputs(texts, [most] * len(texts))) for most, some in groups.items()
        ]
        best = found[0].best_of(found)
        return list(zip(best.nearest, best.similarity))

    def _inputs(self, texts, lengths):
        encoded = [self.tokenizer(text, truncation=True, max_length=most) for text, most in zip(texts, lengths)]
        return self.tokenizer.pad(encoded, return_tensors="pt").to(next(self.model.parameters()).device)

    def _cut(self, name):
        most = int(self.tokenizer.model_max_length)
        return min(self.longest.get(name, LONGEST), positions(self.model) or most, most)

    def _said(self, name, row):
        entry = self.names[name]
        labels = entry.labels or [f"LABEL_{number}" for number in range(len(row))]
        if regresses(entry):
            values, said = row[:1], {"name": name, "score": row[0].item()}
        else:
            values = row[: len(labels)].softmax(-1)
            probability, label = values.max(-1)
            said = {"name": name, "label": labels[label], "probability": probability.item()}
        if values.isfinite().all():
            return said
        return FloatingPointError(f"{name}: got outputs that are no finite numbers: its training went wrong")
