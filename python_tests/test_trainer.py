"""AdaMixTrainer: losses by task, accumulation, logs, evaluation, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import batch_for, tiny_bert, tiny_gpt2, tiny_gpt2_classifier, tiny_llama, tiny_t5
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from adamix_kernels import AdaMixConfig, adapt, merge
from adamix_kernels.models.objectives import Objective
from adamix_kernels.models.trainer import AdaMixTrainer, AdaMixTrainerMixin
from adamix_kernels.routing import Router


def arguments(folder, cls=TrainingArguments, **options):
    defaults = {
        "max_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
    }
    return cls(str(folder), **{**defaults, **options})


def rows_of(batch):
    return [{name: value[i] for name, value in batch.items()} for i in range(len(batch["input_ids"]))]


def dataset_for(model, rows=8, tokens=6, seed=0):
    return rows_of(batch_for(model, rows, tokens, seed))


def adapted(model, **options):
    """A copy whose experts differ and whose up side is not zero."""
    model = adapt(copy.deepcopy(model), AdaMixConfig(**{"bottleneck": 4, "num_experts": 3, **options}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def multi_label(model):
    batch = batch_for(model, 8, 6)
    batch["labels"] = torch.randint(2, (8, model.config.num_labels)).float()
    return batch


def ignoring(batch, seed=3):
    generator = torch.Generator().manual_seed(seed)
    drop = torch.rand(batch["labels"].shape, generator=generator) < 0.4
    drop[:, -1] = False
    return {**batch, "labels": batch["labels"].masked_fill(drop, -100)}


def trainer_for(model, folder, data=None, cls=AdaMixTrainer, **options):
    collator = options.pop("data_collator", None)
    more = {"eval_dataset": options.pop("eval_dataset")} if "eval_dataset" in options else {}
    return cls(
        model, arguments(folder, **options), train_dataset=data or dataset_for(model), data_collator=collator, **more
    )


TASKS = {
    "classes": lambda: tiny_bert(3),
    "decoder classes": lambda: tiny_gpt2_classifier(3),
    "regression": lambda: tiny_bert(1),
    "multi label": lambda: tiny_bert(3, problem_type="multi_label_classification"),
    "tokens": lambda: tiny_bert(5, model_class=transformers.BertForTokenClassification),
    "masked": lambda: tiny_bert(model_class=transformers.BertForMaskedLM),
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "t5": tiny_t5,
}


def task_batch(task, model):
    if task == "multi label":
        return multi_label(model)
    batch = batch_for(model, 8, 6)
    return ignoring(batch) if batch["labels"].dim() == 2 else batch


def mean_kl(a, b):
    """1/2 [KL(sg(b)||a) + KL(sg(a)||b)] of rows of logits, mean over rows, from torch's own pieces."""
    a, b = (x.double().log_softmax(-1) for x in (a, b))
    both = (F.kl_div(x, y.detach(), log_target=True, reduction="sum") for x, y in ((a, b), (b, a)))
    return sum(both) / (2 * a[..., 0].numel())


def expected_losses(task, first, second, labels):
    """(cross-entropy, consistency) of two passes' logits, transcribed anew."""
    if task == "regression":
        a, b = first.squeeze(-1), second.squeeze(-1)
        return F.mse_loss(a, labels), ((a - b.detach()) ** 2 + (b - a.detach()) ** 2).mean() / 4
    if task == "multi label":
        both = [torch.stack([x.sigmoid(), 1 - x.sigmoid()], -1).log() for x in (first, second)]
        return F.binary_cross_entropy_with_logits(first, labels), mean_kl(*both) * labels.shape[1]
    if task in ("gpt2", "llama"):
        first, second, labels = first[:, :-1], second[:, :-1], labels[:, 1:]
    kept = labels != -100
    return F.cross_entropy(first[kept], labels[kept]), mean_kl(first[kept], second[kept])


@pytest.mark.parametrize("task", TASKS)
def test_loss_and_gradients_of_every_task(task, tmp_path):
    model = adapted(TASKS[task](), consistency_weight=0.7)
    batch = task_batch(task, model)
    trainer = trainer_for(model.train(), tmp_path, rows_of(batch))
    torch.manual_seed(5)
    loss = trainer.compute_loss(model, dict(batch))
    assert batch["labels"].shape[0] == 8

    inputs = {name: torch.cat([value, value]) for name, value in batch.items()}
    labels = inputs.pop("labels")
    if task == "t5":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    torch.manual_seed(5)
    logits = model(**inputs).logits
    cross_entropy, consistency = expected_losses(task, *logits.chunk(2), labels[:8])
    expected = cross_entropy + 0.7 * consistency
    assert consistency > 1e-4
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(loss, model), gradients(expected, model), rtol=1e-4, atol=1e-6)


