"""The README's quick start runs as printed, and its plain PyTorch is what the op computes."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_quick_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick_start = BLOCKS[0]
    assert len([line for line in quick_start.splitlines() if line.strip()]) <= 11
    names = {}
    exec(compile(quick_start, "README.md", "exec"), names)
    assert names["model"].adamix.merged
    assert (tmp_path / "my_adapter" / "adamix_checkpoint.json").is_file()


def test_trainer_example(tmp_path):
    from tiny import batch_for, tiny_bert
    from transformers import TrainingArguments

    model = tiny_bert()
    batch = batch_for(model)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
    names = {"model": model, "args": args, "data": rows}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 2


def test_tour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(BLOCKS[2], "README.md", "exec"), names)
    assert torch.equal(names["served"], names["again"])
    torch.testing.assert_close(names["merged"], names["served"], rtol=1e-5, atol=1e-5)
    assert names["mixed"].shape == names["drawn"].shape == names["base"].shape == (2, 2)


@pytest.mark.parametrize("index", [torch.tensor([2, 0, 1, 1])])
def test_the_equivalent_pytorch(index):
    from adamix_kernels import routed_adapter

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
    exec(compile(BLOCKS[3], "README.md", "exec"), names)
    banks = (names[n] for n in ("Wd", "bd", "Wu", "bu"))
    torch.testing.assert_close(
        routed_adapter(names["x"], *banks, names["i"], names["j"], residual=names["x"]), names["out"]
    )
