"""load_task: what may stand in a label or a text, and what each mistake is answered with."""

import json

import pytest

from adamix_kernels.tasks import load_task

NAN = float("nan")


def _lines(folder, labels, dev=None, name="train"):
    """A JSONL folder: labels of any JSON type; dev as train unless it is given."""
    for part, values in ((name, labels), ("dev", labels if dev is None else dev)):
        lines = [json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(values)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        ([10, 9, 2], ["2", "9", "10"], [2, 1, 0]),
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        ([True, False], ["false", "true"], [1, 0]),
        ([1.0, 0.0, 1], ["0", "1"], [1, 0, 1]),
        (["1.0", "0"], ["0", "1"], [1, 0]),
        (["None", "some"], ["None", "some"], [0, 1]),  # a word as any other
        (["-1", "1", "0"], ["-1", "0", "1"], [0, 2, 1]),
    ],
)
def test_classes(tmp_path, labels, names, ids):
    task = load_task(_lines(tmp_path, labels))
    assert (task.kind, task.label_names, task.train.labels, task.notes) == ("classification", names, ids, ())


@pytest.mark.parametrize(
    ("labels", "task", "numbers", "told"),
    [
        ([0.5, 2, 3], "auto", [0.5, 2.0, 3.0], True),
        (["0.5", "-2", "1e1"], "auto", [0.5, -2.0, 10.0], True),
        ([1, 2, 3], "regression", [1.0, 2.0, 3.0], False),
    ],
)
def test_numbers(tmp_path, labels, task, numbers, told):
    found = load_task(_lines(tmp_path, labels), task=task)
    assert (found.kind, found.label_names, found.num_labels) == ("regression", ["score"], 1)
    assert found.train.labels == numbers
    assert all(type(label) is float for label in found.train.labels)
    assert any("a regression is trained" in note for note in found.notes) == told


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        (["a", None], "auto", r"train\.jsonl, line 2, column 'label': got nothing, expected a label; fill it in"),
        (["a", ""], "auto", r"line 2, column 'label': got nothing, expected a label"),
        (["a", " "], "auto", r"line 2, column 'label': got ' ', expected a label"),
        ([1, NAN], "auto", r"line 2, column 'label': got nan, expected a label"),
        (["1", "NaN"], "auto", r"line 2, column 'label': got 'NaN', expected a label"),
        (
            [1, "a"],
            "auto",
            r"line 2, column 'label': got 'a', a string, after 1, a number, expected labels",
        ),
        ([True, 1], "auto", r"line 2, column 'label': got 1, a number, after True, a boolean"),
        (["a", ["b"]], "auto", r"line 2, column 'label': got \['b'\], a list, after 'a', a string"),
        ([{"a": 1}, {"a": 2}], "auto", r"line 1, column 'label': got \{'a': 1\}, expected a class"),
        (["a", "a"], "auto", r"column 'label': got 1 distinct labels \('a'\), expected at least 2"),
        (["a", "a ", "b"], "auto", r"got the labels 'a' and 'a ', which differ in spaces alone"),
        (
            [1, 2.5],
            "classification",
            r"line 2, column 'label': got 2\.5, expected a class: .*learns numbers",
        ),
        (["4.5", "n/a"], "auto", r"line 2, column 'label': got 'n/a' among numbers such as 4\.5"),
        ([0.5, None], "auto", r"line 2, column 'label': got nothing, expected a number"),
        ([0.5, float("inf")], "regression", r"line 2, column 'label': got inf, expected a number"),
        ([0.5, True], "auto", r"line 2, column 'label': got True, expected a number"),
        (
            ["good", "bad"],
            "regression",
            r"line 1, column 'label': got 'good', expected a number; .*classification",
        ),
        (["a", ""], "generation", r"line 2, column 'label': got nothing, expected a text to write"),
        (["a", ["b", 3]], "generation", r"line 2, column 'label': got \['b', 3\], expected a text to write"),
        (["a", []], "generation", r"line 2, column 'label': got \[\], expected a text to write"),
    ],
)
def test_labels_that_cannot_be(tmp_path, labels, task, message):
    given = {"text_column": "text", "label_column": "label"} if task == "generation" else {}
    with pytest.raises(ValueError, match=message):
        load_task(_lines(tmp_path, labels), task=task, **given)


