"""The recipes' data: GLUE's own files, regression, shots, and tables in the three challenges' layouts."""

import collections

import pytest
import tiny_recipes

from adamix_kernels.recipes.shots import draw_shots
from adamix_kernels.tasks import TextSplit, load_task
from adamix_kernels.tasks.table_data import HUB_ROWS, Pair, load_tables, references


def _write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    return str(folder)


GLUE = {
    "mnli": (
        {
            "train": "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n1\tc\td\tentailment\n",
            "dev_matched": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\te\tf\tentailment\tneutral\n",
        },
        (["entailment", "neutral"], ["a", "c"], ["b", "d"], [1, 0], [1]),
    ),
    "qqp": (
        {
            "train": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
            "0\t1\t2\ta\tb\t1\n1\t3\tcut\n2\t5\t6\tc\td\t0\n",
            "dev": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\te\tf\t0\n",
        },
        (["0", "1"], ["a", "c"], ["b", "d"], [1, 0], [0]),
    ),
    "mrpc": (
        {
            "train": 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t8\t9\t"a\tb\n0\t8\t9\tc\td\n',
            "dev": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t8\t9\te\tf\n",
        },
        (["0", "1"], ['"a', "c"], ["b", "d"], [1, 0], [1]),
    ),
    "cola": (
        {"train": "gj04\t1\t\ta b .\ngj04\t0\t*\tb a .\n", "dev": "gj04\t0\t*\tc .\n"},
        (["0", "1"], ["a b .", "b a ."], None, [1, 0], [0]),
    ),
}


@pytest.mark.parametrize("task", GLUE)
def test_the_files_of_the_glue_archive(tmp_path, task, caplog):
    files, (names, texts, pairs, labels, dev) = GLUE[task]
    found = load_task(_write(tmp_path / task, **files))
    assert (found.label_names, found.train.texts, found.train.pairs) == (names, texts, pairs)
    assert (found.train.labels, found.dev.labels) == (labels, dev)
    assert ("1 rows with too few columns" in caplog.text) == (task == "qqp")


def test_numbers_to_predict(tmp_path):
    glue = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t4.5\n1\tc\td\t0.0\n"
    plain = "sentence1\tsentence2\tlabel\na\tb\t2.5\n"
    for text, labels in ((glue, [4.5, 0.0]), (plain, [2.5])):
        task = load_task(_write(tmp_path / str(len(text)), train=text, dev=text), task="regression")
        assert (task.label_names, task.dev.labels) == (["score"], labels)


def test_a_tsv_folder_is_read_as_everywhere_else(tmp_path):
    text = "sentence\tlabel\na\tup\nb\tdown\n"
    task = load_task(_write(tmp_path / "d", train=text, dev=text))
    assert (task.label_names, task.train.labels) == (["down", "up"], [1, 0])


def test_a_label_that_training_lacks_is_an_error(tmp_path):
    files = {**GLUE["cola"][0], "dev": "gj04\t2\t\tc .\n"}
    with pytest.raises(ValueError, match=r"\['2'\] besides"):
        load_task(_write(tmp_path / "d", **files))


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
        Pair("blue : isIn : north | blue : serves : food", "the blue place is in the north ."),
        Pair("blue : isIn : north | blue : serves : food", "a blue place ."),
    ]
    assert len(data.train) == 8


def test_dart_lowers_the_property(tmp_path):
    data = load_tables(str(tiny_recipes.write_dart(tmp_path / "dart")), "dart")
    assert data.train[1] == Pair("red : is_in : south", "the red place is in the south .")


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
        ("dart", {"train.json": "{"}, r"train.json: got a file that is not JSON"),
        ("else", {}, "data_format: got 'else'"),
    ],
)
def test_wrong_tables_are_named(tmp_path, data_format, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_tables(str(tmp_path), data_format)


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train.txt, expected the train part of e2e"):
        load_tables(str(tmp_path), "e2e")
