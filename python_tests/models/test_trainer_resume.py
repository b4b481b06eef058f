"""AdaMixTrainer's checkpoints: contents, resume, best model, rotation."""

import copy
import json
import os

import pytest
import torch
import transformers
from tiny import batch_for, tiny_bert, tiny_gpt2, tiny_t5
from transformers import Trainer, TrainingArguments, set_seed

from adamix_kernels import AdaMixConfig, AdaMixTrainer, adapt, load_adamix
from adamix_kernels.models import trainer_checkpoints
from adamix_kernels.models.manifest import check_manifest, write_manifest

BASES = {"bert": lambda: tiny_bert(3, dropout=0.1), "gpt2": lambda: tiny_gpt2(dropout=0.1), "t5": tiny_t5}


def arguments(folder, **options):
    defaults = {
        "max_steps": 6,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def data_for(model, rows=10):
    batch = batch_for(model, rows, 6)
    return [{name: value[i] for name, value in batch.items()} for i in range(rows)]


def adapted(base, **options):
    set_seed(4)
    return adapt(base, AdaMixConfig(**{"bottleneck": 4, "num_experts": 3, **options}))


def trained_parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(trainer):
    names = ("loss", "cross_entropy", "consistency", "grad_norm")
    return {e["step"]: [e[n] for n in names] for e in trainer.state.log_history if "loss" in e}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [("bert", {}), ("bert", {"routing": "token"}), ("gpt2", {"method": "lora", "dropout": 0.2}), ("t5", {})],
)
def test_resuming_gives_the_uninterrupted_curve(name, options, accumulation, tmp_path):
    base = BASES[name]()
    settings = {"gradient_accumulation_steps": accumulation}
    whole = adapted(copy.deepcopy(base), **options)
    uninterrupted = AdaMixTrainer(whole, arguments(tmp_path, **settings), train_dataset=data_for(whole))
    uninterrupted.train()

    model = adapted(copy.deepcopy(base), **options)
    torch.manual_seed(99)
    resumed = AdaMixTrainer(model, arguments(tmp_path / "resumed", **settings), train_dataset=data_for(model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    wanted, got = losses(uninterrupted), losses(resumed)
    assert sorted(got) == sorted(wanted) == [1, 2, 3, 4, 5, 6]
    assert got == wanted
    for name, value in trained_parameters(whole).items():
        assert torch.equal(model.get_parameter(name), value), name


def test_a_checkpoint_holds_no_frozen_weights(tmp_path):
    model = adapted(tiny_bert(3))
    trainer = AdaMixTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=data_for(model))
    trainer.train()
    files = set(os.listdir(tmp_path / "checkpoint-2"))
    tensors = {f for f in files if f.startswith("adamix-") and f.endswith(".safetensors")}
    assert len(tensors) == 1
    assert files - tensors == {
        "adamix_checkpoint.json", "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt",
        "rng_state.pth", "adamix_files.json", "config.json", "model.safetensors.index.json", "README.md",
    }  # fmt: skip
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (tmp_path / "checkpoint-2" / tensors.pop()).stat().st_size
    assert size < 4 * trainable + 8192
    restored = load_adamix(tiny_bert(3), tmp_path / "checkpoint-2")
    for name, value in trained_parameters(model).items():
        assert torch.equal(restored.get_parameter(name), value), name


class Tokenizer:
    def save_pretrained(self, folder):
        with open(os.path.join(folder, "tokenizer.txt"), "w") as file:
            file.write("saved")


def test_the_tokenizer_is_saved_beside_it(tmp_path):
    model = adapted(tiny_bert(3))
    trainer = AdaMixTrainer(
        model, arguments(tmp_path), train_dataset=data_for(model), processing_class=Tokenizer(), data_collator=list
    )
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "tokenizer.txt").read_text() == "saved"
    assert (tmp_path / "final" / "adamix_checkpoint.json").is_file()