def test_a_label_that_training_lacks(tmp_path):
    message = r"dev\.jsonl, line 2, column 'label': got 'c', expected one of the training labels: 'a', 'b'; mend or"
    with pytest.raises(ValueError, match=message):
        load_task(_lines(tmp_path, ["a", "b"], dev=["a", "c"]))


def test_texts_to_write_are_no_classes(tmp_path):
    """Generation data without --task generation: every way it ends names the flag."""
    written = [f"{name} serves {food} ." for name in ("blue", "red") for food in ("fish", "meat", "tea")]
    way = r"6 different labels in 6 rows may be texts to write: --task generation$"
    (tmp_path / "one.csv").write_text("\n".join(["text,label", *(f"text {i},{w}" for i, w in enumerate(written))]))
    with pytest.raises(ValueError, match=r"6 different training texts are too few.*" + way):
        load_task(str(tmp_path / "one.csv"))
    with pytest.raises(ValueError, match=r"got 'green serves rice \.', expected one of the training labels.*" + way):
        load_task(_lines(tmp_path, written, dev=["green serves rice ."]))
    notes = load_task(_lines(tmp_path, written, dev=written[:1])).notes
    assert "6 classes are trained on 6 rows; for texts to write: --task generation." in notes
    assert not load_task(_lines(tmp_path, ["a", "b", "c"] * 2, dev=["a"])).notes


def test_a_label_that_training_lacks_in_a_file_without_a_header(tmp_path):
    (tmp_path / "train.tsv").write_text("gj04\t1\t\ta .\ngj04\t0\t*\tb .\n")
    (tmp_path / "dev.tsv").write_text("gj04\t2\t\tc .\n")
    with pytest.raises(ValueError, match=r"dev\.tsv, line 1, column 'label': got '2'"):
        load_task(str(tmp_path))


def test_what_the_notes_tell_of_labels(tmp_path):
    many = load_task(_lines(tmp_path, list(range(30))))
    assert many.num_labels == 30
    assert many.notes == ("30 classes are trained, all integers; for a number to predict: task regression.",)
    mixed = load_task(_lines(tmp_path, ["1", "2", "unknown"]))
    assert mixed.notes == ("The labels in 'label' are names, as 'unknown' among integers are no numbers.",)
    cased = load_task(_lines(tmp_path, ["Keep", "drop", "keep"] * 4))
    assert cased.label_names == ["Keep", "drop", "keep"]
    assert cased.notes == ("The labels 'Keep', 'keep' in 'label' differ in case alone, and are classes apart.",)


