"""benchmarks.peft_loop: the committed rows, what the page says of them, and operators that are counted again."""

from pathlib import Path

import pytest

from benchmarks import peft_loop

PAGE = Path(__file__).parents[2] / "docs" / "packs.md"


def test_the_page_has_the_committed_rows():
    rows = peft_loop.read()
    assert {(row["mode"], int(row["adapters"])) for row in rows} == {
        (mode, n) for mode in ("inference", "training") for n in peft_loop.ADAPTERS
    }
    assert peft_loop.table(rows) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_operators_of_a_layer_are_counted_again(mode, monkeypatch):
    pytest.importorskip("peft")
    found = peft_loop.measured("layer", 16, 8, mode == "training", rounds=1, width=16)
    (row,) = [
        r
        for r in peft_loop.read()
        if [r[k] for k in ("scope", "mode", "adapters", "tokens")] == ["layer", mode, "16", "8"]
    ]
    assert found["our_ops"] == int(row["our_ops"]) < 10
    if found["peft"] == row["peft"]:
        assert found["peft_ops"] == int(row["peft_ops"])
    assert found["peft_ops"] >= 9 * 16
