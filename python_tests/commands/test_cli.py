"""One small run on the command line: train, eval, merge, export; once in processes of their own."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_text
import transformers

from adamix_kernels import cli, load_adamix, tasks
from adamix_kernels.commands._folder import alone_in

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "launched_cli.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with encoder, data and the checkpoint out of five training steps."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_text.write_encoder(folder / "encoder")
    tiny_text.write_data(folder / "data")
    arguments = ["--model", str(folder / "encoder"), "--data", str(folder / "data"), "--out", str(folder / "out")]
    arguments += ["--max-steps", "5", "--use-cpu", "--per-device-train-batch-size", "4", "--disable-tqdm"]
    arguments += ["--pooling", "model"]
    assert cli.main(["train", *arguments]) == 0
    return folder


def test_train_writes_a_checkpoint_and_its_metrics(trained):
    names = {p.name for p in (trained / "out").iterdir()}
    assert {"adamix_checkpoint.json", "adamix_run.json", "eval_results.json", "tokenizer_config.json"} <= names
    assert tasks.read_run(trained / "out").label_names == ["down", "up"]
    assert 0 <= json.loads((trained / "out" / "eval_results.json").read_text())["eval_accuracy"] <= 1


def test_eval_repeats_the_accuracy_of_training(trained, capsys):
    assert cli.main(["eval", str(trained / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    stored = json.loads((trained / "out" / "eval_results.json").read_text())["eval_accuracy"]
    assert result["accuracy"] == pytest.approx(100 * stored)
    assert (result["rows"], result["split"], result["routing"]) == (6, "dev", "merged")


def test_eval_routes_at_random_when_asked(trained, capsys):
    assert cli.main(["eval", str(trained / "out"), "--routing", "sample", "--split", "train", "--max-rows", "5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("accuracy ")
    assert "on 5 train texts" in out
    assert out.endswith("(sample)\n")


def test_merge_writes_a_plain_adapter_of_the_same_accuracy(trained, capsys):
    assert cli.main(["merge", str(trained / "out"), "--out", str(trained / "merged")]) == 0
    assert "the mean of 4 experts" in (trained / "merged" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"use adamix_kernels\.load, not from_pretrained"):
        transformers.AutoModel.from_pretrained(trained / "merged")
    run = tasks.read_run(trained / "merged")
    model, _ = tasks.load_classifier(tasks.resolve_model(run.model), run.label_names, run.pooling)
    load_adamix(model, trained / "merged")
    assert model.adamix.merged
    capsys.readouterr()
    results = []
    for name in ("out", "merged"):
        assert cli.main(["eval", str(trained / name), "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["accuracy"])
    assert results[0] == results[1]
    assert cli.main(["merge", str(trained / "merged"), "--out", str(trained / "again")]) == 2
    assert "which is merged already, expected a run with its experts" in capsys.readouterr().err


def test_merge_refuses_to_overwrite_the_experts(trained, capsys):
    assert cli.main(["merge", str(trained / "out"), "--out", str(trained / "out")]) == 2
    assert "would lose its experts" in capsys.readouterr().err
    last = next((trained / "out").glob("checkpoint-*"))
    for run, out in ((last, trained / "out"), (trained / "out", last)):  # another run's
        before = {path.name for path in out.iterdir()}
        assert cli.main(["merge", str(run), "--out", str(out)]) == 2
        assert "holds another run, whose experts would be lost, expected another folder" in capsys.readouterr().err
        assert {path.name for path in out.iterdir()} == before


def test_export_writes_adapterhub_files(trained, capsys):
    target = trained / "adapterhub"
    assert cli.main(["export", str(trained / "out"), "--format", "adapterhub", "--out", str(target)]) == 0
    assert (target / "adapter_config.json").is_file()


def test_export_refuses_what_the_formats_cannot_say(trained, tmp_path, capsys):
    for path in (trained / "out").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    run = tasks.read_run(trained / "out")
    tasks.write_run(tmp_path, dataclasses.replace(run, pooling="mean"))
    assert cli.main(["export", str(tmp_path), "--format", "adapterhub", "--out", str(tmp_path / "no")]) == 2
    assert "--pooling model" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_train_lora_and_export_peft(trained, tmp_path):
    arguments = [
        "--model",
        str(trained / "encoder"),
        "--data",
        str(trained / "data"),
        "--method",
        "lora",
        "--pooling",
        "model",
    ]
    arguments += ["--out", str(tmp_path / "lora"), "--max-steps", "2", "--use-cpu", "--disable-tqdm", "true"]
    assert cli.main(["train", *arguments]) == 0
    assert cli.main(["export", str(tmp_path / "lora"), "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_eval_reads_a_json_file(trained, tmp_path, capsys):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"checkpoint": str(trained / "out"), "split": "train", "max_rows": 5, "json": True}))
    assert cli.main(["eval", str(path)]) == 0
    from_json = capsys.readouterr().out
    assert cli.main(["eval", str(trained / "out"), "--split=train", "--max_rows", "5", "--json"]) == 0
    assert from_json == capsys.readouterr().out
    assert cli.main(["eval", "--config", str(path), "--max-rows", "4", "--run", str(trained / "merged_or_not")]) == 2
    assert "merged_or_not" in capsys.readouterr().err
    path.write_text(json.dumps({"checkpoint": "c", "max_row": 5}))
    assert cli.main(["eval", str(path)]) == 2
    assert "the closest is max_rows" in capsys.readouterr().err
    path.write_text("[1]")
    assert cli.main(["merge", str(path)]) == 2
    assert "expected an object" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--disable-tqdm"]])
def test_bars_go_to_stderr_and_can_be_switched_off(trained, flags, capsys):
    assert cli.main(["eval", str(trained / "out"), *flags]) == 0
    done = capsys.readouterr()
    assert done.out.count("\n") == 1
    assert ("batch/s" in done.err) == (flags == [])


def test_a_second_process_has_no_bar(trained, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["eval", str(trained / "out")]) == 0
    done = capsys.readouterr()
    assert (done.out, done.err) == ("", "")


@pytest.mark.parametrize("level", ["info", "error"])
def test_log_level(trained, tmp_path, level, caplog):
    assert cli.main(["merge", str(trained / "out"), "--out", str(tmp_path), "--log-level", level]) == 0
    assert (f"Saved the adaptation in {tmp_path}" in caplog.text) == (level == "info")
    assert cli.main(["eval", str(trained / "out")]) == 0
    assert logging.getLogger("adamix_kernels").level == logging.WARNING


def train_flags(trained, out, *more):
    flags = ["--model", str(trained / "encoder"), "--data", str(trained / "data"), "--out", str(out), "--use-cpu"]
    flags += ["--num-train-epochs", "3", "--pooling", "model"]
    return ["train", *flags, "--per-device-train-batch-size", "4", "--disable-tqdm", "true", *more]


def test_two_trainings_do_not_write_to_one_folder(trained, tmp_path, capsys):
    out = tmp_path / "out"
    with alone_in(str(out)):
        assert cli.main(train_flags(trained, out)) == 2
    assert f"out: got {str(out)!r}, to which another command is writing" in capsys.readouterr().err
    assert not out.exists()  # nothing was written to it, and the lock went with its context
    with alone_in(str(out)):
        pass


def test_train_resumes(trained, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(train_flags(trained, whole)) == 0  # three epochs of three steps
    assert cli.main(train_flags(trained, parts, "--resume")) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert cli.main(train_flags(trained, whole, "--resume", str(tmp_path / "nowhere"))) == 2
    assert "nowhere': no such folder" in capsys.readouterr().err
    shutil.copytree(whole / "checkpoint-6", parts / "checkpoint-6")
    assert cli.main(train_flags(trained, parts)) == 2
    assert "expected --resume, or another folder" in capsys.readouterr().err
    assert cli.main(train_flags(trained, parts, "--resume")) == 0
    ours, theirs = (json.loads((f / "checkpoint-9" / "trainer_state.json").read_text()) for f in (parts, whole))
    assert (ours["global_step"], theirs["global_step"]) == (9, 9)
    digests = [json.loads((f / "adamix_checkpoint.json").read_text())["tensors"]["sha256"] for f in (parts, whole)]
    assert digests[0] == digests[1]


@pytest.mark.nightly
def test_two_processes_show_one_bar_and_one_result(trained, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    flags = train_flags(trained, tmp_path / "out", "--max-steps", "2", "--log-level", "info")
    flags[flags.index("--disable-tqdm") + 1] = "false"
    flags.remove("--use-cpu")  # said by the launch itself, without a GPU
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CI": "true"}
    command = [*launch, "--main_process_port", "0", str(SCRIPT), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("dev accuracy") == 1
    # What is still open when Python ends can abort a rank, and the launcher then ends the others.
    assert done.stdout.count("process group closed") == 2
    assert done.stderr.count(" 0/2 [") == 1
    assert done.stderr.count("***** Running training *****") == 1