def test_snli_rows_without_a_gold_label_are_left_out(tmp_path):
    for part in ("train", "dev"):
        rows = [("yes", "a", "b"), ("-", "c", "d"), ("no", "e", "f")]
        lines = [json.dumps(dict(zip(("gold_label", "sentence1", "sentence2"), row))) for row in rows]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = load_task(str(tmp_path))
    assert (task.train.texts, task.train.pairs, task.train.labels) == (["a", "e"], ["b", "f"], [1, 0])
    assert task.notes == tuple(
        f"{tmp_path / part}.jsonl: 1 rows without a label are left out." for part in ("train", "dev")
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.tsv", "sentence\tlabel\na\t0\nb\n", r"train\.tsv, line 3: got 1 column, expected 2"),
        ("train.tsv", "sentence\tlabel\na\t0\n\nb\t1\n", r"train\.tsv, line 3: got 1 column, expected 2"),
        ("train.tsv", 'sentence\tlabel\n"a\tb"\t0\n', r"got 3 columns, expected 2 \(quotes mean nothing in a TSV"),
        ("train.tsv", "sentence\tlabel\n", r"train\.tsv: got a header and no rows"),
        ("train.tsv", "", r"train\.tsv: got an empty file"),
        ("train.tsv", "label\tlabel\n0\t1\n", r"train\.tsv, line 1: got the column 'label' twice"),
        ("train.tsv", b"sentence\tlabel\nab\xff\t0\n", r"train\.tsv, line 2: byte 3 of the line is not UTF-8"),
        ("train.csv", "text,label\na,b,0\n", r"train\.csv, line 2: got 3 columns, expected 2 .*needs quotes around it"),
        ("train.csv", 'text,label\n"a\nb",0\n"c" d,1\n', r"train\.csv, line 4: got a row that is no CSV"),
        ("train.csv", 'text,label\na,0\n"c,1\nd,0\n', r"train\.csv, line 3: got a row that is no CSV \(unexpected end"),
        ("train.csv", "text,label\n", r"train\.csv: got a header and no rows"),
        ("train.csv", "", r"train\.csv: got an empty file"),
        ("train.tsv", "text,label\na,1\n", r"train\.tsv, line 1: got one column, .* by ',', expected tabs"),
        ("train.csv", b"\xff\xfet\0", r"train\.csv, line 1: byte 1 of the line is not UTF-8"),
        ("train.jsonl", '{"text": "a", "label": 1}\n{"text"\n', r"line 2: got no JSON .*one object a line"),
        ("train.jsonl", '{"text": "a", "label": 1}\n\n[1]\n', r"train\.jsonl, line 3: got \[1\], expected an object"),
        ("train.jsonl", '{"text": "a", "label": 1}\n"b"\n', r"train\.jsonl, line 2: got a text alone, expected an obj"),
        ("train.jsonl", '{"text": "a", "label": 1}\n{"label": 0}\n', r"line 2, column 'text': got nothing, expec"),
        ("train.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', r"line 2, column 'label': got nothing"),
        ("train.jsonl", '{"text": 5, "label": 1}\n{"text": "b", "label": 0}\n', r"line 1, column 'text': got 5, ex"),
        ("train.jsonl", '{"text": "\\ud800", "label": 1}\n{"text": "b", "label": 0}\n', r"line 1, .* half of a surro"),
        ("train.jsonl", "", r"train\.jsonl: got no rows"),
        ("train.json", "[", r"train\.json: got a file that is not JSON"),
        ("train.json", '{"data": [\n]}', r"train\.json, line 1: got no JSON .*, or a list of objects"),
        ("train.json", "[1]", r"train\.json, row 1: got 1, expected an object"),
        ("train.json", "[" * 100_000, r"train\.json: got a file that is not JSON"),
        ("train.parquet", "no", r"train\.parquet: got a file that is not Parquet"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message):
        load_task(str(tmp_path))


def test_rows_with_an_empty_text_are_counted(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n,0\nb,1\n")
    (tmp_path / "dev.csv").write_text("text,label\na,0\n")
    assert load_task(str(tmp_path)).notes == (f"{tmp_path / 'train.csv'}: 1 rows have an empty text in 'text'.",)


def test_a_tsv_file_with_quoted_cells_is_told(tmp_path):
    for part in ("train", "dev"):
        text = 'text\tlabel\n"she said ""no"""\t1\n"yes" is no "no"\t0\n'
        (tmp_path / f"{part}.tsv").write_text(text)
    told = load_task(str(tmp_path)).notes
    assert [note.partition(": ")[2] for note in told] == [
        "1 texts look quoted, but quotes mean nothing in a TSV file: save it as CSV."
    ] * 2


def test_tsv_keeps_quotes_carriage_returns_and_a_byte_order_mark(tmp_path):
    text = '\ufeffsentence\tlabel\r\n"good \u2028 one\t1\r\nbad\t0\r\n\r\n'
    for part in ("train", "dev"):
        (tmp_path / f"{part}.tsv").write_bytes(text.encode())
    task = load_task(str(tmp_path))
    assert (task.train.texts, task.train.labels) == (['"good \u2028 one', "bad"], [1, 0])
