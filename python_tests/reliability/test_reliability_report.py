"""docs/reliability.md says what reliability/results/ holds, and every part has run in full and passed."""

import dataclasses
import json

import pytest

from reliability import parts, record, report
from reliability.__main__ import main


def test_the_committed_report_is_what_the_results_say():
    assert report.REPORT.read_text(encoding="utf-8") == report.text()


@pytest.mark.parametrize("part", parts.PARTS)
def test_every_part_has_run_in_full_and_passed(part):
    result = record.read(record.RESULTS / f"{part}.json")
    assert result.size == "full"
    assert result.figures
    assert [f"{figure.about}: {figure.value}" for figure in result.figures if not figure.passed] == []


def test_what_did_not_pass_or_has_not_run_is_said(tmp_path):
    passed = record.Figure("a", "1", "1", True, 2.0)
    missed = dataclasses.replace(passed, about="b", value="0", passed=False)
    record.write(record.record("memory", "full", [passed, missed]), tmp_path)
    text = report.text(tmp_path)
    assert "1 of 2 figures are as expected; 1 of 11 parts have run." in text
    assert "| b | 0 | 1 | 2 | **not so** |" in text
    assert text.count("Not run yet.") == len(parts.PARTS) - 1


def test_another_report_is_refused_and_write_mends_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "REPORT", tmp_path / "reliability.md")
    assert main(["check"]) == 1
    assert "python -m reliability write" in capsys.readouterr().err
    assert main(["write"]) == 0
    assert main(["check"]) == 0
    report.REPORT.write_text("other\n", encoding="utf-8")
    assert main(["check"]) == 1


def test_a_name_that_is_no_part_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="part: got 'fuzz', expected one of fuzz_reference, "):
        main(["run", "static_checks", "fuzz"])


def test_a_record_is_what_was_written(tmp_path):
    result = record.record("memory", "small", [record.Figure("a", "1", "1", True)])
    path = record.write(result, tmp_path)
    assert record.read(path) == result
    assert json.loads(path.read_text(encoding="utf-8"))["command"] == "python -m reliability run memory --size small"
