"""The metrics of the paper's tables, each computed by a library that others use for it.

Accuracy, F1, Matthews: scikit-learn. Pearson, Spearman: scipy. BLEU, TER, chrF: sacrebleu. NIST: nltk. ROUGE-L, CIDEr,
METEOR 1.5: pycocoevalcap (without it rouge-score stands in for ROUGE-L; METEOR runs Java, without which nltk's stands
in where WordNet is installed). All are in the extra `recipes`. Each score comes with the library that gave it, and what
is absent with the reason.

Against the scripts of the published figures: BLEU is the E2E challenge's to 13 digits. NIST is lower: nltk takes
the best reference alone, mteval all of them together (7.81 for 8.93 on 300 of E2E's own texts). TER is the corpus's,
theirs the mean of each text's.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._extras import PACKAGES, install_line

CLASS_METRICS = ("accuracy", "f1", "matthews")
NUMBER_METRICS = ("pearson", "spearman")
TEXT_METRICS = ("bleu", "nist", "meteor", "rouge_l", "cider", "ter", "chrf")
CAPTION_METRICS = ("meteor", "rouge_l", "cider")


@dataclass
class Scores:
    """values: by metric (percent, but NIST and CIDEr, which have scales of their own). sources: the library and
    version of each. missing: why a metric that was asked for is absent."""

    values: dict[str, float] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def label_scores(names: Sequence[str], predicted: Sequence[float], labels: Sequence[float], classes: int = 2) -> Scores:
    """Scores of predicted classes (F1: of class 1 of two, or the mean over more classes) or of predicted numbers.

    Raises ValueError for a name that is no metric of labels.
    """
    options = {"f1": {"average": "macro"}} if classes > 2 else {}
    return _all(
        names,
        CLASS_METRICS + NUMBER_METRICS,
        lambda name: _LABELS[name](list(labels), list(predicted), **options.get(name, {})),
    )


def text_scores(
    names: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]], tokens: str = "spaces"
) -> Scores:
    """Scores of generated texts. references: one or more for each text, as many as each has.

    Args:
        tokens: how texts and references become tokens:
            "spaces": as they are, split at spaces;
            "words": lower case, every character that is no letter, digit or underscore a token of its own, as the
            reference project has WebNLG and DART (gpt2_decode.py --tokenize --lower);
            "mteval": lower case, mteval-v13a's tokens, as the E2E challenge's BLEU and NIST (tuetschek/e2e-metrics);
            its METEOR, ROUGE-L and CIDEr take these without the punctuation, as COCO's captions.

    Raises ValueError for an unknown name or kind of tokens.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens: got {tokens!r}, expected one of {', '.join(TOKENS)}")

    def score(name: str) -> tuple[float, str]:
        split = _caption if tokens == "mteval" and name in CAPTION_METRICS else TOKENS[tokens]
        return _TEXTS[name]([split(t) for t in texts], [[split(r) for r in rs] for rs in references])

    return _all(names, TEXT_METRICS, score)


def _words(text: str) -> str:
    return " ".join(re.sub(r"(\W)", r" \1 ", text.lower()).split())


def _mteval(text: str) -> str:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokens: str = Tokenizer13a()(text.lower())
    return tokens


def _caption(text: str) -> str:
    return " ".join(token for token in _mteval(text).split() if any(map(str.isalnum, token)))


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
            package = PACKAGES[needed][0] if needed in PACKAGES else needed
            scores.missing[name] = f"needs {package}: {install_line('recipes')}"
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
    def score(labels: list[Any], predicted: list[Any], **options: Any) -> tuple[float, str]:
        from sklearn import metrics

        return 100 * getattr(metrics, name)(labels, predicted, **options), "scikit-learn"

    return score


def _scipy(name: str) -> Callable[..., tuple[float, str]]:
    def score(labels: list[Any], predicted: list[Any]) -> tuple[float, str]:
        from scipy import stats

        if len(labels) < 2:
            return math.nan, "scipy"
        with warnings.catch_warnings():  # what is not defined is told as such
            warnings.simplefilter("ignore")
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
    if importlib.util.find_spec("pycocoevalcap"):
        from pycocoevalcap.rouge.rouge import Rouge

        # The captions' ROUGE-L: best recall and best precision over the references, recall 1.2 times as heavy.
        value, _ = Rouge().compute_score(dict(enumerate(references)), {i: [t] for i, t in enumerate(texts)})
        return 100 * float(value), "pycocoevalcap"
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


TOKENS: dict[str, Callable[[str], str]] = {"spaces": str, "words": _words, "mteval": _mteval}
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
