"""adamix pack, and adamix predict --pack: by name, by column, by content."""

import dataclasses
import json
import shutil

import pytest
import tiny_text

from adamix_kernels import add_expert, cli, load_pack, replace_expert, save_pack
from adamix_kernels.commands import predict
from adamix_kernels.commands._packs import open_pack
from adamix_kernels.tasks import load, load_base, read_run, write_run

FLAGS = ["--use_cpu", "--disable_tqdm", "--max_steps", "6", "--learning_rate", "1e-2", "--no_baselines"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs of one encoder: labels up/down of films, and three labels of meals."""
    folder = tmp_path_factory.mktemp("packs")
    encoder = tiny_text.write_encoder(folder / "encoder")
    films = tiny_text.write_data(folder / "films")
    meals = folder / "meals"
    meals.mkdir()
    for name, rows in (("train", 12), ("dev", 6)):
        words = ("good", "poor", "fine")
        lines = [f"{words[i % 3]} meal was not very {words[i % 3]}\tm{i % 3}" for i in range(rows)]
        (meals / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    for name, data, method in (("films", films, "adapter"), ("meals", meals, "lora")):
        flags = ["--model", str(encoder), "--data", str(data), "--out", str(folder / f"run_{name}"), "--method", method]
        assert cli.main(["train", *flags, *FLAGS]) == 0
    words = [f"{name}={folder / f'run_{name}'}" for name in ("films", "meals")]
    assert cli.main(["pack", *words, "--out", str(folder / "pack"), "--capacity", "3"]) == 0
    return folder


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


TEXTS = ["good film was a story", "poor meal was not very poor", "bad the film", "fine meal was not very fine"]
NAMES = ["films", "meals", "films", "meals"]


def own(folder, capsys):
    """What each run says of its own texts."""
    found = []
    for text, name in zip(TEXTS, NAMES, strict=True):
        assert cli.main(["predict", "--run", str(folder / f"run_{name}"), text, "--json"]) == 0
        found += lines(capsys.readouterr().out)
    return found


def same(got, want, names):
    for mine, theirs, name in zip(got, want, names, strict=True):
        assert mine["adapter"] == name
        assert (mine["text"], mine["label"]) == (theirs["text"], theirs["label"])
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=2e-6)


def test_a_mixed_file_by_its_column_of_names(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "BAR_AFTER", 600)
    want = own(folder, capsys)
    file = tmp_path / "mixed.csv"
    file.write_text("text,domain\n" + "".join(f"{t},{n}\n" for t, n in zip(TEXTS, NAMES, strict=True)))
    call = ["predict", "--pack", str(folder / "pack"), "--file", str(file), "--adapter-column", "domain"]
    assert cli.main([*call, "--json"]) == 0
    same(lines(capsys.readouterr().out), want, NAMES)
    out = tmp_path / "out.jsonl"
    assert cli.main([*call, "--out", str(out), "--batch_size", "2"]) == 0
    same(lines(out.read_text()), want, NAMES)
    assert "row/s" not in capsys.readouterr().err  # no bar for what is done before BAR_AFTER
    assert cli.main(["predict", "--pack", str(folder / "pack"), "--adapter", "meals", TEXTS[1]]) == 0
    words = capsys.readouterr().out.rstrip("\n").split("\t")
    assert words == ["meals", want[1]["label"], f"{want[1]['probabilities'][want[1]['label']]:.4f}", TEXTS[1]]
    capsys.readouterr()
    for column in ("text", "none"):
        assert cli.main([*call[:-1], column]) == 2
    texts, none = capsys.readouterr().err.splitlines()
    assert texts.endswith(f"{file} has its texts in, expected the column of the names, one of 'domain'")
    assert none.endswith(f"adapter_column: got 'none', but {file} has the columns 'text', 'domain'")
    file.write_text("text,domain\ngood film,films\nbad film,plays\n")
    assert cli.main([*call, "--json"]) == 2
    printed = capsys.readouterr()
    assert len(lines(printed.out)) == 1
    assert "mixed.csv, line 3: got the adapter 'plays', expected one of films, meals" in printed.err


def test_a_mixed_stream_by_content(folder, capsys):
    want = own(folder, capsys)
    call = ["predict", "--pack", str(folder / "pack"), "--route", "nearest", "--json", *TEXTS]
    assert cli.main(call) == 0
    got = lines(capsys.readouterr().out)
    same(got, want, NAMES)
    assert all(-1 <= row["similarity"] <= 1 for row in got)
    bound = sorted(row["similarity"] for row in got)[2]
    assert cli.main([*call, "--threshold", str(bound - 1e-4)]) == 0
    kept = lines(capsys.readouterr().out)
    assert sum(row["adapter"] is None and row["label"] is None for row in kept) == 2
    assert [row["label"] for row in kept if row["adapter"]] == [
        row["label"] for row in got if row["similarity"] > bound - 1e-4
    ]


def test_the_folder_is_whole(folder):
    model, tokenizer = load(folder / "pack")
    assert tokenizer is not None
    assert model.adamix.pack.capacity == 3
    assert [entry.labels for entry in model.adamix.pack.entries.values()] == [["down", "up"], ["m0", "m1", "m2"]]
    assert all(entry.centroid.texts == 12 for entry in model.adamix.pack.entries.values())
    bare, _ = load_base(folder / "run_films")
    assert list(load_pack(bare, folder / "pack").adamix.pack.entries) == ["films", "meals"]


def test_labels_are_those_of_what_a_name_holds_now(folder, capsys):
    pack_of_both, text = folder / "changed", "fine meal was not very fine"
    shutil.copytree(folder / "pack", pack_of_both)
    model, _ = load(pack_of_both)
    save_pack(replace_expert(model, "films", folder / "run_meals"), pack_of_both)  # in Python, beside films' run file
    call = ["predict", "--pack", str(pack_of_both), "--adapter", "films", text, "--json"]
    assert cli.main(call) == 0
    assert set(lines(capsys.readouterr().out)[0]["probabilities"]) == {"m0", "m1", "m2"}
    plain = shutil.copytree(folder / "run_films", folder / "plain")
    (plain / "adamix_run.json").unlink()
    runs = [entry.run for entry in load(pack_of_both)[0].adamix.pack.entries.values()]
    assert [run["label_names"] for run in runs] == [["m0", "m1", "m2"]] * 2
    words = [f"films={folder / 'run_films'}", f"meals={plain}"]
    assert cli.main(["pack", *words, "--out", str(pack_of_both)]) == 0
    films, meals = (entry.run for entry in load(pack_of_both)[0].adamix.pack.entries.values())
    assert (films["label_names"], meals) == (["down", "up"], None)


def test_texts_are_cut_where_the_name_s_training_did(folder, tmp_path):
    short = shutil.copytree(folder / "run_films", tmp_path / "short")
    write_run(short, dataclasses.replace(read_run(short), max_tokens=6))
    model, _ = load(folder / "pack")
    out = save_pack(add_expert(model, "short", short), tmp_path / "pack")
    opened = open_pack(str(out), None, "short", None, None, {})
    assert {name: kind.max_tokens for name, kind in opened.kinds.items()} == {"films": 32, "meals": 32, "short": 6}


def test_peft_folders_are_packed_too(folder, capsys, tmp_path):
    pytest.importorskip("peft")
    assert cli.main(["export", str(folder / "run_meals"), "--out", str(tmp_path / "peft"), "--no_head"]) == 0
    words = [f"films={folder / 'run_films'}", f"lora={tmp_path / 'peft'}"]
    capsys.readouterr()
    assert cli.main(["pack", *words, "--out", str(tmp_path / "pack")]) == 0
    assert "note: --route nearest cannot choose: lora came without the centroid" in capsys.readouterr().out
    assert cli.main(["predict", "--pack", str(tmp_path / "pack"), "--adapter", "lora", "a film", "--json"]) == 0
    assert lines(capsys.readouterr().out)[0]["adapter"] == "lora"
    assert cli.main(["predict", "--pack", str(tmp_path / "pack"), "--route", "nearest", "a film"]) == 2
    assert "got 'lora' without a centroid" in capsys.readouterr().err


def test_a_pack_has_one_tokenizer(folder, tmp_path, capsys):
    words = [f"films={folder / 'run_films'}", f"meals={tmp_path / 'meals'}", "--out", str(tmp_path / "pack")]
    file = shutil.copytree(folder / "run_meals", tmp_path / "meals") / "tokenizer.json"
    values = json.loads(file.read_text())
    vocab = values["model"]["vocab"]
    vocab["good"], vocab["bad"] = vocab["bad"], vocab["good"]
    file.write_text(json.dumps(values))
    assert cli.main(["pack", *words]) == 2
    assert "meals: folder: got" in (err := capsys.readouterr().err)
    assert (
        "in whose tokenizer 5 is 'bad', expected 'good', as in that of films: a pack has one tokenizer for all" in err
    )
    assert not (tmp_path / "pack").exists()
    vocab["good"], vocab["bad"] = vocab["bad"], vocab["good"]
    file.write_text(json.dumps(values))
    file = file.with_name("tokenizer_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_lower_case": False}))
    assert cli.main(["pack", *words]) == 0
    assert "has another normalizer than that of films, which all names get" in capsys.readouterr().out
    (tmp_path / "meals" / "tokenizer.json").unlink()
    assert cli.main(["pack", *words[:-1], str(tmp_path / "other")]) == 0
    assert f"note: the tokenizer of {tmp_path / 'meals'} does not load (" in capsys.readouterr().out


def test_a_peft_folder_that_comes_first_has_its_base_s_words(folder, tmp_path, capsys):
    out = tmp_path / "peft"
    assert cli.main(["export", str(folder / "run_meals"), "--out", str(out), "--no_head"]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    shutil.copy(folder / "run_meals" / "tokenizer_config.json", out)
    text = (folder / "run_meals" / "tokenizer.json").read_text()
    swapped = text.replace('"good"', '"?"').replace('"bad"', '"good"').replace('"?"', '"bad"')
    (out / "tokenizer.json").write_text(swapped)
    words = [f"lora={out}", "--model", str(folder / "encoder"), "--out", str(tmp_path / "pack")]
    assert cli.main(["pack", *words]) == 2
    assert "in whose tokenizer 5 is 'bad', expected 'good', as in that of its base: a pack" in capsys.readouterr().err
    (out / "tokenizer.json").write_text(text)
    assert cli.main(["pack", *words]) == 0


def test_texts_are_of_the_kind_that_the_name_was_trained_on(folder, capsys):
    call = ["predict", "--pack", str(folder / "pack"), "--adapter", "films"]
    assert cli.main([*call, "a film", "--pair", "a meal"]) == 2
    assert "text 1: got a pair, expected one text: the run was trained on single texts" in capsys.readouterr().err
    assert cli.main([*call, "a \udcff film"]) == 2  # what a shell's bytes become that are no UTF-8
    assert "text 1: got 'a \\udcff film', which has half of a surrogate pair in it" in capsys.readouterr().err


WRONG = {
    "got no folder, expected adamix pack NAME=FOLDER": ["pack", "--out", "x"],
    "got 'films', expected NAME=FOLDER": ["pack", "films", "--out", "x"],
    "name: got 'a' twice": ["pack", "a=RUN", "a=RUN", "--out", "x"],
    "out: got nothing": ["pack", "a=RUN"],
    "a: folder: got 'nowhere', no such folder": ["pack", "a=nowhere", "--out", "x"],
    "a: folder: got 'PACK', a pack of several, expected one adaptation: in Python unpack": [
        "pack",
        "a=PACK",
        "--out",
        "x",
    ],
    "capacity: got 1 for 2": ["pack", "a=RUN", "b=RUN", "--capacity", "1", "--out", "x"],
    "holds a run, expected another folder": ["pack", "a=RUN", "--out", "RUN"],
    "holds meals too, expected all its names, or another folder": ["pack", "films=RUN", "--out", "PACK"],
    "pack: got nothing, expected one of --adapter": ["predict", "--pack", "PACK", "text"],
    "pack: got --adapter and --route": ["predict", "--pack", "PACK", "--adapter", "films", "--route", "nearest", "t"],
    "pack: got --run too": ["predict", "--pack", "PACK", "--run", "RUN", "--adapter", "films", "text"],
    "which holds no adamix_pack.json": ["predict", "--pack", "RUN", "--adapter", "films", "text"],
    "adapter: got 'x', expected one of films, meals": ["predict", "--pack", "PACK", "--adapter", "x", "text"],
    "adapter: got it without --pack": ["predict", "--run", "RUN", "--adapter", "films", "text"],
    "adapter_column: got it for TEXT": ["predict", "--pack", "PACK", "--adapter_column", "domain", "text"],
    "adapter_column: got 'a' for b.txt, expected a file with columns": [
        *["predict", "--pack", "PACK", "--adapter_column", "a", "--file", "b.txt"]
    ],
    "threshold: got it without --route": ["predict", "--pack", "PACK", "--adapter", "films", "--threshold", "0", "t"],
    "threshold: got 'x', expected a cosine": [
        "predict",
        "--pack",
        "PACK",
        "--route",
        "nearest",
        "--threshold",
        "x",
        "t",
    ],
    "run: got nothing, expected --run": ["predict", "text"],
    "a pack of several, expected one run": ["eval", "PACK"],
    "which holds a pack, expected another folder": ["merge", "RUN", "--out", "PACK"],
    "holds a pack, expected another folder": [
        "train",
        "--data",
        "remarks",
        "--model",
        "RUN/../encoder",
        "--out",
        "PACK",
    ],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_usage_is_one_line(message, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(folder / "run_films"), "PACK": str(folder / "pack")}
    words = [word.replace("RUN", places["RUN"]).replace("PACK", places["PACK"]) for word in WRONG[message]]
    assert cli.main(words) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert message.replace("PACK", places["PACK"]) in err[0]
    assert not (tmp_path / "x").exists()
