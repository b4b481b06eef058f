"""The metrics of the paper's tables, each computed by a library that others use for it.

Accuracy, F1, Matthews: scikit-learn. Pearson, Spearman: scipy. BLEU, TER, chrF: sacrebleu. ROUGE-L: rouge_score.
NIST: nltk. CIDEr, METEOR 1.5: pycocoevalcap (METEOR runs Java; without it nltk's METEOR stands in where WordNet is
installed, and says so). All are in the extra `recipes`; what is absent is named beside the scores.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

CLASS_METRICS = ("accuracy", "f1", "matthews")
NUMBER_METRICS = ("pearson", "spearman")
TEXT_METRICS = ("bleu", "nist", "meteor", "rouge_l", "cider", "ter", "chrf")
_PACKAGES = {"sklearn": "scikit-learn", "rouge_score": "rouge-score"}


@dataclass
class Scores:
    """values: by metric (percent, but NIST and CIDEr, which have scales of their own). sources: the library and
    version of each. missing: why a metric that was asked for is absent."""

    values: dict[str, float] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def label_scores(names: Sequence[str], predicted: Sequence[float], labels: Sequence[float]) -> Scores:
    """Scores of predicted classes (F1: of class 1 of two) or of predicted numbers.

    Raises ValueError for a name that is no metric of labels.
    """
    return _all(names, CLASS_METRICS + NUMBER_METRICS, lambda name: _LABELS[name](list(labels), list(predicted)))


def text_scores(names: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Scores of generated texts. references: one or more for each text, as many as each has.

    Texts are taken as they are, split at spaces: see `normalised`. Raises ValueError for an unknown name.
    """
    return _all(names, TEXT_METRICS, lambda name: _TEXTS[name](list(texts), [list(r) for r in references]))


def normalised(text: str) -> str:
    """Lower case, every character that is no letter, digit or underscore a token of its own.

    Source: the reference project's gpt2_decode.py with --tokenize --lower (WebNLG, DART).
    """
    return " ".join(" ".join(re.split(r"(\W)", text.lower())).split())


def _all(names: Sequence[str], known: tuple[str, ...], score: Callable[[str], tuple[float, str]]) -> Scores:
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"metrics: got {wrong[0]!r}, expected some of {', '.join(known)}")
    scores = Scores()
    for name in names:
        try:
            value, package = score(name)
        except ModuleNotFoundError as error:
            needed = (error.name or str(error)).partition(".")[0]
            package = _PACKAGES.get(needed, needed)
            scores.missing[name] = f"needs {package} (pip install 'adamix_kernels[recipes]')"
        except _Unavailable as error:
            scores.missing[name] = str(error)
        except ZeroDivisionError:
            scores.missing[name] = "not defined for these texts: its library divides by zero"
        else:
            if math.isfinite(value):
                scores.values[name], scores.sources[name] = float(value), _version(package)
            else:
                scores.missing[name] = "not defined for these predictions: its library gives no finite number"
    return scores


class _Unavailable(Exception):
    """Something besides a Python package is missing."""


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def _sklearn(name: str) -> Callable[..., tuple[float, str]]:
    def score(labels: list[Any], predicted: list[Any]) -> tuple[float, str]:
        from sklearn import metrics

        return 100 * getattr(metrics, name)(labels, predicted), "scikit-learn"

    return score


def _scipy(name: str) -> Callable[..., tuple[float, str]]:
    def score(labels: list[Any], predicted: list[Any]) -> tuple[float, str]:
        from scipy import stats

        return 100 * getattr(stats, name)(labels, predicted).statistic, "scipy"

    return score


def _sacrebleu(name: str) -> Callable[..., tuple[float, str]]:
    def score(texts: list[str], references: list[list[str]]) -> tuple[float, str]:
        from sacrebleu import metrics

        # Streams of first, second, ... references; a text that has fewer has None there.
        width = max(map(len, references))
        streams = [[r[i] if i < len(r) else None for r in references] for i in range(width)]
        options = {"tokenize": "none", "force": True} if name == "BLEU" else {}
        return getattr(metrics, name)(**options).corpus_score(texts, streams).score, "sacrebleu"

    return score


def _nist(texts: list[str], references: list[list[str]]) -> tuple[float, str]:
    from nltk.translate.nist_score import corpus_nist

    return corpus_nist([[r.split() for r in rs] for rs in references], [t.split() for t in texts], n=5), "nltk"


def _rouge_l(texts: list[str], references: list[list[str]]) -> tuple[float, str]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    best = [scorer.score_multi(rs, t)["rougeL"].fmeasure for rs, t in zip(references, texts, strict=True)]
    return 100 * sum(best) / len(best), "rouge-score"


def _cider(texts: list[str], references: list[list[str]]) -> tuple[float, str]:
    from pycocoevalcap.cider.cider import Cider

    return Cider().compute_score(dict(enumerate(references)), {i: [t] for i, t in enumerate(texts)})[0], "pycocoevalcap"


def _meteor(texts: list[str], references: list[list[str]]) -> tuple[float, str]:
    if shutil.which("java") and importlib.util.find_spec("pycocoevalcap"):
        from pycocoevalcap.meteor.meteor import Meteor

        scorer = Meteor()
        try:
            value, _ = scorer.compute_score(dict(enumerate(references)), {i: [t] for i, t in enumerate(texts)})
        except (OSError, ValueError) as error:
            raise _Unavailable(f"pycocoevalcap's METEOR gave no score: {error}") from error
        return 100 * value, "pycocoevalcap"
    from nltk.translate.meteor_score import meteor_score

    try:
        values = [meteor_score([r.split() for r in rs], t.split()) for rs, t in zip(references, texts, strict=True)]
    except LookupError as error:
        raise _Unavailable(
            "needs pycocoevalcap and Java, or nltk's WordNet (python -m nltk.downloader wordnet)"
        ) from error
    return 100 * sum(values) / len(values), "nltk"


_LABELS = {
    "accuracy": _sklearn("accuracy_score"),
    "f1": _sklearn("f1_score"),
    "matthews": _sklearn("matthews_corrcoef"),
    "pearson": _scipy("pearsonr"),
    "spearman": _scipy("spearmanr"),
}
_TEXTS = {
    "bleu": _sacrebleu("BLEU"),
    "ter": _sacrebleu("TER"),
    "chrf": _sacrebleu("CHRF"),
    "nist": _nist,
    "rouge_l": _rouge_l,
    "cider": _cider,
    "meteor": _meteor,
}
