"""docs/evidence: its tables say what its rows say, and its command trains what they lack."""

import shutil

import pytest
import tiny_recipes

from adamix_kernels.recipes import load_recipe, read_rows
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import data, studies
from benchmarks.evidence.tables import MARK, table, written

pytest.importorskip("sklearn")


def test_every_table_of_the_page_is_what_its_rows_say(capsys):
    text = command.PAGE.read_text(encoding="utf-8")
    assert len(MARK.findall(text)) >= 10
    assert command.main(["--check"]) == 0, "python -m benchmarks.evidence writes the tables"
    for line in MARK.sub("", text).splitlines():
        assert not line.startswith("| adamix"), f"a table of results that no rows make: {line}"


def test_a_table_that_differs_from_its_rows_is_found_and_put_right(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    text = command.PAGE.read_text(encoding="utf-8")
    page.write_text(text.replace("| pfeiffer | 86.35", "| pfeiffer | 86.45", 1), encoding="utf-8")
    monkeypatch.setattr(command, "PAGE", page)
    assert command.main(["--check"]) == 1
    assert "a table differs from its rows" in capsys.readouterr().err
    assert command.main([]) == 0
    assert page.read_text(encoding="utf-8") == text
    for order in ("sums sst2", "scores nothing", "differences sst2 adapter", "scores sst2+sst2_4_epochs"):
        with pytest.raises(ValueError, match=r"table: got|against: got"):
            table(order, studies.FOLDER)
    assert written("no table", tmp_path) == "no table"


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


def test_every_study_is_a_comparison_that_the_recipe_knows():
    names = [study.name for study in studies.STUDIES]
    assert len(set(names)) == len(names)
    for study in studies.STUDIES:
        recipe = load_recipe("evidence/minilm").changed({**studies.MACHINE, **study.changes})
        assert studies.expand_methods(study.methods, recipe)


def test_pairs_match_or_have_one_value_changed(tmp_path):
    folder = tmp_path / "e2e"
    folder.mkdir()
    for name in ("valid", "test"):
        lines = ["name : A | area : north||A is north .", "name : A | area : north||north : A", "name : B||B is it ."]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    data.write_pairs(tmp_path, tmp_path / "pairs")
    lines = (tmp_path / "pairs" / "dev.tsv").read_text().splitlines()
    assert lines == [
        "meaning\ttext\tlabel", "name: A, area: north\tA is north .\t1", "name: B, area: north\tA is north .\t0",
        "name: B\tB is it .\t1", "name: A\tB is it .\t0",
    ]  # fmt: skip
