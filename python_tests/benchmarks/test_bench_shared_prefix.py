"""The committed counts of sharing a prefix, and what the documentation says of them."""

import csv
import re

from benchmarks import shared_prefix

PAGE = shared_prefix.PICTURE.parent / "training.md"


def rows():
    with shared_prefix.TABLE.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_is_counted_again():
    (row,) = [r for r in rows() if (r["model"], r["first"]) == ("bert-base", "6")]
    found = [shared_prefix.operations("bert-base", 6, shared) for shared in (False, True)]
    assert found == [int(row["operations"]), int(row["shared"])]
    # Of 12 layers the lower 6 run forward on half the rows; the upper 6 forward and backward on all.
    assert abs(float(row["saved"]) - 6 / (12 + 12 + 12)) < 0.01


def test_every_layer_has_a_row_and_the_page_says_the_same():
    found = {(r["model"], int(r["first"])): float(r["saved"]) for r in rows()}
    for name, (_, layers, _) in shared_prefix.MODELS.items():
        saved = [found[name, first] for first in range(layers)]
        assert saved[0] == 0
        assert saved == sorted(saved)
    for words, name in (
        ("BERT-base", "bert-base"),
        ("RoBERTa-large", "roberta-large"),
        ("GPT-2 medium", "gpt2-medium"),
    ):
        line = re.search(rf"^\| {words}, .*$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE).group()
        layers = shared_prefix.MODELS[name][1]
        want = [found[name, first] for first in (layers // 4, layers // 2, 3 * layers // 4, layers - 1)]
        assert [int(n) for n in re.findall(r"(\d+) %", line)] == [round(100 * n) for n in want]
