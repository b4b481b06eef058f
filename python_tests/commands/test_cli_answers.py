"""What the command line says without a run: versions, help, the benchmarks' status, and wrong input."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch

from adamix_kernels import __version__, cli, commands
from adamix_kernels.commands import _options, bench
from adamix_kernels.commands import env as commands_env


def test_env_names_versions_and_reasons(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("```text\npython: ")
    assert out.endswith("\n```\n")
    assert f"torch:            {torch.__version__}\n" in out
    assert re.search(r"\nprocessor: .+, [1-9]\d* usable, torch on [1-9]\d* threads\nmemory: +\d+\.\d GiB\n", out)
    assert "backend reference usable: runs on any device" in out
    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["backends"]) == {"reference", "triton", "cuda"}
    assert facts["versions"]["numpy"] == numpy.__version__
    assert facts["cuda"]["torch"] == torch.version.cuda
    assert all(state["reason"] for state in facts["backends"].values())


def test_bench_hands_its_arguments_and_status_on(monkeypatch):
    seen = []

    def run(command, cwd):
        seen.append((command[1:], cwd))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert cli.main(["bench", "step", "--batch", "2"]) == 3
    assert seen[0][0] == ["-m", "benchmarks.run", "step", "--batch", "2"]
    assert (seen[0][1] / "benchmarks" / "run.py").is_file()


def test_bench_is_for_the_clone_that_the_user_stands_in(monkeypatch, tmp_path, capsys):
    """As after pip install ., where no benchmarks are beside the package."""
    seen = []
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "lib" / "site-packages" / "adamix_kernels" / "x" / "y.py"))
    monkeypatch.setattr(bench.subprocess, "run", lambda command, cwd: seen.append(cwd) or mock.Mock(returncode=0))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 2
    assert "in no clone of its sources, expected adamix bench in one" in capsys.readouterr().err
    for name in ("clone/benchmarks/run.py", "clone/adamix_kernels/__init__.py", "clone/docs/a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "clone" / "docs")
    assert cli.main(["bench", "goals"]) == 0
    assert seen == [tmp_path / "clone"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere"], "run: got 'nowhere', no such folder"),
        (["train", "--method", "nope"], "method: got 'nope'"),
        (["train", "--data", "./nowhere", "--model", "m"], "./nowhere': no such f"),
        (["train", "--no-such-flag", "1"], "--no-such-flag"),
        (["train", "nowhere.json"], "nowhere.json"),
        (["eval"], "run: got nothing"),
        (["eval", "nowhere", "--batch_size", "0"], "batch_size: got 0, expected at least 1"),
        (["eval", "nowhere", "--max_rows", "-1"], "max_rows: got -1, expected at least 1"),
        (["export", "nowhere"], "out: got nothing, expected a folder to write to: --out FOLDER"),
        (["merge"], "run: got nothing"),
        (["merge", "r", "--out", __file__], "test_cli_answers.py' is a file, expected a folder or a new name"),
        (["export", "r", "--out", f"{__file__}/e"], "test_cli_answers.py' is a file, expected a folder or a new name"),
        (["train", "--out", __file__], "test_cli_answers.py' is a file, expected a folder or a new name"),
        (["train", "--model", "./nowhere"], "model: cannot load './nowhere': ./nowhere: no such folder\n"),
        (["train", "--model", "nowhere"], "nowhere: no such folder here, no file of a tokenizer ("),
        (["eval", str(Path(__file__).parent)], "run: got '"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys, arguments, message):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"adamix {arguments[0]}: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("command", ["train", "merge", "export", "predict"])
def test_a_folder_that_may_not_be_written_to_is_told_before_any_work(capsys, monkeypatch, tmp_path, command):
    monkeypatch.setattr(_options.os, "access", lambda *_: False)
    flags = ["--run", "nowhere", "text"] if command == "predict" else ["nowhere"] if command != "train" else []
    assert cli.main([command, *flags, "--out", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    place = f"nothing may be written to {str(tmp_path)!r}, expected another place\n"
    assert error == f"adamix {command}: out: {str(tmp_path / 'out.jsonl')!r}: {place}"


def test_traceback_is_shown_on_request():
    with pytest.raises(ValueError, match="no such folder"):
        cli.main(["--traceback", "eval", "nowhere"])


def test_an_interrupted_command_is_status_130(capsys, monkeypatch):
    monkeypatch.setattr(commands_env, "main", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "adamix env: interrupted\n"


def test_help_tells_the_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {status}" in out and text in out for status, text in cli.STATUSES.items())


def test_no_command_is_the_help_and_a_wrong_one_is_answered_by_the_nearest(capsys):
    assert cli.main([]) == 0
    assert "usage: adamix" in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err.endswith("the closest is train\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"adamix_kernels {__version__}\n"


def test_env_and_bench_are_light_and_what_predicts_imports_nothing_that_trains():
    code = "import sys; from adamix_kernels.commands import env, bench; from adamix_kernels import cli; "
    code += "cli.main([]); print('transformers' in sys.modules); "
    code += "from adamix_kernels.commands import evaluate, export, merge, predict; "
    code += "print([name for name in ('peft', 'transformers.trainer_callback', 'sklearn') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n[]\n"), done.stderr


def test_every_command_has_help():
    for name in cli.COMMANDS:
        if name == "recipe":
            assert cli.main([name, "--help"]) == 0
            continue
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
    assert commands.__doc__


def test_python_dash_m_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "adamix_kernels", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)