def gradients(loss, model):
    return torch.autograd.grad(loss, parameters(model))


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("head_too", [False, True])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_head_without_logits_gives_the_same_gradients(build, head_too, tmp_path):
    base = build(tie_word_embeddings=False) if head_too else build()
    model = adapted(base, modules_to_save=["lm_head"] if head_too else None).train()
    batch = ignoring(batch_for(model, 4, 6))
    trainer = trainer_for(model, tmp_path, label_smoothing_factor=0.1)
    results = []
    for return_outputs in (False, True):
        torch.manual_seed(5)
        with count_logits(model) as shapes:
            loss = trainer.compute_loss(model, dict(batch), return_outputs=return_outputs)
        loss, outputs = loss if return_outputs else (loss, None)
        results.append((loss.detach(), gradients(loss, model)))
        assert shapes == [(8, 6 if return_outputs else 1)]
    assert outputs.logits.shape == (4, 6, 64)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


class count_logits:
    """The leading shape of what the language-model head made."""

    def __init__(self, model):
        self.head = model.get_output_embeddings()

    def __enter__(self):
        self.shapes = []
        self.hook = self.head.register_forward_hook(lambda m, a, out: self.shapes.append(tuple(out.shape[:2])))
        return self.shapes

    def __exit__(self, *_):
        self.hook.remove()


def pass_one_pass_two(self, num_experts, batch, tokens, device, training):
    """Expert 0 for pass 1, expert 1 for pass 2, whatever the batch size."""
    return None if num_experts == 1 else (torch.arange(batch, device=device) >= batch // 2).long()


def ragged(model, rows=8):
    generator = torch.Generator().manual_seed(11)
    data = []
    for length in [3, 9, 5, 7, 4, 8, 6, 10][:rows]:
        ids = torch.randint(3, 64, (length,), generator=generator)
        data.append({"input_ids": ids.tolist(), "attention_mask": [1] * length, "labels": ids.tolist()})
    return data


def pad(rows):
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    width = max(len(r["input_ids"]) for r in rows)
    return {k: torch.tensor([r[k] + [v] * (width - len(r[k])) for r in rows]) for k, v in fill.items()}


@pytest.mark.parametrize(
    ("task", "smoothing"),
    [*((t, 0.0) for t in ("classes", "regression", "multi label", "masked", "gpt2", "t5")), ("gpt2", 0.1), ("t5", 0.1)],
)
def test_accumulation_equals_one_large_batch(task, smoothing, tmp_path, monkeypatch):
    monkeypatch.setattr(Router, "draw", pass_one_pass_two)
    base = TASKS[task]()
    is_ragged = task in ("masked", "gpt2", "llama", "t5")
    data = ragged(base) if is_ragged else rows_of(task_batch(task, base))
    updates, logs = [], []
    for size, steps in ((8, 1), (2, 4)):
        model = adapted(base)
        before = torch.cat([p.detach().flatten().clone() for p in parameters(model)])
        trainer = trainer_for(
            model,
            tmp_path,
            data,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            weight_decay=0.0,
            label_smoothing_factor=smoothing,
            data_collator=pad if is_ragged else None,
        )
        trainer.train()
        updates.append(torch.cat([p.detach().flatten() for p in parameters(model)]) - before)
        logs.append(trainer.state.log_history[0])
    large, accumulated = updates
    assert large.norm() > 1e-3
    assert abs(accumulated.norm() / large.norm() - 1) < 1e-5
    assert (accumulated - large).norm() / large.norm() < 1e-5
    assert logs[0]["consistency"] > 1e-4
    for name in ("loss", "cross_entropy", "consistency"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4, abs=1e-4)


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


@pytest.mark.parametrize("task", ["regression", "multi label", "gpt2", "t5"])
def test_one_pass_by_choice(task, tmp_path):
    model = adapted(TASKS[task](), num_experts=1)
    model.adamix.router.passes = 1
    batch = task_batch(task, model)
    trainer = trainer_for(model, tmp_path)
    loss, outputs = trainer.compute_loss(model.train(), dict(batch), return_outputs=True)
    expected = model(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert outputs.logits.shape[0] == 8


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


def test_label_smoothing_of_the_first_pass_alone(tmp_path):
    model = adapted(tiny_bert(3)).train()
    batch = batch_for(model, 4, 6)
    trainer = trainer_for(model, tmp_path, label_smoothing_factor=0.2)
    torch.manual_seed(5)
    loss = trainer.compute_loss(model, dict(batch))
    torch.manual_seed(5)
    first, second = model(**{k: torch.cat([v, v]) for k, v in batch.items() if k != "labels"}).logits.chunk(2)
    smoothed = F.cross_entropy(first, batch["labels"], label_smoothing=0.2)
    torch.testing.assert_close(loss, (smoothed + mean_kl(first, second)).float(), rtol=1e-5, atol=1e-6)


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
def test_bfloat16_autocast(task, tmp_path):
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


def test_given_decoder_inputs_are_kept(tmp_path):
    model = adapted(tiny_t5()).train()
    batch = batch_for(model, 2, 6)
    given = torch.full_like(batch["labels"], 5)
    prepared = Objective(model).prepare({**batch, "decoder_input_ids": given}, batch["labels"])
    assert prepared["decoder_input_ids"] is given
    assert prepared["use_cache"] is False


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


def test_a_task_without_a_loss_is_named(tmp_path):
    model = adapted(tiny_bert(model_class=transformers.BertForQuestionAnswering))
    with pytest.raises(NotImplementedError, match="BertForQuestionAnswering"):
        trainer_for(model, tmp_path, dataset_for(tiny_bert())).train()
