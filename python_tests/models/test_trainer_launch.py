"""AdaMixTrainer under `accelerate launch` on two gloo processes: DDP, and FSDP2 with the base sharded too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from once import once
from tiny import tiny_gpt2
from tiny_training import parameters

from adamix_kernels import load_adamix

TIMEOUT = 300
ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "python_tests" / "support"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
COMMANDS = {
    "single": [sys.executable],
    "ddp": [*LAUNCH, "--multi_gpu"],
    "fsdp": [*LAUNCH, "--use_fsdp", "--fsdp_version", "2"],
}
SPLIT = [("ddp", n) for n in ("bert", "gpt2", "gpt2 checkpointed", "gpt2 accumulated")]
SPLIT += [("fsdp", n) for n in ("bert", "gpt2", "gpt2 checkpointed")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where every run wrote its results: single0.pt, ddp0.pt, ddp1.pt, fsdp0.pt, fsdp1.pt."""
    return once(tmp_path_factory, "launch", launch)


def launch(folder):
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT), str(SUPPORT)]))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = {}
    try:
        for mode, command in COMMANDS.items():
            with (folder / f"{mode}.log").open("w") as log:
                running[mode] = subprocess.Popen(
                    [*command, str(SUPPORT / "launched.py"), mode, str(folder)], env=env, stdout=log, stderr=log
                )
        for mode, process in running.items():
            assert process.wait(TIMEOUT) == 0, (folder / f"{mode}.log").read_text()[-4000:]
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


@pytest.fixture(scope="module")
def runs(folder):
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def test_every_process_wrote_its_results(runs):
    assert set(runs) == {"single0", "ddp0", "ddp1", "fsdp0", "fsdp1"}
    wrapped = {mode: runs[f"{mode}0"]["gpt2"]["wrapped"] for mode in COMMANDS}
    assert wrapped == {
        "single": "GPT2LMHeadModel", "ddp": "DistributedDataParallel", "fsdp": "FSDPGPT2LMHeadModel"
    }  # fmt: skip


@pytest.mark.parametrize(("mode", "name"), SPLIT)
def test_two_processes_have_the_loss_curve_of_one(runs, mode, name):
    split, whole = runs[f"{mode}0"][name], runs["single0"][name.split()[0]]
    assert len(split["log"]) == len(whole["log"]) == 4
    for mine, alone in zip(split["log"], whole["log"], strict=True):
        for part in ("cross_entropy", "consistency"):
            assert mine[part] == pytest.approx(alone[part], rel=1e-5)
        assert mine["loss"] == pytest.approx(alone["loss"], abs=2e-4)  # logged with four decimals
    assert (split["parameters"] - whole["parameters"]).norm() / whole["parameters"].norm() < 1e-6
    assert abs(whole["log"][0]["cross_entropy"] - whole["log"][-1]["cross_entropy"]) > 1e-2


def test_checkpointing_changes_nothing_in_one_process(runs):
    plain, checkpointed = runs["single0"]["gpt2"], runs["single0"]["gpt2 checkpointed"]
    torch.testing.assert_close(plain["parameters"], checkpointed["parameters"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "gpt2 accumulated", "drawn", "t5", "token"])
def test_parameters_stay_equal_across_ranks(runs, name):
    first, second = runs["ddp0"][name], runs["ddp1"][name]
    assert first["wrapped"] == "DistributedDataParallel"
    assert torch.equal(first["parameters"], second["parameters"])
    assert torch.isfinite(first["parameters"]).all()
    assert all(entry["loss"] > 0 and entry["consistency"] >= 0 for entry in first["log"])


def test_gates_on_two_processes_learn_as_on_one(runs):
    split, whole = runs["ddp0"]["gates"], runs["single0"]["gates"]
    assert (split["parameters"] - whole["parameters"]).norm() / whole["parameters"].norm() < 1e-6
    for mine, alone in zip(split["log"], whole["log"], strict=True):
        assert mine["z_loss"] == pytest.approx(alone["z_loss"], rel=1e-5)
    for name in ("gates", "balanced"):
        assert torch.equal(runs["ddp0"][name]["parameters"], runs["ddp1"][name]["parameters"])
    resumed = runs["ddp0"]["gates resumed"]
    assert torch.equal(resumed["parameters"], split["parameters"])
    assert [entry["z_loss"] for entry in resumed["log"]] == [entry["z_loss"] for entry in split["log"]]


def test_each_process_balances_its_own_tokens(runs):
    """M sum P^2 is convex: the mean of two processes' is above that of all their tokens."""
    split, whole = (runs[name]["balanced"]["log"][0]["balance_loss"] for name in ("ddp0", "single0"))
    assert whole < split < whole + 0.5
    assert split == runs["ddp1"]["balanced"]["log"][0]["balance_loss"]


def test_ranks_draw_different_experts(runs):
    first, second = runs["ddp0"]["indices"], runs["ddp1"]["indices"]
    assert len(first) == len(second) == 4 * 2
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert len({tuple(a) for a in first}) > 1


def test_logged_parts_are_means_over_ranks(runs):
    for entry in runs["ddp0"]["drawn"]["log"]:
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + entry["consistency"], abs=1e-4)
    assert runs["ddp0"]["drawn"]["log"][0]["consistency"] == runs["ddp1"]["drawn"]["log"][0]["consistency"]


def test_a_sharded_run_resumes_where_it_stopped(runs):
    saved, resumed = runs["fsdp0"]["saved"], runs["fsdp0"]["resumed"]
    assert torch.equal(saved["parameters"], resumed["parameters"])
    assert [e["cross_entropy"] for e in saved["log"]] == [e["cross_entropy"] for e in resumed["log"]]


def test_a_sharded_checkpoint_is_an_ordinary_one(runs, folder):
    checkpoint = folder / "fsdp" / "checkpoint-4"
    model = load_adamix(tiny_gpt2(), checkpoint)
    assert torch.equal(torch.cat([p.flatten() for p in parameters(model)]), runs["fsdp0"]["saved"]["parameters"])
    assert not [p for p in checkpoint.iterdir() if "model_fsdp" in p.name]
    assert '"class": "GPT2LMHeadModel"' in (checkpoint / "adamix_checkpoint.json").read_text()
