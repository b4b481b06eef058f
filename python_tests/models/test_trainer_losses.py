"""AdaMixTrainer's loss for every task, and its normalisation under gradient accumulation."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import batch_for, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tiny_training import (
    TASKS,
    adapted,
    dataset_for,
    ignoring,
    pad,
    parameters,
    pass_one_pass_two,
    ragged,
    rows_of,
    task_batch,
    trainer_for,
)

from adamix_kernels.models.objectives import Objective
from adamix_kernels.routing import Router


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


@pytest.mark.parametrize(
    ("task", "smoothing"),
    [*((t, 0.0) for t in ("classes", "regression", "multi label", "masked", "gpt2", "t5")), ("gpt2", 0.1), ("t5", 0.1)],
)
def test_accumulation_equals_one_large_batch(task, smoothing, tmp_path, monkeypatch):
    monkeypatch.setattr(Router, "draw", pass_one_pass_two)
    base = TASKS[task]()
    is_ragged = task in ("masked", "gpt2", "llama", "t5")
    data = ragged(base) if is_ragged else rows_of(task_batch(task, base))
    whole = pad(data) if is_ragged else task_batch(task, base)
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
        alone = float(trainer.compute_loss(model.train(), dict(whole)).detach())
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(alone, abs=1e-4)
        updates.append(torch.cat([p.detach().flatten() for p in parameters(model)]) - before)
        logs.append(trainer.state.log_history[0])
    large, accumulated = updates
    assert large.norm() > 1e-3
    assert abs(accumulated.norm() / large.norm() - 1) < 1e-5
    assert (accumulated - large).norm() / large.norm() < 1e-5
    assert logs[0]["consistency"] > 1e-4
    for name in ("loss", "cross_entropy", "consistency"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4, abs=1e-4)


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


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize(("task", "problem"), [("regression", "regression"), ("multi label", "multi_label_class")])
def test_label_smoothing_of_what_is_no_class_is_refused(task, problem, weight, tmp_path):
    model = adapted(TASKS[task](), consistency_weight=weight).train()
    trainer = trainer_for(model, tmp_path, label_smoothing_factor=0.3)
    with pytest.raises(ValueError, match=f"label_smoothing: got 0.3, expected 0 with problem_type '{problem}"):
        trainer.compute_loss(model, task_batch(task, model))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_labels_in_a_column_are_those_in_a_row(weight, tmp_path):
    model = adapted(tiny_bert(3), consistency_weight=weight).train()
    batch = batch_for(model, 4, 6)
    trainer = trainer_for(model, tmp_path)
    found = []
    for labels in (batch["labels"], batch["labels"].view(-1, 1)):
        torch.manual_seed(5)
        found.append(trainer.compute_loss(model, {**batch, "labels": labels}))
    assert torch.equal(*found)


def test_given_decoder_inputs_are_kept(tmp_path):
    model = adapted(tiny_t5()).train()
    batch = batch_for(model, 2, 6)
    given = torch.full_like(batch["labels"], 5)
    prepared = Objective(model).prepare({**batch, "decoder_input_ids": given}, batch["labels"])
    assert prepared["decoder_input_ids"] is given
    assert prepared["use_cache"] is False


@pytest.mark.parametrize("kind", ["Bart", "MBart", "Mvp"])
def test_an_encoder_decoder_that_transformers_calls_masked_too(kind, tmp_path):
    """Its decoder reads the labels, shifted, and not the inputs."""
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()}  # fmt: skip
    rates = {name: 0.0 for name in ("dropout", "attention_dropout", "activation_dropout")}
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, d_model=32, max_position_embeddings=40, **sizes)
    config.update(rates)
    model = adapted(
        getattr(transformers, f"{kind}ForConditionalGeneration")(config), num_experts=1, target_modules=["fc2"]
    )
    batch = batch_for(model, 4, 6)
    batch["labels"] = ignoring(batch)["labels"].flip(0)
    trainer = trainer_for(model, tmp_path)
    loss, outputs = trainer.compute_loss(model.train(), dict(batch), return_outputs=True)
    torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs.logits, model(**batch).logits)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_an_update_without_a_label_has_a_loss_of_zero(weight, tmp_path):
    model = adapted(tiny_gpt2(), consistency_weight=weight)
    rows = dataset_for(model)
    trainer = trainer_for(model, tmp_path, [{**row, "labels": torch.full((6,), -100)} for row in rows])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "learning_rate" in log]
    assert [(log["loss"], log["cross_entropy"], log["consistency"]) for log in logs] == [(0, 0, 0)] * 2


def test_a_kind_of_model_with_several_classes_has_a_loss(tmp_path):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8)
    config = transformers.DeiTConfig(**sizes, patch_size=4, hidden_dropout_prob=0.0, num_labels=3)
    model = adapted(transformers.DeiTForImageClassification(config), num_experts=1, target_modules="all-linear").train()
    batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    loss = trainer_for(model, tmp_path).compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, model(**batch).loss)
    with pytest.raises(NotImplementedError, match="DeiTForImageClassificationWithTeacher"):
        Objective(transformers.DeiTForImageClassificationWithTeacher(config))


def test_a_task_without_a_loss_is_named(tmp_path):
    model = adapted(tiny_bert(model_class=transformers.BertForQuestionAnswering))
    with pytest.raises(NotImplementedError, match="BertForQuestionAnswering"):
        trainer_for(model, tmp_path, dataset_for(tiny_bert())).train()
