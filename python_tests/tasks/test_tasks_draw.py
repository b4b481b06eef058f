"""Rows drawn by a seed: TextSplit.sample, and the dev split that load_task draws."""

import collections
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamix_kernels.tasks import TextSplit, load_task
from adamix_kernels.tasks._draw import dev_rows

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=120)


@settings(deadline=None)
@given(LABELS, st.integers(1, 140), st.integers(0, 5))
def test_a_sample_is_without_repeats_in_order_and_in_proportion(labels, rows, seed):
    split = TextSplit([str(i) for i in range(len(labels))], None, labels)
    drawn = split.sample(rows, seed)
    numbers = [int(text) for text in drawn.texts]
    assert numbers == sorted(set(numbers))
    assert len(drawn) == min(rows, len(labels))
    assert list(drawn.labels) == [labels[i] for i in numbers]
    assert drawn == split.sample(rows, seed)
    share = len(drawn) / len(labels)
    for label, count in collections.Counter(labels).items():
        assert abs(collections.Counter(drawn.labels)[label] - share * count) < 1


def test_another_seed_draws_other_rows_and_the_same_seed_the_same_everywhere():
    split = TextSplit([str(i) for i in range(100)], [f"p{i}" for i in range(100)], [i // 50 for i in range(100)])
    assert split.sample(10, 0).texts != split.sample(10, 1).texts
    assert split.sample(4, 0).texts == ["24", "48", "52", "76"]
    assert split.sample(4, 0).pairs == ["p" + text for text in split.sample(4, 0).texts]
    assert split.sample(None) is split
    assert split.sample(100) is split
    for kind in ([0.5] * 100, ["written"] * 100):
        assert len(TextSplit(split.texts, None, kind).sample(7, 3)) == 7
    with pytest.raises(ValueError, match="rows: got 0, expected at least 1"):
        split.sample(0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), min_size=1, max_size=150),
    st.sampled_from((0.05, 0.1, 0.3, 0.5, 0.9)),
    st.integers(0, 5),
)
def test_a_drawn_dev_split_shares_no_text_and_leaves_every_class_in_training(rows, fraction, seed):
    texts, classes = [text for text, _ in rows], [label for _, label in rows]
    dev = dev_rows(texts, classes, fraction, seed)
    assert dev == dev_rows(texts, classes, fraction, seed)
    assert dev == sorted(set(dev))
    train = [row for row in range(len(rows)) if row not in set(dev)]
    assert not {texts[i] for i in dev} & {texts[i] for i in train}
    first = {}  # a text counts as its first row's class
    for text, label in rows:
        first.setdefault(text, label)
    counts = collections.Counter(first.values())
    drawn = collections.Counter(first[text] for text in {texts[i] for i in dev})
    assert {first[texts[i]] for i in train} == set(counts)
    whole = int(len(first) * fraction + 1e-9)
    assert sum(drawn.values()) == min(whole, len(first) - len(counts))
    if all(count - 1 >= fraction * count + 1 for count in counts.values()):
        for label, count in counts.items():
            assert abs(drawn[label] - whole * count / len(first)) < 1


def test_a_share_that_floats_miss():
    assert 100 * 0.29 < 29
    assert len(dev_rows(range(100), [0] * 100, 0.29, 0)) == 29


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_load_task_draws_by_its_seed(tmp_path):
    rows = [{"text": f"t{i}", "label": ("rare", "often")[i % 5 > 0]} for i in range(100)]
    path = _jsonl(tmp_path / "d.jsonl", rows)
    tasks = [load_task(path, seed=seed, dev_fraction=0.25) for seed in (0, 0, 1)]
    assert tasks[0] == tasks[1]
    assert tasks[0].dev.texts != tasks[2].dev.texts
    for task in tasks:
        assert collections.Counter(task.dev.labels) == {0: 20, 1: 5}
        assert not set(task.dev.texts) & set(task.train.texts)
        assert len(task.train) + len(task.dev) == 100


def test_equal_texts_stay_on_one_side(tmp_path):
    rows = [{"sentence1": f"t{i % 20}", "sentence2": "x", "label": 0.5 + i % 3} for i in range(60)]
    task = load_task(_jsonl(tmp_path / "d.jsonl", rows))
    assert (len(task.train), len(task.dev)) == (54, 6)
    assert not set(task.dev.texts) & set(task.train.texts)


@pytest.mark.parametrize("rows", [2, 9])
def test_too_few_rows_are_an_error_with_ways_out(tmp_path, rows):
    path = _jsonl(tmp_path / "d.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(rows)])
    message = f"{rows} different training texts are too few to draw 0.1 .*a dev part, or a greater dev_fraction"
    with pytest.raises(ValueError, match=message):
        load_task(path)
    if rows > 2:
        assert len(load_task(path, dev_fraction=0.3).dev) == 2
