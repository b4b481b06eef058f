"""AdaMixTrainer: logs, evaluation, precision, Seq2SeqTrainer, refusals."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import batch_for, tiny_bert, tiny_gpt2, tiny_t5
from tiny_training import TASKS, adapted, arguments, dataset_for, pad, parameters, ragged, trainer_for
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from adamix_kernels import AdaMixTrainer, AdaMixTrainerMixin, merge


@pytest.mark.parametrize("steps", [1, 2])
def test_parts_of_the_loss_are_logged(steps, tmp_path):
    model = adapted(tiny_bert(3), consistency_weight=2.0)
    trainer = trainer_for(model, tmp_path, gradient_accumulation_steps=steps, max_steps=4, logging_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry["consistency"] > 0
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 2 * entry["consistency"], abs=1e-4)
    assert logs[0]["cross_entropy"] != logs[1]["cross_entropy"]


def test_weight_zero_is_one_plain_pass(tmp_path):
    model = adapted(tiny_bert(3), consistency_weight=0.0, num_experts=1)
    rows = []
    model.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    stock = Trainer(copy.deepcopy(model), arguments(tmp_path), train_dataset=dataset_for(model))
    trainer = trainer_for(model, tmp_path)
    trainer.train()
    stock.train()
    assert set(rows) == {2}
    assert model.adamix.router.passes == 1
    mine, theirs = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, stock))
    assert mine == pytest.approx(theirs, abs=1e-4)
    assert trainer.state.log_history[0]["consistency"] == 0.0


def test_outputs_are_those_of_pass_one(tmp_path):
    model = adapted(tiny_bert(3)).train()
    batch = batch_for(model, 4, 6)
    trainer = trainer_for(model, tmp_path)
    torch.manual_seed(5)
    _, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    torch.manual_seed(5)
    logits = model(**{k: torch.cat([v, v]) for k, v in batch.items() if k != "labels"}).logits
    assert torch.equal(outputs.logits, logits[:4])
    assert not torch.equal(logits[:4], logits[4:])


def test_evaluation_is_merged_and_never_stale(tmp_path):
    model = adapted(tiny_bert(3))
    data = dataset_for(model, 4)
    trainer = trainer_for(model, tmp_path, data, eval_dataset=data, per_device_eval_batch_size=4)

    def merged_loss():
        plain = merge(copy.deepcopy(model)).eval()
        with torch.no_grad():
            return float(plain(**batch_for(model, 4, 6)).loss)

    first = trainer.evaluate()["eval_loss"]
    assert first == pytest.approx(merged_loss(), abs=1e-6)
    assert trainer.evaluate()["eval_loss"] == first
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.adapter.down_weight[1].mul_(-3)
    second = trainer.evaluate()["eval_loss"]
    assert abs(second - first) > 1e-5
    assert second == pytest.approx(merged_loss(), abs=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(merged_loss(), abs=1e-6)


def test_evaluation_during_training_is_the_stock_one(tmp_path):
    model = adapted(tiny_gpt2())
    data = ragged(model)
    options = {"data_collator": pad, "eval_dataset": data, "per_device_eval_batch_size": 8}
    trainer = trainer_for(model, tmp_path, data, eval_strategy="steps", eval_steps=1, **options)
    trainer.train()
    stock = trainer_for(model, tmp_path, data, cls=Trainer, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-6)
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 3


@pytest.mark.parametrize("task", ["classes", "gpt2"])
def test_bfloat16_autocast(task, tmp_path, monkeypatch):
    # TrainingArguments of 4.57 leave their precision in the environment of the next test.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    model = adapted(TASKS[task]())
    trainer = trainer_for(model, tmp_path, bf16=True)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert {p.dtype for p in parameters(model)} == {torch.float32}
    assert trainer.state.log_history[0]["loss"] > 0


def test_mixin_over_seq2seq_trainer(tmp_path):
    class Seq2SeqAdaMixTrainer(AdaMixTrainerMixin, Seq2SeqTrainer):
        pass

    model = adapted(tiny_t5())
    data = ragged(model)
    args = arguments(
        tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=5, eval_strategy="steps",
        eval_steps=2,
    )  # fmt: skip
    trainer = Seq2SeqAdaMixTrainer(model, args, train_dataset=data, eval_dataset=data[:4], data_collator=pad)
    trainer.train()
    history = trainer.state.log_history
    assert all("consistency" in entry for entry in history if "loss" in entry)
    assert any("eval_loss" in entry for entry in history)
    one, two = (trainer.predict(data[:4]).predictions for _ in range(2))
    assert (one == two).all()


def test_training_flops_count_both_passes(tmp_path):
    model = adapted(tiny_bert(3))
    batch = batch_for(model, 2, 6)
    stock = Trainer(model, arguments(tmp_path), train_dataset=[])
    assert trainer_for(model, tmp_path).floating_point_ops(batch) == 2 * stock.floating_point_ops(batch)


def test_refusals(tmp_path):
    bare = tiny_bert(3)
    with pytest.raises(ValueError, match="without AdaMix"):
        trainer_for(bare, tmp_path)
    with pytest.raises(ValueError, match="merged"):
        trainer_for(merge(adapted(bare)), tmp_path)
    model = adapted(bare)
    with pytest.raises(ValueError, match="compute_loss_func"):
        AdaMixTrainer(model, arguments(tmp_path), compute_loss_func=lambda *a, **k: 0)
    with pytest.raises(ValueError, match="labels"):
        trainer_for(model, tmp_path).compute_loss(model.train(), {"input_ids": torch.ones(2, 3, dtype=torch.long)})
    two_gpus = trainer_for(model, tmp_path)
    two_gpus.args._n_gpu = 2
    with pytest.raises(ValueError, match="n_gpu: got 2"):
        two_gpus.train()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"bert\.embeddings\.word_embeddings\.weight"):
        trainer_for(model, tmp_path, save_strategy="steps")
    trainer_for(model, tmp_path, save_strategy="no")


@pytest.mark.parametrize(
    ("plugin", "error", "message"),
    [
        ({"fsdp_version": 1}, NotImplementedError, "FSDP version 1, expected 2"),
        ({"fsdp_version": 2, "activation_checkpointing": True}, ValueError, "use args.gradient_checkpointing"),
        ({"fsdp_version": 2, "activation_checkpointing": False}, None, ""),
    ],
)
def test_fsdp_is_version_2_without_its_own_checkpointing(plugin, error, message, tmp_path, monkeypatch):
    trainer = trainer_for(adapted(tiny_bert(3)), tmp_path)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", SimpleNamespace(**plugin), raising=False)
    if error is None:
        trainer._check_trainable()
        return
    with pytest.raises(error, match=message):
        trainer.train()


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    trainer = trainer_for(adapted(tiny_bert(3)), tmp_path)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(NotImplementedError, match="DeepSpeed"):
        trainer.train()


def test_fsdp_that_accelerate_leaves_out_is_told(tmp_path, monkeypatch, caplog):
    trainer = trainer_for(adapted(tiny_bert(3)), tmp_path)
    monkeypatch.setattr(trainer.args, "fsdp", True)
    trainer.train()
    assert "accelerate shards on accelerators only" in caplog.text
