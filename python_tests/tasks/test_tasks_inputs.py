"""read_inputs: texts without labels, row by row."""

import csv
import io
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamix_kernels.tasks import InputRow, load_task, read_inputs


def _file(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_has_a_text_a_line(tmp_path):
    path = _file(tmp_path, "in.txt", "\ufeffone\r\n\ntwo \u2028 three\nlast")
    rows = [InputRow("one", None, f"{path}, line 1"), InputRow("", None, f"{path}, line 2")]
    rows += [InputRow("two \u2028 three", None, f"{path}, line 3"), InputRow("last", None, f"{path}, line 4")]
    assert list(read_inputs(path)) == rows
    assert [row.text for row in read_inputs(_file(tmp_path, "end.txt", "a\n"))] == ["a"]
    assert list(read_inputs(_file(tmp_path, "none.txt", ""))) == []


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    assert list(read_inputs("-")) == [InputRow(t, None, f"standard input, line {i}") for i, t in ((1, "a"), (2, "b"))]


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("in.csv", 'id,text\n1,"a, b"\n\n2,"c\n""d"""\n3,e\n', (2, 4, 6)),
        ("in.tsv", 'id\ttext\n1\ta, b\n2\tc\\n"d"\n3\te\n', (2, 3, 4)),
        ("in.jsonl", '{"text": "a, b"}\n\n"c\\n\\"d\\""\n{"text": "e", "more": 1}\n', (1, 3, 4)),
        ("in.json", '["a, b", {"text": "c\\n\\"d\\""}, "e"]', (1, 2, 3)),
    ],
)
def test_tables(tmp_path, name, content, places):
    rows = list(read_inputs(_file(tmp_path, name, content)))
    middle = 'c\\n"d"' if name == "in.tsv" else 'c\n"d"'
    assert [row.text for row in rows] == ["a, b", middle, "e"]
    unit = "row" if name == "in.json" else "line"
    assert [row.place for row in rows] == [f"{tmp_path / name}, {unit} {n}" for n in places]


def test_parquet_comes_in_batches(tmp_path):
    path = tmp_path / "in.parquet"
    table = pyarrow.table({"premise": [str(i) for i in range(3000)], "hypothesis": ["h"] * 3000})
    pyarrow.parquet.write_table(table, path, row_group_size=700)
    rows = list(read_inputs(path))
    assert [row.text for row in rows] == [str(i) for i in range(3000)]
    assert rows[2999] == InputRow("2999", "h", f"{path}, row 3000")


def test_columns_are_given_or_found(tmp_path):
    path = _file(tmp_path, "in.csv", "a,b,text\n1,2,3\n")
    assert [(row.text, row.pair) for row in read_inputs(path)] == [("3", None)]
    assert [(row.text, row.pair) for row in read_inputs(path, text_column="b", text_pair_column="a")] == [("2", "1")]
    pairs = _file(tmp_path, "pairs.jsonl", '{"sentence2": "y", "sentence1": "x"}\n')
    assert [(row.text, row.pair) for row in read_inputs(pairs)] == [("x", "y")]


