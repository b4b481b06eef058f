"""The recipes' data: shots, and tables in the three challenges' layouts. GLUE's files: test_tasks_layouts.py."""

import collections
import json

import pytest
import tiny_recipes

from adamix_kernels.recipes.shots import draw_shots
from adamix_kernels.tasks import Columns, TextSplit, load_split, load_task
from adamix_kernels.tasks.table_data import HUB_ROWS, Pair, load_tables, references


def test_shots_are_balanced_and_drawn_by_the_seed():
    split = TextSplit([str(i) for i in range(90)], None, [i % 3 for i in range(90)])
    drawn = draw_shots(split, 30, seed=1)
    assert collections.Counter(drawn.labels) == {0: 10, 1: 10, 2: 10}
    assert [int(t) % 3 for t in drawn.texts] == drawn.labels
    assert drawn == draw_shots(split, 30, seed=1)
    assert drawn.texts != draw_shots(split, 30, seed=2).texts
    assert collections.Counter(draw_shots(split, 31, seed=0).labels) == {0: 11, 1: 10, 2: 10}
    with pytest.raises(ValueError, match="label 0 has 30 training rows"):
        draw_shots(split, 100, seed=0)
    with pytest.raises(ValueError, match="expected at least one for each"):
        draw_shots(split, 2, seed=0)


def test_e2e_text(tmp_path):
    data = load_tables(str(tiny_recipes.write_e2e(tmp_path / "e2e")), "e2e")
    assert data.train[0] == Pair("name : blue | area : north", "the blue place is in the north .")
    known = references(data.test)
    assert len(known) == 4
    assert known["name : red | area : south"] == ["the red place is in the south .", "a red place"]


def test_webnlg_keeps_what_is_good(tmp_path):
    data = load_tables(str(tiny_recipes.write_webnlg(tmp_path / "webnlg")), "webnlg")
    assert data.dev[:2] == [
        Pair("blue : isIn : north | blue : serves : food", "the blue place is in the north .", "City"),
        Pair("blue : isIn : north | blue : serves : food", "a blue place .", "City"),
    ]
    assert (len(data.train), len(data.test)) == (6, 8)


def test_webnlg_is_seen_or_unseen_by_its_category(tmp_path):
    data = load_tables(str(tiny_recipes.write_webnlg(tmp_path / "webnlg")), "webnlg")
    contexts = list(references(data.judged, 1))
    assert [len(texts) for texts in references(data.judged, 1).values()] == [1, 1, 1, 1]
    assert data.parts(contexts) == {"seen": [0, 1, 2], "unseen": [3]}
    assert data.parts(contexts[:3]) == {}
    assert load_tables(str(tiny_recipes.write_dart(tmp_path / "dart")), "dart").parts([]) == {}


def test_dart_lowers_the_property(tmp_path):
    data = load_tables(str(tiny_recipes.write_dart(tmp_path / "dart")), "dart")
    assert data.train[1] == Pair("red : is_in : south", "the red place is in the south .")


@pytest.mark.parametrize("name", ["e2e", "webnlg", "dart"])
def test_tables_are_a_task_of_generation_too(tmp_path, name):
    folder = str(getattr(tiny_recipes, f"write_{name}")(tmp_path / name))
    task, data = load_task(folder, task="generation"), load_tables(folder, name)
    assert (task.kind, task.columns, task.label_names) == ("generation", Columns(None, None, None), [])
    for split, pairs in ((task.train, data.train), (task.dev, data.dev), (task.test, data.test)):
        assert list(zip(split.texts, split.labels)) == [(pair.context, pair.text) for pair in pairs]
    assert task.test.references() == references(data.test)
    assert load_split(folder, "test", task="generation") == task.test


def test_rows_of_the_hub_in_files_of_ones_own(tmp_path):
    rows = [{"tripleset": [["A", "IS", str(i)]], "annotations": {"text": [f"one {i}", f"two {i}"]}} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(str(tmp_path), task="generation")
    assert (len(task.train), len(task.dev)) == (36, 4)
    assert len(load_split(str(tmp_path / "train.jsonl"), task="generation")) == 40
    assert (task.train.references() | task.dev.references())["A : is : 3"] == ["one 3", "two 3"]


def test_rows_as_the_hub_has_them():
    e2e = {"meaning_representation": "name[The Mill], eatType[pub], area[city centre]", "human_reference": "A pub."}
    assert HUB_ROWS["e2e"](e2e) == [Pair("name : The Mill | eatType : pub | area : city centre", "A pub.")]
    dart = {"tripleset": [["A", "IS", "b"]], "annotations": {"source": ["x", "y"], "text": ["one", "two"]}}
    assert HUB_ROWS["dart"](dart) == [Pair("A : is : b", "one"), Pair("A : is : b", "two")]
    webnlg = {
        "modified_triple_sets": {"mtriple_set": [["A | is | b", "A | has | c | d"]]},
        "lex": {"text": ["one", "two"], "comment": ["good", "bad"]},
    }
    assert HUB_ROWS["webnlg"](webnlg) == [Pair("A : is : b | A : has : c | d", "one")]


@pytest.mark.parametrize(
    ("data_format", "files", "message"),
    [
        ("e2e", {"train.txt": "a||b\nno bars\n", "valid.txt": "a||b\n"}, r"train.txt, line 2: got no '\|\|'"),
        ("e2e", {"train.txt": "\n"}, r"train.txt: got no texts, expected some in the train part"),
        ("e2e", {"train.txt": b"a||b\n\xff||c\n"}, r"train.txt, line 2: byte 1 of the line is not UTF-8"),
        ("dart", {"train.json": "{"}, r"train.json: got a file that is not JSON"),
        ("dart", {"train.json": "{}"}, r"train.json: got dict, expected a list of the challenge's rows"),
        (
            "dart",
            {"train.json": '[{"tripleset": [["a", "b"]], "annotations": []}]'},
            r"train.json, row 1: got not enough",
        ),
        ("webnlg", {"train.json": "[]"}, r"train.json: got NoneType, expected a list of the challenge's rows"),
        (
            "webnlg",
            {"train.json": '{"entries": [{}, {"2": {}}]}'},
            r"train.json, entry 2: got no 'modifiedtripleset', ex",
        ),
        ("webnlg", {"train.json": '{"entries": ["a"]}'}, r"train.json, entry 1: got 'str' object has no attribute"),
        ("else", {}, "data_format: got 'else'"),
    ],
)
def test_wrong_tables_are_named(tmp_path, data_format, files, message):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_tables(str(tmp_path), data_format)


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train.txt, expected the train part of e2e"):
        load_tables(str(tmp_path), "e2e")
