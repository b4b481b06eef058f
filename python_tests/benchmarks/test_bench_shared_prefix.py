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


def test_new_times_leave_the_counts_and_new_counts_the_times(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_prefix, "TABLE", tmp_path / "table.csv")
    monkeypatch.setattr(shared_prefix, "PICTURE", tmp_path / "picture.png")
    monkeypatch.setattr(shared_prefix, "operations", lambda name, first, shared: 100 - first * shared)
    monkeypatch.setattr(shared_prefix, "timed", lambda name, first, rounds: (first / 100, 0.0, rounds / 1))
    assert shared_prefix.main(["--models", "gpt2-medium", "--write"]) == 0
    assert shared_prefix.main(["--models", "bert-base", "--write"]) == 0
    assert shared_prefix.main(["--time", "bert-base", "--rounds", "5", "--write"]) == 0
    found = {(row["model"], int(row["first"])): row for row in rows()}
    assert list(found) == [("bert-base", n) for n in range(12)] + [("gpt2-medium", n) for n in range(24)]
    assert {key: row["time_ratio"] for key, row in found.items() if row["time_ratio"]} == {
        ("bert-base", 3): "0.030", ("bert-base", 6): "0.060", ("bert-base", 9): "0.090",
    }  # fmt: skip
    assert (found["bert-base", 6]["saved"], found["bert-base", 6]["time_p80"]) == ("0.0600", "5.000")
    monkeypatch.setattr(shared_prefix, "operations", lambda name, first, shared: 100 - 2 * first * shared)
    assert shared_prefix.main(["--models", "bert-base", "--write"]) == 0
    (row,) = [row for row in rows() if (row["model"], row["first"]) == ("bert-base", "6")]
    assert (row["saved"], row["time_ratio"]) == ("0.1200", "0.060")
    assert (tmp_path / "picture.png").is_file()
