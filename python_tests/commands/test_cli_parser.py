"""The commands' parser: flags, JSON, YAML, lists, nearest names, help."""

import dataclasses
import json

import pytest

from adamix_kernels import cli
from adamix_kernels.commands import _parser, _words, train
from adamix_kernels.commands._runs import RunOptions
from adamix_kernels.commands._train_options import LAST, SHOWN


@dataclasses.dataclass
class Options:
    name: str = "a"
    max_rows: int | None = None
    names: list[str] = dataclasses.field(default_factory=list)
    json: bool = False


def parser(**more):
    return _parser.OptionParser("try", (Options,), "Tries.", **more)


@pytest.mark.parametrize("flag", ["--max_rows", "--max-rows", "--max_rows=", "--max-rows="])
def test_both_spellings(flag):
    flags = [flag + "3"] if flag.endswith("=") else [flag, "3"]
    assert parser().parse(flags).parts[0].max_rows == 3


def test_a_switch_does_not_take_the_word_after_it():
    parsed = parser(words="WORD").parse(["--json", "some text", "more", "--name", "b"])
    assert (parsed.parts[0].json, parsed.parts[0].name, parsed.words) == (True, "b", ["some text", "more"])
    assert parser(words="WORD").parse(["--json", "false", "x"]).parts[0].json is False
    assert parser(words="WORD").parse(["--json", "--", "-5 degrees"]).words == ["-5 degrees"]


def test_the_word_of_another_command_is_told_too():
    assert _words.closest("file", ["data", "fill"], "--") == "; the closest is --data"
    assert _words.closest("data", ["dates", "file"]) == "; the closest is file"
    assert _words.closest("output_dir", ["name"]) == ""


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_files_and_flags_that_override_them(tmp_path, suffix):
    path = tmp_path / f"options.{suffix}"
    values = {"name": "b", "max-rows": 7, "names": ["x", "y"], "json": True}
    if suffix == "json":
        path.write_text(json.dumps(values))
    else:
        path.write_text("name: b\nmax-rows: 7\nnames: [x, y]\njson: yes\n")
    wanted = Options("b", 7, ["x", "y"], True)
    alone, beside = parser().parse([str(path)]), parser().parse(["--config", str(path), "--name=c", "--names", "z"])
    assert alone.parts == (wanted,)
    assert beside.parts == (dataclasses.replace(wanted, name="c", names=["z"]),)
    assert beside.given == {"name", "max_rows", "names", "json"}
    assert parser().parse([f"--config={path}", "--json", "false"]).parts[0].json is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--max_row", "3"],
            "--max_row: got an unknown option, expected one of adamix try --help; the closest is --max_r",
        ),
        (["--zzz"], "--zzz: got an unknown option, expected one of adamix try --help$"),
        (["--max_rows", "x"], "--max_rows: got 'x', expected a whole number"),
        (["--max_rows"], "--max_rows: got nothing after it, expected one value"),
        (["--json=perhaps"], "--json: got 'perhaps', expected true or false"),
        (["word"], "got 'word', expected options alone"),
        (["--config"], "--config: got nothing after it"),
    ],
)
def test_errors_are_one_sentence_of_ours(flags, message):
    with pytest.raises(ValueError, match=message) as error:
        parser().parse(flags)
    assert "\n" not in str(error.value)
    assert "HfArgumentParser" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "a.json: got a file that is not JSON"),
        ("a.yaml", "a: [", "a.yaml: got a file that is not YAML"),
        ("a.json", "[1]", "a.json: got list, expected an object of options"),
        (
            "a.yaml",
            "max_row: 3",
            "a.yaml: got the key 'max_row', expected an option of adamix try; the closest is max_rows",
        ),
        ("a.yaml", "max_rows: three", "--max_rows: got 'three', expected a whole number"),
        ("a.json", '{"config": "b"}', "got the key 'config'"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        parser().parse([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], None),
        (["query"], ["query"]),
        (["query,value"], ["query", "value"]),
        (["query, value"], ["query", "value"]),
        (["query", "value"], ["query", "value"]),
        (["mlp.c_proj"], ["mlp.c_proj"]),
        ([r".*layer\.\d{1,2}\.output"], r".*layer\.\d{1,2}\.output"),
        (["all-linear"], "all-linear"),
    ],
)
def test_lists_of_modules(values, wanted):
    assert _parser.names("target_modules", values) == wanted
    config = train.parse(["--target_modules", *values] if values else []).adaptation.config()
    assert config.target_modules == wanted


def test_lists_of_numbers_and_what_is_neither():
    options = train.parse(["--layers_to_transform", "0,2", "--modules_to_save", "classifier", "pooler"]).adaptation
    assert (options.config().layers_to_transform, options.config().modules_to_save) == (
        [0, 2],
        ["classifier", "pooler"],
    )
    with pytest.raises(ValueError, match="layers_to_transform: got 'two', expected whole numbers"):
        _parser.numbers("layers_to_transform", ["two"])
    with pytest.raises(ValueError, match="among several values"):
        _parser.names("target_modules", ["query", "(.*)"])


