"""load_task on the files of GLUE's archive, and of CoLA's own, as they are unpacked."""

import pytest

from adamix_kernels.tasks import load_task

# GLUE's archive: file names, contents -> label names, train texts, pairs, labels, dev labels, notes.
GLUE = {
    "mnli": (
        {
            "train": "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
            "0\ta\tb\tneutral\tneutral\n1\tc\td\tneutral\tentailment\n",
            "dev_matched": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\te\tf\tentailment\tneutral\n",
            "dev_mismatched": "not read",
            "test_matched": "index\tsentence1\tsentence2\n0\te\tf\n",
        },
        (["entailment", "neutral"], ["a", "c"], ["b", "d"], [1, 0], [1]),
        ("The dev split is dev_matched.tsv.", "Not read: dev_mismatched.tsv.", "it has no labels"),
    ),
    "qqp": (
        {
            "train": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
            "0\t1\t2\ta\tb\t1\n1\t3\tcut\n2\t5\t6\tc\td\t0\n",
            "dev": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\te\tf\t0\n",
        },
        (["0", "1"], ["a", "c"], ["b", "d"], [1, 0], [0]),
        ("1 cut row is left out, the first in line 3.",),
    ),
    "mrpc": (
        {
            "train": 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t8\t9\t"a\tb\n0\t8\t9\tc\td\n',
            "dev": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t8\t9\te\tf\n",
        },
        (["0", "1"], ['"a', "c"], ["b", "d"], [1, 0], [1]),
        (),
    ),
    "cola": (
        {
            "in_domain_train": "gj04\t1\t\ta b .\ngj04\t0\t*\tb a .\n",
            "in_domain_dev": "gj04\t0\t*\tc .\n",
            "out_of_domain_dev": "gj04\t0\t*\td .\n",
        },
        (["0", "1"], ["a b .", "b a ."], None, [1, 0], [0]),
        ("The dev split is in_domain_dev.tsv.", "Not read: out_of_domain_dev.tsv."),
    ),
    "cola of the archive": (
        {
            "train": "gj04\t1\t\ta b .\ngj04\t0\t*\tb a .\n",
            "dev": "gj04\t0\t*\tc .\n",
            "test": "index\tsentence\n0\tBill .\n",
        },
        (["0", "1"], ["a b .", "b a ."], None, [1, 0], [0]),
        ("it has no labels and is left out.",),
    ),
    "qnli": (
        {
            "train": "index\tquestion\tsentence\tlabel\n0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n",
            "dev": "index\tquestion\tsentence\tlabel\n0\te\tf\tnot_entailment\n",
        },
        (["entailment", "not_entailment"], ["a", "c"], ["b", "d"], [0, 1], [1]),
        (),
    ),
    "sst2": (
        {"train": 'sentence\tlabel\n"a \t0\nc\t1\n', "dev": "sentence\tlabel\ne\t1\n"},
        (["0", "1"], ['"a ', "c"], None, [0, 1], [1]),
        (),
    ),
    "stsb": (
        {
            "train": "index\told_index\tsentence1\tsentence2\tscore\n0\t1\ta\tb\t4.5\n1\t2\tc\td\t0.0\n",
            "dev": "index\told_index\tsentence1\tsentence2\tscore\n0\t1\te\tf\t2\n",
        },
        (["score"], ["a", "c"], ["b", "d"], [4.5, 0.0], [2.0]),
        ("a regression is trained",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_the_files_of_the_glue_archive(tmp_path, name):
    files, (names, texts, pairs, labels, dev), notes = GLUE[name]
    for stem, text in files.items():
        (tmp_path / f"{stem}.tsv").write_text(text, encoding="utf-8")
    task = load_task(str(tmp_path))
    assert task.kind == ("regression" if name == "stsb" else "classification")
    assert (task.label_names, task.train.texts, task.train.pairs) == (names, texts, pairs)
    assert (task.train.labels, task.dev.labels) == (labels, dev)
    assert len(task.notes) == len(notes)
    for note, wanted in zip(task.notes, notes):
        assert wanted in note
