"""AdaMixTrainer on two gloo processes with stock DDP."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

TIMEOUT = 300

COMMON = """
import copy, os, sys
import torch
from tiny import batch_for, tiny_bert, tiny_gpt2, tiny_t5
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments, set_seed
from adamix_kernels import AdaMixConfig, AdaMixTrainer, AdaMixTrainerMixin, adapt
from adamix_kernels.routing import Router

torch.set_num_threads(1)
OPTIONS = dict(use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
               learning_rate=0.1, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant")

def adapted(base, **options):
    set_seed(4)
    model = adapt(base, AdaMixConfig(**{"bottleneck": 4, "num_experts": 4, **options}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model

def ragged():
    generator = torch.Generator().manual_seed(11)
    rows = [torch.randint(3, 64, (n,), generator=generator).tolist() for n in [3, 9, 5, 7, 4, 8, 6, 10]]
    return [{"input_ids": r, "attention_mask": [1] * len(r), "labels": r} for r in rows]

def pad(rows):
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    width = max(len(r["input_ids"]) for r in rows)
    return {k: torch.tensor([r[k] + [v] * (width - len(r[k])) for r in rows]) for k, v in fill.items()}

def rows_of(batch):
    return [{k: v[i] for k, v in batch.items()} for i in range(len(batch["input_ids"]))]

def train(model, data, cls=AdaMixTrainer, args=TrainingArguments, collator=None, **options):
    settings = {**OPTIONS, **options}
    trainer = cls(model, args(sys.argv[1], **settings), train_dataset=data, data_collator=collator)
    trainer.train()
    parameters = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return {"parameters": parameters, "log": trainer.state.log_history, "wrapped": type(trainer.model_wrapped).__name__}

def pass_one_pass_two(self, num_experts, batch, tokens, device, training):
    return None if num_experts == 1 else (torch.arange(batch) >= batch // 2).long()

def exact(size, steps, **options):
    '''One update of all eight ragged rows, with routing that does not depend on how they are split.'''
    draw, Router.draw = Router.draw, pass_one_pass_two
    result = train(adapted(tiny_gpt2()), ragged(), collator=pad, max_steps=1, per_device_train_batch_size=size,
                   gradient_accumulation_steps=steps, **options)
    Router.draw = draw
    return result
"""

SCRIPT = """
class Seq2Seq(AdaMixTrainerMixin, Seq2SeqTrainer):
    pass

drawn, draw = [], Router.draw
def spy(self, *args):
    index = draw(self, *args)
    if index is not None:
        drawn.append(index.tolist())
    return index

ddp = dict(ddp_backend="gloo", ddp_find_unused_parameters=False, per_device_train_batch_size=2)
bert = tiny_bert(3)
Router.draw = spy
results = {"bert": train(adapted(bert), rows_of(batch_for(bert, 16, 6)), max_steps=3, **ddp), "drawn": drawn}
Router.draw = draw
results["t5"] = train(adapted(tiny_t5()), ragged(), Seq2Seq, Seq2SeqTrainingArguments, pad, max_steps=2, **ddp)
results["checkpointed"] = train(
    adapted(tiny_gpt2(), method="lora", dropout=0.1, routing="token"), ragged(), collator=pad, max_steps=2,
    gradient_accumulation_steps=2, gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False}, **ddp)
del ddp["per_device_train_batch_size"]
results["exact"] = exact(2, 2, **ddp)
torch.save(results, os.path.join(sys.argv[1], f"rank{os.environ['RANK']}.pt"))
torch.distributed.destroy_process_group()
"""

SINGLE = """
torch.save(exact(8, 1), os.path.join(sys.argv[1], "single.pt"))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(rank 0, rank 1, one process alone): what each wrote."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "ddp.py").write_text(textwrap.dedent(COMMON + SCRIPT))
    (folder / "single.py").write_text(textwrap.dedent(COMMON + SINGLE))
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(here.parent), str(here)])
    plain = {**os.environ, "PYTHONPATH": path.lstrip(os.pathsep), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    jobs = [("ddp.py", {**world, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)] + [("single.py", {})]
    running = []
    for i, (script, env) in enumerate(jobs):
        log = (folder / f"log{i}.txt").open("w")
        command = [sys.executable, str(folder / script), str(folder)]
        running.append(subprocess.Popen(command, env={**plain, **env}, stdout=log, stderr=subprocess.STDOUT))
    try:
        for i, process in enumerate(running):
            assert process.wait(TIMEOUT) == 0, (folder / f"log{i}.txt").read_text()[-4000:]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [torch.load(folder / name, weights_only=True) for name in ("rank0.pt", "rank1.pt", "single.pt")]


@pytest.mark.parametrize("name", ["bert", "t5", "checkpointed", "exact"])
def test_parameters_stay_equal_across_ranks(runs, name):
    first, second = runs[0][name], runs[1][name]
    assert first["wrapped"] == "DistributedDataParallel"
    assert torch.equal(first["parameters"], second["parameters"])
    assert torch.isfinite(first["parameters"]).all()
    assert all(entry["loss"] > 0 and entry["consistency"] >= 0 for entry in first["log"] if "loss" in entry)


def test_ranks_draw_different_experts(runs):
    first, second = runs[0]["drawn"], runs[1]["drawn"]
    assert len(first) == len(second) == 3 * 2
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert len({tuple(a) for a in first}) > 1


def test_logged_parts_are_means_over_ranks(runs):
    for entry in (e for e in runs[0]["bert"]["log"] if "loss" in e):
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + entry["consistency"], abs=1e-4)
    assert runs[0]["bert"]["log"][0]["consistency"] == runs[1]["bert"]["log"][0]["consistency"]


def test_two_ranks_make_the_update_of_one_process(runs):
    split, whole = runs[0]["exact"], runs[2]
    assert whole["wrapped"] == "GPT2LMHeadModel"
    assert (split["parameters"] - whole["parameters"]).norm() / whole["parameters"].norm() < 1e-6
    for name in ("loss", "cross_entropy", "consistency"):
        assert split["log"][0][name] == pytest.approx(whole["log"][0][name], abs=1e-4)