@pytest.mark.parametrize(
    ("name", "content", "good", "message"),
    [
        ("in.txt", b"a\nb\n\xff\n", 2, r"in\.txt, line 3: byte 1 of the line is not UTF-8"),
        ("in.csv", "text,b\na,1\nb\n", 1, r"in\.csv, line 3: got 1 column, expected 2"),
        ("in.csv", 'text,b\na,1\n"b"c,2\n', 1, r"in\.csv, line 3: got a row that is no CSV"),
        ("in.tsv", "text\tb\na\t1\nb\n", 1, r"in\.tsv, line 3: got 1 column, expected 2"),
        ("in.jsonl", '"a"\n{"text": "b"}\n{"other": "c"}\n', 2, r"in\.jsonl, line 3: got no 'text', expected"),
        ("in.jsonl", '"a"\n{"text": "b"}\n{"text": null}\n', 2, r"line 3, column 'text': got nothing, expected"),
        ("in.tsv", "qid1\tquestion1\tquestion2\n1\ta\tb\n2\tcut\n", 1, r"in\.tsv, line 3: got 2 columns, expected 3"),
        ("in.jsonl", '"a"\n{\n', 1, r"in\.jsonl, line 2: got no JSON"),
        ("in.jsonl", '{"text": "a"}\n[]\n', 1, r"in\.jsonl, line 2: got \[\], expected an object"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_when_it_is_reached(tmp_path, name, content, good, message):
    rows = read_inputs(_file(tmp_path, name, content))
    assert len([next(rows) for _ in range(good)]) == good
    with pytest.raises(ValueError, match=message):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "given", "message"),
    [
        ("in.csv", "words,b\na,1\n", {}, r"text_column: .* has the columns 'words', 'b', none is known as the text"),
        ("in.csv", "text,b\na,1\n", {"text_column": "c"}, r"text_column: got 'c', but .* columns 'text', 'b'"),
        ("in.csv", "text,b\na,1\n", {"text_pair_column": "b"}, r"text_pair_column: got 'b', expected text_column"),
        ("in.csv", "", {}, r"in\.csv: got an empty file"),
        ("in.csv", "text;b\na;1\n", {}, r"separated by ';', expected commas"),
        ("in.doc", "", {}, r"got a file of type '\.doc', expected one of \.txt, \.tsv"),
    ],
)  # fmt: skip
def test_files_without_texts(tmp_path, name, content, given, message):
    with pytest.raises(ValueError, match=message):
        list(read_inputs(_file(tmp_path, name, content), **given))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_inputs(tmp_path / "nowhere.txt")


def test_a_text_may_be_long(tmp_path):
    text = "word, " * 50_000  # longer than what the csv module takes by itself
    assert [row.text for row in read_inputs(_file(tmp_path, "in.csv", f'text\n"{text}"\n'))] == [text]


def test_a_file_is_not_read_ahead_of_its_rows(tmp_path):
    path = tmp_path / "in.jsonl"
    line = json.dumps({"text": "x" * 1000}) + "\n"
    path.write_text(line * 20_000)
    rows = read_inputs(path)
    next(rows)
    path.write_text("")  # only what a buffer holds is left, cut within a line
    with pytest.raises(ValueError, match=r"line \d\d?: got no JSON"):
        list(rows)


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
ROWS = st.lists(st.tuples(TEXTS, st.sampled_from(("up", "down", '"', "ä, b"))), min_size=1, max_size=8)


def _written(folder, rows, suffix):
    path = folder / f"in{suffix}"
    objects = [{"text": text, "label": label} for text, label in rows]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), path)
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("text", "label"))
            writer.writeheader()
            writer.writerows(objects)
    elif suffix == ".tsv":
        lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        path.write_bytes(("\n".join(lines) + "\n").encode())
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects), newline="\n")
    else:
        path.write_text(json.dumps(objects))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_texts_come_back_as_they_were_written(tmp_path_factory, suffix):
    @settings(max_examples=60, deadline=None)
    @given(ROWS)
    def check(rows):
        if suffix == ".tsv":
            rows = [(text.replace("\t", " ").replace("\n", " "), label) for text, label in rows]
        folder = tmp_path_factory.mktemp("d")
        path = _written(folder, rows, suffix)
        assert [row.text for row in read_inputs(path)] == [text for text, _ in rows]
        more = [*rows, ("x", "up"), ("y", "down")]
        for part in ("train", "dev"):
            _written(folder, more, suffix).rename(folder / f"{part}{suffix}")
        task = load_task(str(folder))
        assert task.train == task.dev
        assert task.train.texts == [text for text, _ in more]
        assert [task.label_names[int(i)] for i in task.train.labels] == [label for _, label in more]

    check()
