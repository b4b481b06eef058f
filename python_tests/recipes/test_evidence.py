"""docs/evidence: its tables say what its rows say, and its command trains what they lack."""

import re
import shutil

import pytest
import tiny_recipes

from adamix_kernels.recipes import load_recipe, read_rows
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import data, dialects, sentences, studies
from benchmarks.evidence.plots import PICTURE
from benchmarks.evidence.prose import SAID, unbacked
from benchmarks.evidence.tables import MARK, table, written

pytest.importorskip("sklearn")


def test_every_table_of_the_page_is_what_its_rows_say(capsys):
    texts = [page.read_text(encoding="utf-8") for page in command.PAGES]
    assert sum(len(MARK.findall(text)) for text in texts) >= 16
    assert sum(len(PICTURE.findall(text)) for text in texts) >= 6
    assert command.main(["--check"]) == 0, "python -m benchmarks.evidence writes the tables and plots"
    for line in MARK.sub("", "\n".join(texts)).splitlines():
        assert not line.startswith(("| adamix", "| lora")), f"a table of results that no rows make: {line}"


def test_a_table_that_differs_from_its_rows_is_found_and_put_right(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    text = command.PAGES[0].read_text(encoding="utf-8")
    page.write_text(re.sub(r"(\| pfeiffer \| )\d\d", r"\g<1>12", text, count=1), encoding="utf-8")
    monkeypatch.setattr(command, "PAGES", (page,))
    assert command.main(["--check"]) == 1
    assert "a table differs from its rows" in capsys.readouterr().err
    assert command.main([]) == 0
    assert page.read_text(encoding="utf-8") == text
    for order in ("sums sst2", "scores nothing", "differences sst2 adapter", "scores sst2+sst2_4_epochs"):
        with pytest.raises(ValueError, match=r"table: got|against: got"):
            table(order, studies.FOLDER)
    assert written("no table", tmp_path) == "no table"


def test_what_the_mixture_adds_is_a_difference_from_each_control():
    names = "sst2_30_shots+sst2_30_controls"
    head, _, row = table(f"adds {names}/pfeiffer/adamix:routing=batch", studies.FOLDER).splitlines()
    said = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    controls = {
        "mixture": "adamix:num_experts=1", "mixture, at equal compute": "pfeiffer:times_epochs=1.8",
        "mixture, at equal parameters": "pfeiffer:bottleneck=40",
    }  # fmt: skip
    for name, method in controls.items():
        lines = table(f"differences {names} {method}", studies.FOLDER).splitlines()
        assert next(line for line in lines if line.startswith("| adamix:routing=batch, merged")).endswith(
            f"| {said[name]} |"
        )


def test_a_sentence_whose_interval_no_table_has_is_found(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    table = "<!-- table: scores x -->\n\n| a | -1.8 (-3.0 to -0.6) |\n\n<!-- end of table -->"
    text = f"merged {{}} above (+0.6\nto +3.0)\n\n{table}\n"
    monkeypatch.setattr(command, "PAGES", (page,))
    monkeypatch.setattr(command, "written", lambda text, folder: text)
    for mean, status in (("1.8", 0), ("-1.8", 0), ("1.9", 1), ("", 1)):
        page.write_text(text.format(mean), encoding="utf-8")
        assert command.main(["--check"]) == status
        assert ("no table says" in capsys.readouterr().err) == bool(status)
    readme = (studies.ROOT / "README.md").read_text(encoding="utf-8")
    assert SAID.search(readme)
    pages = [page.read_text(encoding="utf-8") for page in studies.FOLDER.glob("*.md")]
    assert not unbacked(readme, pages)
    assert unbacked("merged is 1.8 above (+0.6 to +3.1)", pages) == ["1.8 (+0.6 to +3.1)"]


def test_a_plot_of_other_rows_is_found_and_drawn_again(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    page, rows = tmp_path / "README.md", tmp_path / "mine.jsonl"
    page.write_text("![mine](mine.png) ![drawn elsewhere](other.png)\n")
    monkeypatch.setattr(command, "PAGES", (page,))
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    lines = (studies.FOLDER / "sst2_4_epochs.jsonl").read_text().splitlines(keepends=True)
    for some in (lines[:2], lines[:4]):
        rows.write_text("".join(some))
        assert command.main(["--check"]) == 1
        assert "mine.png is not of mine.jsonl" in capsys.readouterr().err
        assert command.main([]) == command.main(["--check"]) == 0
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "other.png").exists()
    rows.write_text(lines[0] + (studies.FOLDER / "sst2.jsonl").read_text())
    with pytest.raises(ValueError, match="plot: got rows of 2 comparisons in 'mine', expected one"):
        command.main([])


def test_every_committed_row_names_its_versions():
    for path in studies.FOLDER.glob("*.jsonl"):
        rows = read_rows(path)
        assert rows
        for row in rows:
            assert {"torch", "transformers", "adamix_kernels"} <= set(row["versions"])
            if "commit" in row:
                assert not (row["commit"] or "").endswith("-dirty")


def test_the_command_trains_a_study_where_its_data_is(tmp_path, monkeypatch, capsys):
    tiny = tiny_recipes.tiny_recipe(tmp_path)
    sets = tmp_path / "sets"
    shutil.copytree(tiny.data, sets / "sst2")
    monkeypatch.setattr(studies, "FOLDER", tmp_path)
    monkeypatch.setattr(data, "HELD_BACK", 4)
    changes = {"model": tiny.model, "training.num_train_epochs": 1, "adamix.bottleneck": 4}
    small = [
        studies.Study("mine", "sst2", ["head"], changes, seeds=1),
        studies.Study("held", "held_back", ["head"], changes, seeds=1, make=data.hold_back),
        studies.Study("other", "nowhere", ["head"], changes, seeds=1),
    ]
    monkeypatch.setattr(command, "STUDIES", small)
    monkeypatch.chdir(tmp_path)
    assert command.train(sets, tmp_path / "work", ["mine", "held", "other"]) == ["other"]
    assert "other: left out" in capsys.readouterr().err
    (row,), (held,) = read_rows(tmp_path / "mine.jsonl"), read_rows(tmp_path / "held.jsonl")
    assert (row["data"], row["train_rows"], held["train_rows"]) == ("sst2", 12, 8)
    assert row["seconds"] > 0
    assert "commit" in row
    assert (
        table("scores mine", tmp_path).splitlines()[2].startswith(f"| head | {row['scores']['plain']['accuracy']:.2f}")
    )


def test_every_study_is_a_comparison_that_the_recipe_knows_and_has_rows():
    names = [study.name for study in studies.STUDIES]
    assert len(set(names)) == len(names)
    for study in studies.STUDIES:
        recipe = load_recipe("evidence/minilm").changed({**studies.MACHINE, **study.changes})
        known = {str(method) for method in studies.expand_methods(study.methods, recipe)}
        rows = {row["method"] for row in read_rows(study.rows)}
        assert rows & known, f"{study.name}: listed, and no row of it"


def e2e_files(folder):
    """Files as the challenge's, of 60 texts each; returns these of the last."""
    (folder / "e2e").mkdir()
    for name in ("valid", "test"):
        texts = [
            f"A{i} is a cheap place that has some {said} of {name} ." for i in range(30) for said in ("tea", "soup")
        ]
        lines = [f"name : A | price : low||{text}\n" for text in texts]
        (folder / "e2e" / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    return set(texts)


def table_rows(path):
    head, *rows = path.read_text(encoding="utf-8").splitlines()
    return head, [row.split("\t") for row in rows]


def test_an_unacceptable_sentence_has_one_fault(tmp_path):
    texts = e2e_files(tmp_path)
    sentences.write_acceptable(tmp_path, tmp_path / "out")
    head, rows = table_rows(tmp_path / "out" / "dev.tsv")
    assert head == "sentence\tlabel"
    whole, faulty = ({text for text, label in rows if label == kind} for kind in "10")
    assert len(rows) == len(whole) + len(faulty) == len(texts)
    assert whole < texts
    known = {}
    for words in (text.split() for text in texts - whole):
        for i, word in enumerate(words):
            before, after = words[:i], words[i + 1 :]
            if word in sentences.SMALL:
                known[" ".join(before + after)] = "missing"
            if word in sentences.FORMS:
                known[" ".join([*before, sentences.FORMS[word], *after])] = "form"
            if after and after[0] != word:
                known[" ".join([*before, after[0], word, *after[1:]])] = "order"
    assert faulty <= set(known)
    assert {known[text] for text in faulty} == {"missing", "form", "order"}


def test_what_settings_are_searched_on_is_a_part_of_training(tmp_path, monkeypatch):
    e2e_files(tmp_path)
    monkeypatch.setattr(sentences, "HELD_BACK", 20)
    sentences.write_acceptable(tmp_path, tmp_path / "all")
    sentences.write_acceptable_held_back(tmp_path, tmp_path / "some")
    parts = [table_rows(tmp_path / "some" / f"{name}.tsv")[1] for name in ("train", "dev")]
    assert [len(part) for part in parts] == [40, 20]
    assert parts[0] + parts[1] == table_rows(tmp_path / "all" / "train.tsv")[1]


def test_questions_have_as_many_with_yes_as_with_no(tmp_path):
    folder = tmp_path / "e2e"
    folder.mkdir()
    said = {
        "cheap": "cheap",
        "less than £ 20": "£ 20",
        "high": "dear",
        "more than £ 30": "over £ 30",
        "moderate": "fair",
    }
    lines = [f"name : A | price : {price}||A is {word} ." for price, word in said.items()]
    lines += ["name : A | area : riverside||A is at the river .", f"name : A | price : high||A is {'so ' * 20}dear"]
    for name in ("valid", "test"):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data.write_questions(tmp_path, tmp_path / "questions")
    for name in ("train", "dev"):
        head, *rows = (tmp_path / "questions" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        assert head == "question\ttext\tlabel"
        assert sorted(rows) == sorted(
            f"Is it cheap ?\tA is {word} .\t{label}"
            for word, label in (("cheap", 1), ("£ 20", 1), ("dear", 0), ("over £ 30", 0))
        )


def test_neither_the_word_nor_the_domain_tells_a_dialects_label(tmp_path):
    for write, judged in ((dialects.write_dialects, 4), (dialects.write_dialects_held_back, 2)):
        write(tmp_path, tmp_path / write.__name__)
        parts = {}
        for name, number in dialects.ROWS.items():
            head, *rows = (tmp_path / write.__name__ / f"{name}.tsv").read_text().splitlines()
            assert head == "sentence\tlabel"
            assert len(set(rows)) == number
            parts[name] = [(set(text.split()), int(label)) for text, label in (row.split("\t") for row in rows)]
        for words, label in parts["train"] + parts["dev"]:
            (domain,) = (d for d, things in enumerate(dialects.THINGS.values()) if words & set(things.split()))
            (word,) = (w for w, name in enumerate(dialects.WORDS) if name in words)
            assert dialects.praises(domain, word) == bool(label)
        seen = [set.union(*(words for words, _ in parts[name])) for name in ("train", "dev")]
        for things in dialects.THINGS.values():
            split = [[thing for thing in things.split() if thing in words] for words in seen]
            assert len(split[1]) == judged
            assert not set(split[0]) & set(split[1])
    domains, words = len(dialects.THINGS), len(dialects.WORDS)
    table = [[dialects.praises(d, w) for w in range(words)] for d in range(domains)]
    assert [sum(row) for row in table] == [words // 2] * domains
    assert [sum(column) for column in zip(*table)] == [domains // 2] * words
