"""adamix predict: order, streaming, resuming, and every way in which input and output can be wrong."""

import io
import json
import sys

import pytest
import tiny_text

from adamix_kernels import cli
from adamix_kernels.commands import _predictions, predict
from adamix_kernels.tasks import InputRow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    encoder, data = tiny_text.write_encoder(folder / "encoder"), tiny_text.write_data(folder / "data")
    flags = ["--model", str(encoder), "--data", str(data), "--out", str(folder / "run"), "--use_cpu", "--disable_tqdm"]
    assert cli.main(["train", *flags, "--max_steps", "6", "--learning_rate", "1e-2", "--no_baselines"]) == 0
    return folder


def call(folder, *more):
    return cli.main(["predict", "--run", str(folder / "run"), *map(str, more)])


def texts(count):
    return [f"{('good', 'bad')[i % 2]} {' '.join(['film'] * (1 + 7 * i % 5))} {i}" for i in range(count)]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_as_lines_and_as_json(folder, capsys):
    assert call(folder, "good film", "bad  meal\nindeed", "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["text"], second["text"]) == ("good film", "bad  meal\nindeed")
    assert first["label"] == max(first["probabilities"], key=first["probabilities"].get)
    assert list(first["probabilities"]) == ["down", "up"]
    assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert call(folder, "good film", "bad  meal\nindeed") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t") for line in lines] == [
        [row["label"], f"{row['probabilities'][row['label']]:.4f}", text]
        for row, text in ((first, "good film"), (second, "bad meal indeed"))
    ]


def test_a_table_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    printed = _predictions.Printed(file, as_json=False)
    printed.write([InputRow("a [b] text", None, "1")], [{"label": "up", "probabilities": {"up": 0.75, "down": 0.25}}])
    out = file.getvalue()
    assert "probability" in out
    assert "0.7500" in out
    assert "a [b] text" in out


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_in_its_order(folder, tmp_path, capsys, kind):
    given, path, out = texts(40), tmp_path / f"in.{kind}", tmp_path / "out.jsonl"
    if kind == "txt":
        path.write_text("\n".join(given) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in given))
    elif kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"sentence": given}), path)
    else:
        path.write_text("\n".join(["sentence", *given]) + "\n")
    assert call(folder, "--file", path, "--out", out, "--batch_size", 2) == 0
    assert capsys.readouterr().out == f"40 rows: {out}\n"
    rows = rows_of(out)
    assert [row["text"] for row in rows] == given
    assert call(folder, *given[:3], "--json") == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for one, other in zip(rows, alone, strict=False):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"good film\nbad film\n")))
    assert call(folder, "--file", "-", "--json") == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["good film", "bad film"]


def test_the_columns_of_the_training_or_those_with_a_known_name(folder, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("id,sentence,review\n1,good film,no\n")
    (tmp_path / "b.csv").write_text("id,text\n1,bad film\n")
    for name, more, wanted in (("a", [], "good film"), ("a", ["--text_column", "review"], "no"), ("b", [], "bad film")):
        assert call(folder, "--file", tmp_path / f"{name}.csv", "--json", *more) == 0
        assert json.loads(capsys.readouterr().out)["text"] == wanted


def test_a_bad_line_is_named_and_what_stands_before_it_is_written(folder, tmp_path, capsys):
    given, path, out = texts(40), tmp_path / "in.tsv", tmp_path / "out.jsonl"
    lines = ["sentence\tid", *(f"{text}\t{i}" for i, text in enumerate(given))]
    broken = list(lines)
    broken[36] = "one column"
    path.write_text("\n".join(broken) + "\n")
    flags = ["--file", path, "--out", out, "--batch_size", 2]
    assert call(folder, *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{path}, line 37: got 1 column, expected 2" in error
    assert f"35 rows are in {out}, and --resume goes on behind them" in error
    assert [row["text"] for row in rows_of(out)] == given[:35]
    path.write_text("\n".join(lines) + "\n")
    assert call(folder, *flags, "--resume") == 0
    whole = tmp_path / "whole.jsonl"
    assert call(folder, "--file", path, "--out", whole, "--batch_size", 2) == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 20, 32, 33, 70])
def test_resuming_gives_the_same_file(folder, tmp_path, kept, capsys):
    path, whole, out = tmp_path / "in.txt", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(texts(70)) + "\n")
    flags = ["--file", path, "--batch_size", 2]
    assert call(folder, *flags, "--out", whole) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    torn = lines[kept][:-5] if kept < 70 else b""  # as a killed process leaves it
    out.write_bytes(b"".join(lines[:kept]) + torn)
    assert call(folder, *flags, "--out", out, "--resume") == 0
    assert capsys.readouterr().out.endswith(f"70 rows: {out}\n")
    assert out.read_bytes() == whole.read_bytes()


