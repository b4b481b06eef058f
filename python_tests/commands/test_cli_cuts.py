"""Texts longer than a run takes: how many they are is told, and a pack cuts each as its name was trained."""

import json
import logging

import pytest
import tiny_text
import transformers

from adamix_kernels import cli
from adamix_kernels.commands import _kinds
from adamix_kernels.tasks import TextSplit
from adamix_kernels.tasks.cuts import Cuts

LENGTHS = {"films": 8, "meals": 20}  # tokens, of a model of 32 positions
LONG = "was not very good the film was a story and "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs that cut at other lengths, their pack, and what their trainings printed."""
    folder = tmp_path_factory.mktemp("cuts")
    encoder = tiny_text.write_encoder(folder / "encoder")
    for name, most in LENGTHS.items():
        rows = [
            f"{('good', 'bad')[i % 2]} {tiny_text.WORDS[i % 13]} {name[:-1]} {LONG * (i % 3)},l{i % 2}"
            for i in range(30)
        ]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        flags = ["--model", str(encoder), "--data", str(folder / f"{name}.csv"), "--out", str(folder / name)]
        flags += ["--use_cpu", "--disable_tqdm", "--max_steps", "3", "--learning_rate", "1e-2", "--no_baselines"]
        assert cli.main(["train", *flags, "--max_tokens", str(most)]) == 0
    words = [f"{name}={folder / name}" for name in LENGTHS]
    assert cli.main(["pack", *words, "--out", str(folder / "pack")]) == 0
    return folder


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_routed_text_is_answered_as_by_its_name(folder, capsys, caplog):
    texts = [f"{word} {name[:-1]} {LONG * n}" for word in ("good", "bad") for name in LENGTHS for n in (0, 1, 2)]
    call = ["predict", "--pack", str(folder / "pack"), "--json"]
    assert cli.main([*call, "--route", "nearest", *texts]) == 0
    routed = lines(capsys)
    assert set(LENGTHS) == {row["adapter"] for row in routed}
    told = caplog.text
    for name in LENGTHS:
        assert cli.main([*call, "--adapter", name, *texts]) == 0
        for mine, theirs in zip(routed, lines(capsys), strict=True):
            if mine["adapter"] == name:
                assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=2e-6)
    long = [row["adapter"] for row in routed if LONG in row["text"]]
    assert set(long) == set(LENGTHS)  # the longer texts that the longer name answers tell
    for name, most in LENGTHS.items():
        tokens = [len(row["text"].split()) + 2 for row in routed if row["adapter"] == name]
        cut = sum(count > most for count in tokens)
        if cut:
            assert f"{name}: {cut} of {len(tokens)} texts {'is' if cut == 1 else 'are'} longer than {most} tok" in told


@pytest.mark.parametrize("name", LENGTHS)
def test_a_run_tells_how_many_texts_it_cuts(name, folder, capsys, caplog):
    notes = json.loads((folder / name / "adamix_report.json").read_text())["notes"]
    count = {"films": 20, "meals": 10}[name]  # of 5, 15 and 25 tokens
    message = f"{count} of 30 texts are longer than {LENGTHS[name]} tokens, and cut to that"
    assert f"{message}: --max_tokens" in notes
    assert cli.main(["predict", "--run", str(folder / name), "--file", str(folder / f"{name}.csv"), "--json"]) == 0
    assert message in caplog.text
    assert len(lines(capsys)) == 30
    caplog.clear()
    assert cli.main(["eval", str(folder / name), "--split", "train", "--json"]) == 0
    assert f" texts are longer than {LENGTHS[name]} tokens, and cut to that" in caplog.text
    assert len(lines(capsys)) == 1
    caplog.clear()
    assert cli.main(["predict", "--run", str(folder / name), "good film", "--json"]) == 0
    assert cli.main(["predict", "--run", str(folder / name), LONG * 2, "--log-level", "error"]) == 0
    assert caplog.text == ""
    logging.getLogger("adamix_kernels").setLevel(logging.WARNING)


@pytest.mark.parametrize(("more", "part"), [([], "all 30 rows of "), (["--max_rows", "4"], "4 of all 30 rows of ")])
def test_every_row_of_another_file_is_called_so(more, part, folder, capsys):
    path = folder / "again.csv"
    path.write_text((folder / "films.csv").read_text())
    assert cli.main(["eval", str(folder / "films"), "--data", str(path), *more]) == 0
    assert f" on {part}{path} (merged)" in capsys.readouterr().out
    assert cli.main(["eval", str(folder / "films"), "--data", str(path), "--json"]) == 0
    assert lines(capsys)[0]["split"] == "all"
    assert cli.main(["eval", str(folder / "films")]) == 0
    assert " on 3 dev texts of " in capsys.readouterr().out


def test_a_tokenizer_in_python_is_asked_for_what_it_knows():
    tokenizer, cuts = transformers.ByT5Tokenizer(), Cuts()
    cuts.count(tokenizer(["abcdefgh", "abc", "a"], truncation=True, max_length=4), 4)
    cuts.count_one(tokenizer("abcdefgh", truncation=True, max_length=6), 4)
    assert cuts.told(4) == "3 of 4 texts are 4 tokens long or more, and cut to that"
    assert Cuts(3, 0).told(4) is None
    assert Cuts(3, 1).told(4) == "1 of 3 texts is longer than 4 tokens, and cut to that"


def test_contexts_of_a_generation_are_counted(monkeypatch):
    tokenizer = transformers.ByT5Tokenizer(bos_token="</s>")
    kind = _kinds.GenerationKind(tokenizer, 12, {"max_new_tokens": 4})
    monkeypatch.setattr(_kinds, "beam_decode", lambda _model, _tokenizer, part, **_: part)
    kind.encode(TextSplit(["ab", "abcdefghijk"], None, ["x", "y"]))
    assert (kind.cuts.texts, kind.cuts.cut) == (2, 1)
    kind.predictions(None, ["abcdefg", "abcdefgh"], None)  # 8 and 9 tokens with the one that begins the text
    assert (kind.cuts.texts, kind.cuts.cut, kind.room) == (4, 2, 8)
