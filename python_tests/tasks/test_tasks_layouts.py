"""load_task: every layout of files and folders, its columns, and the parts it makes of them."""

import json
import logging
import sys

import pyarrow
import pyarrow.parquet
import pytest

from adamix_kernels.tasks import Columns, load_split, load_task

ROWS = [(f"text {i}", ("good", "bad")[i % 2]) for i in range(20)]


def _csv(rows, header="text,label"):
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


def _write(path, rows=ROWS, names=("text", "label")):
    """A file of the kind that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = [dict(zip(names, row)) for row in rows]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), path)
        return path
    lines = {
        ".csv": _csv(rows, ",".join(names)),
        ".tsv": _csv(rows, ",".join(names)).replace(",", "\t"),
        ".jsonl": "".join(json.dumps(row) + "\n" for row in objects),
        ".json": json.dumps(objects),
    }
    path.write_text(lines[path.suffix], encoding="utf-8")
    return path


SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dev", ["dev", "validation", "valid", "val"])
def test_a_folder_of_any_kind(tmp_path, suffix, dev):
    for name, rows in (("train", ROWS), (dev, ROWS[:3]), ("test", ROWS[:2])):
        _write(tmp_path / "csv" / f"{name}{suffix}", rows)  # a folder called as a builder of datasets
    task = load_task(str(tmp_path / "csv"))
    assert (task.kind, task.label_names, task.num_labels) == ("classification", ["bad", "good"], 2)
    assert task.train.texts == [text for text, _ in ROWS]
    assert (task.dev.labels, task.test.labels) == ([1, 0, 1], [1, 0])
    assert (task.columns, task.notes) == (Columns("text", None, "label"), ())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_single_file_gives_a_dev_split_drawn_from_it(tmp_path, suffix):
    path = _write(tmp_path / f"reviews{suffix}")
    task = load_task(str(path))
    assert (len(task.train), len(task.dev), task.test) == (18, 2, None)
    assert sorted(task.dev.labels) == [0, 1]
    assert sorted(task.train.texts + task.dev.texts) == sorted(text for text, _ in ROWS)
    assert task.notes == (
        "There is no dev part: 2 of 20 training rows are kept for it (seed 0, each class in proportion).",
    )
    assert load_split(str(path), label_names=["good", "bad"]).labels == [i % 2 for i in range(20)]


def test_a_relative_folder_whose_name_is_a_builder_of_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "json" / "train.jsonl")
    assert len(load_task("json").train) == 18
    assert len(load_task("json/train.jsonl").train) == 18


def test_parts_of_different_kinds_and_capital_letters(tmp_path):
    _write(tmp_path / "Train.CSV".lower())
    _write(tmp_path / "DEV.tsv", ROWS[:4])
    assert len(load_task(str(tmp_path)).dev) == 4


def test_a_test_part_is_never_taken_for_dev(tmp_path):
    _write(tmp_path / "train.csv")
    _write(tmp_path / "test.csv", [("another", "good")])
    task = load_task(str(tmp_path), dev_fraction=0.2)
    assert (len(task.train), len(task.dev), task.test.texts) == (16, 4, ["another"])
    assert task.notes[0].startswith("There is no dev part: 4 of 20 training rows")


@pytest.mark.parametrize(
    ("test", "names"),
    [
        ([("x", -1), ("y", -1)], ("text", "label")),
        ([("x",), ("y",)], ("text",)),
        ([("x", ""), ("y", "")], ("text", "label")),
    ],
)  # fmt: skip
def test_a_test_part_without_labels_is_left_out_and_told(tmp_path, test, names):
    for name, rows in (("train", ROWS), ("dev", ROWS[:2])):
        _write(tmp_path / f"{name}.csv", rows)
    path = _write(tmp_path / "test.csv", test, names)
    task = load_task(str(tmp_path))
    assert (task.test, task.notes) == (None, (f"{path}: it has no labels and is left out.",))


def test_columns_that_are_given(tmp_path):
    rows = [(i, f"q{i}", f"a{i}", i % 2, i % 3) for i in range(30)]
    path = str(_write(tmp_path / "d.csv", rows, ("text", "said", "answered", "label", "three")))
    by_name = load_task(path)
    assert by_name.columns == Columns("text", None, "label")
    task = load_task(path, text_column="said", text_pair_column="answered", label_column="three")
    assert (task.columns, task.num_labels) == (Columns("said", "answered", "three"), 3)
    assert {p.replace("a", "q") for p in task.train.pairs} == set(task.train.texts)
    assert load_task(path, text_column="said").columns == Columns("said", None, "label")


@pytest.mark.parametrize(
    ("names", "columns", "note"),
    [
        (("Review", "Stars"), Columns("Review", None, "Stars"), None),
        (("comment", "category"), Columns("comment", None, "category"), None),
        (("premise", "hypothesis", "label"), Columns("premise", "hypothesis", "label"), None),
        (("text", "label", "score"), Columns("text", None, "label"), "'score' could be meant too (--label_column)"),
        (("text", "content", "label"), Columns("text", None, "label"), "'content' could be meant too (--text_column)"),
        (("", "text", "label"), Columns("text", None, "label"), None),  # pandas' index
    ],
)
def test_columns_found_by_name(tmp_path, names, columns, note):
    rows = [tuple(f"{name} {i}" if "label" not in name.lower() else i % 2 for name in names) for i in range(20)]
    if "label" not in names:
        rows = [(text, i % 2) for i, (text, _) in enumerate(rows)]
    task = load_task(str(_write(tmp_path / "d.csv", rows, names)))
    assert task.columns == columns
    told = [n for n in task.notes if "could be meant" in n]
    assert (told == []) if note is None else (note in told[0])


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (("review", "comment", "label"), {}, r"'review', 'comment' may each be the text: name it by --text_column"),
        (("sentence", "text", "label"), {}, r"'sentence', 'text' may each be the text"),
        (("text", "stars", "rating"), {}, r"'stars', 'rating' may each be the label: name it by --label_column"),
        (("words", "label"), {}, r"the columns 'words', 'label', none is known as the text: .*must be a header"),
        (("text", "mood"), {}, r"'text', 'mood', none is known as the label: name it by --label_column"),
        (("text", "label"), {"text_column": "words"}, r"text_column: got 'words', but .* the columns 'text', 'label'"),
        (("text", "label"), {"text_column": "text", "label_column": "text"}, r"text_column and label_column: got"),
        (("text", "other", "label"), {"text_pair_column": "other"}, r"text_pair_column: got .*, expected text_column"),
        (("sentence1", "sentence2", "question1", "question2", "label"), {}, r"several pairs of texts"),
        (("text;label",), {}, r"line 1: got one column, 'text;label', .* separated by ';', expected commas"),
        (("text", "text"), {}, r"line 1: got the column 'text' twice"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_known(tmp_path, names, given, message):
    path = _write(tmp_path / "d.csv", [tuple("x" for _ in names)] * 3, names)
    with pytest.raises(ValueError, match=message):
        load_task(str(path), **given)


def test_what_is_not_there(tmp_path, monkeypatch):
    for source in ("./nowhere", "/nowhere/at/all", "a/b/c", "train.csv", "some/reviews.tsv"):
        with pytest.raises(FileNotFoundError, match="no such folder or file"):
            load_task(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no training file, expected train.tsv \(or .csv"):
        load_task(str(tmp_path / "empty"))
    _write(tmp_path / "named" / "reviews.csv")
    with pytest.raises(FileNotFoundError, match=r"it has 'reviews.csv'; rename it, or name the file itself"):
        load_task(str(tmp_path / "named"))
    _write(tmp_path / "dev" / "dev.csv")
    with pytest.raises(FileNotFoundError, match="no training file"):
        load_task(str(tmp_path / "dev"))
    for suffix in (".csv", ".tsv"):
        _write(tmp_path / "twice" / f"train{suffix}")
    with pytest.raises(ValueError, match=r"has 'train.csv', 'train.tsv' for the train part, expected one"):
        load_task(str(tmp_path / "twice"))
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(ValueError, match=r"got a file of type '.doc', expected one of .tsv"):
        load_task(str(tmp_path / "notes.doc"))
    with pytest.raises(ValueError, match="task: got 'ranking', expected one of 'auto'"):
        load_task(task="ranking")
    with pytest.raises(ValueError, match="dev_fraction: got 1"):
        load_task(dev_fraction=1)


def test_a_generation_with_several_references(tmp_path):
    lines = [{"prompt": f"p{i % 12}", "completion": f"c{i}"} for i in range(24)]
    lines[0]["completion"] = ["one", "two"]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    task = load_task(str(path), task="generation")
    assert (task.kind, task.num_labels, task.columns) == ("generation", 0, Columns("prompt", None, "completion"))
    assert len(task.train) + len(task.dev) == 25
    assert not set(task.train.texts) & set(task.dev.texts)  # no context on both sides
    whole = task.train.references() | task.dev.references()
    assert whole["p0"] == ["one", "two", "c12"]
    with pytest.raises(ValueError, match=r"text_column, label_column: .*none that are known; expected"):
        load_task(str(_write(tmp_path / "odd.csv")), task="generation")
    given = load_task(str(tmp_path / "odd.csv"), task="generation", text_column="text", label_column="label")
    assert given.columns == Columns("text", None, "label")
    assert dict(zip(given.dev.texts, given.dev.labels)).items() <= dict(ROWS).items()


def test_a_folder_that_datasets_saved_and_one_in_its_layout(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    made = datasets.DatasetDict({s: datasets.Dataset.from_dict(rows, features) for s in ("train", "validation")})
    made.save_to_disk(tmp_path / "saved")
    task = load_task(str(tmp_path / "saved"))
    assert (task.label_names, task.train.labels, task.dev.texts) == (["no", "yes"], [1, 0], ["a", "b"])
    assert task.notes[0].endswith("split train: 1 rows without a label are left out.")
    made["train"].save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"2 different training texts are too few to draw 0.1 of them"):
        load_task(str(tmp_path / "one"))
    for split in ("train", "validation"):
        _write(tmp_path / "json" / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    assert len(load_task("json").train) == 20  # "json" is a builder of datasets too


def test_a_hub_that_does_not_answer_is_not_asked_by_another_library(monkeypatch):
    import datasets
    import huggingface_hub

    def unreached(*_, **__):
        raise ConnectionError("no route")

    def load_dataset(*_):
        assert datasets.config.HF_HUB_OFFLINE
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreached)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"^data: 'my/set' is neither .* of this machine, and the Hub cannot be reached$"
    with pytest.raises(ValueError, match=message):
        load_task("my/set")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_hub_refusal_keeps_its_reasons_and_tells_of_its_tries_once(monkeypatch):
    import datasets

    def refuse(name, config):
        for number in range(3):
            logging.getLogger("huggingface_hub.utils._http").warning("no route, thrown while requesting")
            logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry %d/5].", number)
        try:
            raise TypeError("Couldn't cast label: string to int64")
        except TypeError as error:
            raise RuntimeError(f"An error occurred with {name}\nand {config}") from error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    client, said = logging.getLogger("huggingface_hub.utils._http"), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    client.addHandler(handler)
    message = (
        r"data: 'some/set:rte' is neither a file nor a folder here.*refused it: RuntimeError: An error occurred with "
        r"some/set and rte; because of TypeError: Couldn't cast label: string to int64$"
    )
    with pytest.raises(ValueError, match=message):
        load_task("some/set:rte")
    client.warning("and afterwards all")
    client.warning("and afterwards all")
    client.removeHandler(handler)
    assert said == ["no route, thrown while requesting", *["and afterwards all"] * 2]


def test_one_part_for_a_trained_model(tmp_path):
    for name, rows in (("train", ROWS), ("test", ROWS[:3])):
        _write(tmp_path / f"{name}.csv", rows)
    split = load_split(str(tmp_path), "test", label_names=["other", "good", "bad"])
    assert split.labels == [1, 2, 1]
    with pytest.raises(ValueError, match=r"has no dev part, expected one of train, test"):
        load_split(str(tmp_path), label_names=["good", "bad"])
    with pytest.raises(ValueError, match=r"line 3, column 'label': got 'bad', .* training labels: 'good'"):
        load_split(str(tmp_path), "train", label_names=["good"])
    with pytest.raises(ValueError, match="split: got 'all'"):
        load_split(str(tmp_path), "all")


def test_what_needs_a_package_says_which(tmp_path, monkeypatch):
    path = _write(tmp_path / "d.parquet")
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"d\.parquet: Parquet files need the package pyarrow: .*pip install"):
        load_task(str(path))
    with pytest.raises(ModuleNotFoundError, match=r"'some/set' needs the package datasets: .*pip install"):
        load_task("some/set")
    assert len(load_task(str(_write(tmp_path / "d.csv"))).train) == 18  # nothing but this package