def test_resuming_refuses_other_texts_other_predictions_and_more_rows(folder, tmp_path, capsys):
    path, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    path.write_text("\n".join(texts(5)) + "\n")
    flags = ["--file", path, "--out", out, "--resume"]
    assert call(folder, *flags) == 0  # nothing there yet
    before = out.read_bytes()
    path.write_text("\n".join(["other", *texts(5)[1:]]) + "\n")
    assert call(folder, *flags) == 2
    assert f"has another text than {path}, line 1" in capsys.readouterr().err
    path.write_text("\n".join(texts(4)) + "\n")
    assert call(folder, *flags) == 2
    assert "has more than the 4 rows of the input" in capsys.readouterr().err
    assert out.read_bytes() == before
    rows = rows_of(out)
    rows[2]["probabilities"] = {"down": 0.0, "up": 1.0}
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text("\n".join(texts(9)) + "\n")
    before = out.read_bytes()
    assert call(folder, *flags) == 2
    assert f"has other predictions for {path}, line 3" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_file_that_is_there_is_not_touched_unless_asked(folder, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    assert call(folder, "good", "--out", out) == 2
    assert f"out: '{out}' is there already, expected another name, --overwrite, or --resume" in capsys.readouterr().err
    assert call(folder, "good", "--out", out, "--resume") == 2
    assert out.read_text() == "mine\n"
    (tmp_path / "bad.csv").write_text("sentence,id\nonly\n")
    assert call(folder, "--file", tmp_path / "bad.csv", "--out", out, "--overwrite") == 2
    assert out.read_text() == "mine\n"  # no row came before the bad one
    assert call(folder, "good", "--out", out, "--overwrite") == 0
    assert [row["text"] for row in rows_of(out)] == ["good"]


def test_memory_is_that_of_a_chunk():
    given = iter(InputRow(str(i), None, f"line {i}") for i in range(10**9))
    chunks = _predictions.chunks(given, 3)
    assert [[row.text for row in next(chunks)[0]] for _ in range(2)] == [["0", "1", "2"], ["3", "4", "5"]]
    assert next(given).text == "6"


def test_ctrl_c_says_how_far_it_came(folder, tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    path.write_text("\n".join(texts(40)) + "\n")
    real, calls = predict._run.__globals__["chunks"], []

    def interrupted(rows, size):
        for part in real(rows, size):
            if calls:
                raise KeyboardInterrupt
            calls.append(1)
            yield part

    with monkeypatch.context() as patch:
        patch.setattr(predict, "chunks", interrupted)
        assert call(folder, "--file", path, "--out", out, "--batch_size", 2) == 130
    message = f"adamix predict: interrupted: 32 rows are in {out}, and --resume goes on behind them\n"
    assert capsys.readouterr().err.endswith(message)
    assert call(folder, "--file", path, "--out", out, "--batch_size", 2, "--resume") == 0
    assert [row["text"] for row in rows_of(out)] == texts(40)


def test_a_bar_for_files_alone_and_on_stderr_and_not_at_once(folder, tmp_path, capsys, monkeypatch):
    path = tmp_path / "in.txt"
    path.write_text("good\n")
    monkeypatch.setattr(predict, "BAR_AFTER", 600)  # as if a slow machine were quick
    assert call(folder, "--file", path) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(predict, "BAR_AFTER", 0)
    assert call(folder, "--file", path) == 0
    assert "row/s" in capsys.readouterr().err
    for more in (["good"], ["--file", path, "--disable_tqdm"]):
        assert call(folder, *more) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "texts: got neither of TEXT and --file"),
        (["a", "--file", "b.txt"], "texts: got both of TEXT and --file"),
        (["a", "b", "--pair", "c"], "pair: got 1 texts for 2 TEXT"),
        (["a", "--pair", "b"], "text 1: got a pair, expected one text"),
        (["--file", "nowhere.csv"], "nowhere.csv: no such file"),
        (["--file", "a.docx"], "a.docx: got a file of type '.docx'"),
        (["a", "--out", "a.csv"], "out: got 'a.csv', expected a name that ends in .jsonl"),
        (["a", "--out", "nowhere/a.jsonl"], "out: 'nowhere': no such folder"),
        (["a", "--overwrite"], "out: got nothing"),
        (["a", "--resume", "--overwrite", "--out", "a.jsonl"], "resume: got --overwrite too"),
        (["a", "--json", "--out", "a.jsonl"], "json: got --json beside --out"),
        (["a", "--batch_size", "0"], "batch_size: got 0, expected at least 1"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(folder, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert call(folder, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("adamix predict: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_is_needed(capsys):
    assert cli.main(["predict", "a"]) == 2
    assert "run: got nothing" in capsys.readouterr().err
    assert cli.main(["predict", "--run", "nowhere", "a"]) == 2
    assert "run: got 'nowhere', no such folder" in capsys.readouterr().err


def test_a_merged_model_that_plain_transformers_saved(folder, tmp_path, capsys):
    """A LoRA in the weights, a folder without a run file: its head and its labels tell what it is."""
    from adamix_kernels import AdaMixConfig, adapt, merge
    from adamix_kernels.tasks import load_classifier, resolve_model

    model, tokenizer = load_classifier(resolve_model(str(folder / "encoder")), ["no", "yes"], "model")
    merge(adapt(model, AdaMixConfig(method="lora"))).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    assert cli.main(["predict", "--run", str(tmp_path / "plain"), "good film", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["probabilities"]) == {"no", "yes"}
    assert cli.main(["predict", "--run", str(tmp_path / "plain"), "good " * 90]) == 0  # of 32 positions
    capsys.readouterr()
    flags = [str(tmp_path / "plain"), "--data", str(folder / "data"), "--json"]
    assert cli.main(["eval", *flags]) == 2
    assert "got 'up', expected one of the training labels: 'no', 'yes'" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path / "plain")]) == 2
    assert "data: got nothing, expected --data" in capsys.readouterr().err