def test_best_model_and_rotation(tmp_path):
    model = adapted(tiny_bert(3))
    scores = iter([0.1, 0.9, 0.4, 0.3])
    kept = {}

    class Keeper(AdaMixTrainer):
        def _save_checkpoint(self, *args, **kwargs):
            kept[self.state.global_step] = trained_parameters(self.model)
            return super()._save_checkpoint(*args, **kwargs)

    trainer = Keeper(
        model,
        arguments(
            tmp_path,
            max_steps=4,
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="score",
        ),
        train_dataset=data_for(model),
        eval_dataset=data_for(model, 2),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert {f for f in os.listdir(tmp_path) if f.startswith("checkpoint")} == {"checkpoint-2", "checkpoint-4"}
    for name, value in kept[2].items():
        assert torch.equal(model.get_parameter(name), value), name
    assert any(not torch.equal(kept[4][n], kept[2][n]) for n in kept[2])


def test_a_foreign_checkpoint_is_refused_and_changes_nothing(tmp_path):
    model = adapted(tiny_bert(3))
    trainer = AdaMixTrainer(model, arguments(tmp_path), train_dataset=data_for(model))
    bare = tiny_bert(3)
    Trainer(bare, arguments(tmp_path, max_steps=1, save_steps=1), train_dataset=data_for(bare)).train()
    before = trained_parameters(model)
    with pytest.raises(ValueError, match=r"adamix_checkpoint\.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def trained(folder, **options):
    model = adapted(tiny_bert(3))
    trainer = AdaMixTrainer(model, arguments(folder, max_steps=4, **options), train_dataset=data_for(model))
    trainer.train()
    return trainer


def unfinished(folder):
    (folder / "adamix_files.json").unlink()


def flipped(folder):
    path = folder / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SPOILED = {
    "unfinished": (unfinished, r"checkpoint-4: got no adamix_files\.json"),
    "flipped": (flipped, r"checkpoint-4/optimizer\.pt: got SHA-256"),
    "absent": (lambda folder: (folder / "scheduler.pt").unlink(), r"scheduler\.pt: got no such file"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_an_unwhole_checkpoint_is_refused_or_passed_over(how, tmp_path, caplog):
    finished = trained_parameters(trained(tmp_path).model)
    spoil, message = SPOILED[how]
    spoil(tmp_path / "checkpoint-4")
    model = adapted(tiny_bert(3))
    trainer = AdaMixTrainer(model, arguments(tmp_path, max_steps=4), train_dataset=data_for(model))
    before = trained_parameters(model)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    trainer.train(resume_from_checkpoint=True)
    assert "is passed over" in caplog.text
    assert all(torch.equal(model.get_parameter(name), value) for name, value in finished.items())
    assert check_manifest(tmp_path / "checkpoint-4") is None  # it was written anew


def test_resuming_where_nothing_is_whole_says_so(tmp_path):
    trainer = trained(tmp_path, save_steps=4)
    unfinished(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="holds no checkpoint to go on from that is whole"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_version_1_has_no_list_of_files(tmp_path):
    trained(tmp_path)
    path = tmp_path / "checkpoint-4" / "adamix_checkpoint.json"
    unfinished(path.parent)
    header = json.loads(path.read_text())
    del header["sha256"]
    path.write_text(json.dumps({**header, "version": 1}))
    assert check_manifest(path.parent) is None


def test_older_checkpoints_go_only_when_the_new_one_is_whole(tmp_path, monkeypatch, recwarn):
    whole = []

    def observed(folder):
        whole.append(sorted(f for f in os.listdir(tmp_path) if f.startswith("checkpoint")))
        write_manifest(folder)

    monkeypatch.setattr(trainer_checkpoints, "write_manifest", observed)
    said = []  # quick epochs are no fault of the file system's
    if hasattr(transformers.trainer_utils, "logger"):  # transformers 5; 4 warns
        monkeypatch.setattr(transformers.trainer_utils.logger, "warning_once", said.append, raising=False)
    trained(tmp_path, save_steps=1, save_total_limit=1)
    assert said == []
    assert not [w for w in recwarn if "mtime" in str(w.message)]
    assert whole == [["checkpoint-1"]] + [[f"checkpoint-{n}", f"checkpoint-{n + 1}"] for n in (1, 2, 3)]
    assert [f for f in os.listdir(tmp_path) if f.startswith("checkpoint")] == ["checkpoint-4"]


def test_the_best_checkpoint_of_a_run_that_was_moved_is_kept_and_taken(tmp_path, caplog):
    trainer = trained(tmp_path, save_steps=2)
    last = trained_parameters(trainer.model)
    trainer.state.best_model_checkpoint = "where/it/was/checkpoint-2"
    trainer.args.save_total_limit = 1
    trainer._delete_old_checkpoints(str(tmp_path))
    assert {"checkpoint-2", "checkpoint-4"} <= set(os.listdir(tmp_path))  # the best, and the last to go on from
    trainer._load_best_model()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = trained_parameters(load_adamix(tiny_bert(3), tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, best[name]) for name, value in trained_parameters(trainer.model).items())
    assert any(not torch.equal(value, last[name]) for name, value in best.items())
    trainer.state.best_model_checkpoint = "where/it/was/checkpoint-3"
    trainer._load_best_model()
    assert "checkpoint-3, the best checkpoint, is not there any more: the last weights are kept" in caplog.text


def test_what_is_pushed_in_training_is_a_whole_checkpoint(tmp_path, monkeypatch):
    """transformers pushes its output folder, into which it copies the files that it knows."""
    pushed = []

    def push(trainer, folder):
        pushed.append(load_adamix(tiny_bert(3, dropout=0.1), tmp_path))
        for name, value in trained_parameters(trainer.model).items():
            assert torch.equal(pushed[-1].get_parameter(name), value)
        assert sum(name.startswith("adamix-") for name in os.listdir(tmp_path)) == 1
        assert json.loads((tmp_path / "adamix_checkpoint.json").read_text())["base_model"]["folder"] is None

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    model = adapted(tiny_bert(3, dropout=0.1))
    trainer = AdaMixTrainer(model, arguments(tmp_path, max_steps=4), train_dataset=data_for(model))
    trainer.args.push_to_hub = True  # afterwards: the constructor asks the Hub
    trainer.train()
    assert len(pushed) == 2
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    os.remove(tmp_path / "adamix_checkpoint.json")
    with pytest.raises(ValueError, match="expected a folder written by save_adamix"):
        trainer._push_from_checkpoint(str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_a_finished_training_takes_no_further_step(accumulation, tmp_path):
    """4 steps end within an epoch of 5 (or of 3): the base trainer would go on to a fifth."""
    finished = trained(tmp_path, gradient_accumulation_steps=accumulation)
    again = AdaMixTrainer(
        adapted(tiny_bert(3)),
        arguments(tmp_path, max_steps=4, gradient_accumulation_steps=accumulation),
        train_dataset=data_for(finished.model),
    )
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    wanted = trained_parameters(finished.model)
    assert all(torch.equal(again.model.get_parameter(name), value) for name, value in wanted.items())