def test_train_reads_a_file(tmp_path):
    path = tmp_path / "options.json"
    values = {"data": "d", "num_experts": 8, "share": "none", "out": "o", "max_steps": 7, "lora_alpha": 2}
    path.write_text(json.dumps({**values, "lr_scheduler_kwargs": {"num_cycles": 2}, "report_to": ["tensorboard"]}))
    options = train.parse([str(path)])
    config = options.adaptation.config()
    assert (options.data.data, config.num_experts, config.share, config.alpha) == ("d", 8, None, 2.0)
    assert (options.arguments.output_dir, options.arguments.max_steps) == ("o", 7)
    assert options.arguments.weight_decay == train.DEFAULTS["weight_decay"]
    assert options.arguments.lr_scheduler_kwargs == {"num_cycles": 2}
    assert options.arguments.report_to == ["tensorboard"]


def test_flags_and_files_share_their_defaults(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("{}")
    from_file, from_flags = train.parse([str(path)]), train.parse([])
    assert (from_file.data, from_file.adaptation, from_file.fit) == (
        from_flags.data,
        from_flags.adaptation,
        from_flags.fit,
    )
    for name, value in train.DEFAULTS.items():
        assert getattr(from_file.arguments, name) == getattr(from_flags.arguments, name)
        assert getattr(from_flags.arguments, name) == ([] if value == "none" else value)


def test_resume_as_flag_and_in_a_file(tmp_path):
    for flags, wanted in (
        (["--resume"], LAST),
        (["--resume", "--max-steps", "3"], LAST),
        (["--resume", "folder"], "folder"),
        ([], ""),
    ):
        assert train.parse(flags).fit.resume == wanted
    path = tmp_path / "options.json"
    for value, wanted in ((True, LAST), (False, ""), ("folder", "folder")):
        path.write_text(json.dumps({"resume": value}))
        assert train.parse([str(path)]).fit.resume == wanted


def test_early_stopping_keeps_the_best():
    assert train.parse(["--early_stopping", "2"]).arguments.load_best_model_at_end
    assert not train.parse([]).arguments.load_best_model_at_end
    for flags in (["--eval_strategy", "no"], ["--save_strategy", "no"], ["--eval_strategy", "steps"]):
        with pytest.raises(ValueError, match=r"early_stopping: got --eval_strategy .* the same for both"):
            train.parse(["--early_stopping", "1", *flags])


AMOUNTS = ("max_tokens", "max_new_tokens", "beams", "max_train_rows", "early_stopping", "per_device_train_batch_size")
AMOUNTS += ("per_device_eval_batch_size", "gradient_accumulation_steps", "weight_decay")


@pytest.mark.parametrize("flag", AMOUNTS)
def test_amounts_have_a_least_value(flag):
    with pytest.raises(ValueError, match=rf"{flag}: got -1(\.0)?, expected at least"):
        train.parse([f"--{flag}", "-1"])


def test_a_training_has_an_end():
    with pytest.raises(ValueError, match="num_train_epochs: got 0, expected more than 0, or --max_steps"):
        train.parse(["--num_train_epochs", "0"])
    assert train.parse(["--num_train_epochs", "0", "--max_steps", "3"]).arguments.max_steps == 3


def _help(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *flags])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_is_short_and_help_all_is_not(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "118")
    short, everything = _help(capsys, "--help"), _help(capsys, "--help-all")
    assert short.count("\n") < 110
    for title in ("model and data:", "AdaMix:", "training and evaluation:", "the Trainer's"):
        assert title in short
    assert "--num_experts N" in short
    assert "(default: 4)" in short
    assert all(f"--{name}" in short for name in SHOWN)
    assert "--adam_beta1" not in short
    assert "--adam_beta1" in everything
    assert "--num_experts" in everything


def test_the_run_may_be_a_word_or_a_flag():
    from adamix_kernels.commands._runs import the_run

    assert the_run(RunOptions(), ["r"], "eval").run == the_run(RunOptions(run="r"), [], "eval").run == "r"
    with pytest.raises(ValueError, match="run: got 'a', 'b', expected one"):
        the_run(RunOptions(run="a"), ["b"], "eval")


def test_recipe_takes_both_spellings_and_answers_with_the_nearest(capsys):
    assert cli.main(["recipe", "sho"]) == 2
    assert "the closest is show" in capsys.readouterr().err
    assert cli.main(["recipe", "run", "x", "--train-row", "3"]) == 2
    assert "the closest is --train_rows" in capsys.readouterr().err
    name = "evidence/minilm"
    assert cli.main(["recipe", "show", name, "--set", "adamix.num_experts", "8", "--set", "seeds", "2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["adamix"]["num_experts"], shown["seeds"]) == (8, 2)
