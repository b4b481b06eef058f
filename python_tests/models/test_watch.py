"""One warning where an adapted model trains without its second pass, and none where it has one."""

import contextlib
import copy
import logging

import pytest
import tiny
import tiny_training
import torch
from transformers import Trainer, TrainerCallback

from adamix_kernels import (
    AdaMixConfig,
    AdaMixLoss,
    AdaMixTrainer,
    adamix_loss,
    adapt,
    consistency_loss,
    disable,
    double_batch,
    learn_merging,
    use_experts,
)
from adamix_kernels.models.doubling import split_passes
from adamix_kernels.models.state import adamix_state
from adamix_kernels.models.watch import warn_of_standstill

WARNING = "trains without AdaMix's second pass"


@pytest.fixture
def warned(caplog):
    """How many such warnings there have been."""
    caplog.set_level(logging.WARNING)
    return lambda: sum(WARNING in record.getMessage() for record in caplog.records)


def adapted(build=tiny.tiny_bert, **options):
    return adapt(build(), AdaMixConfig(**{"bottleneck": 4, "num_experts": 2, **options})).train()


def step(model, loss, zero=True):
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.01)
    if zero:
        model.zero_grad()


def arguments(folder, **options):
    return tiny_training.arguments(folder, max_steps=4, per_device_train_batch_size=4, **options)


def rows(model):
    return tiny_training.dataset_for(model, 16)


class _Forwards(TrainerCallback):
    def __init__(self, seen):
        self.seen, self.at = seen, []

    def on_step_end(self, args, state, control, **kwargs):
        self.at.append(self.seen())


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_a_bare_loop_is_told_at_its_second_step_and_once(method, warned):
    model = adapted(method=method)
    batch = tiny.batch_for(model)
    for n in range(6):
        step(model, model(**batch).loss, zero=n != 1)
        assert warned() == (n > 0)
    copied = copy.deepcopy(model)
    for _ in range(3):
        step(copied, copied(**batch).loss)
    assert warned() == 1  # told already


def test_the_warning_says_what_to_use(caplog):
    model = adapted(consistency_weight=3.0)
    batch = tiny.batch_for(model)
    for _ in range(2):
        step(model, model(**batch).loss)
    text = next(r.getMessage() for r in caplog.records if WARNING in r.getMessage())
    for part in ("BertForSequence", "is 3", "AdaMixTrainer", "double_batch and adamix_loss", "consistency_weight=0"):
        assert part in text


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_stock_trainer_is_told_once(accumulation, tmp_path, warned):
    model = adapted()
    steps = _Forwards(warned)
    options = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    Trainer(model=model, args=options, train_dataset=rows(model), callbacks=[steps]).train()
    assert steps.at == ([0, 1, 1, 1] if accumulation == 1 else [1, 1, 1, 1])


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}], ids=lambda o: str(list(o))
)
def test_the_adamix_trainer_is_not(options, tmp_path, warned):
    model = adapted()
    assert model.adamix.watch is not None
    AdaMixTrainer(model=model, args=arguments(tmp_path, **options), train_dataset=rows(model)).train()
    assert model.adamix.watch is None  # it looked, and is sure
    assert warned() == 0


def test_processes_that_train_for_themselves_are_told(tmp_path, caplog, monkeypatch):
    """accelerate joins them without a GPU only where CPUs are asked for."""
    model = adapted()
    trainer = AdaMixTrainer(model=model, args=arguments(tmp_path), train_dataset=rows(model))
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer.train()
    assert sum("one of 2 launched processes" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_one_pass_by_choice(weight, tmp_path, warned):
    model = adapted(consistency_weight=weight)
    model.adamix.router.passes = 1
    Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(model)).train()
    assert warned() == 0


def _doubled(model, batch):
    labels = batch.pop("labels")
    return adamix_loss(model(**double_batch(batch)).logits, labels).loss


def _own_loss(model, batch):
    rows = len(batch.pop("labels"))
    a, b = split_passes(model(**double_batch(batch)).logits, rows)
    return (a - b).square().sum()


def _own_doubling(model, batch):
    labels = batch.pop("labels")
    return AdaMixLoss()(model(**{k: torch.cat([v, v]) for k, v in batch.items()}).logits, labels).loss


def _two_forwards(model, batch):
    a, b = model(**batch), model(**batch)
    return a.loss + consistency_loss(a.logits, b.logits)


@pytest.mark.parametrize("loss", [_doubled, _own_loss, _own_doubling, _two_forwards])
def test_loops_that_look_at_both_passes(loss, warned):
    model = adapted()
    for _ in range(6):
        step(model, loss(model, tiny.batch_for(model)))
    assert warned() == 0


@pytest.mark.parametrize("context", ["learn_merging", "use_experts", "disable", "no_grad", "eval"])
def test_nothing_is_said_where_no_experts_are_drawn(context, warned):
    model = adapted()
    if context == "learn_merging":
        learn_merging(model)
    if context == "eval":
        model.eval()
    contexts = {"use_experts": lambda: use_experts(model, 1), "disable": lambda: disable(model)}
    batch = tiny.batch_for(model)
    for _ in range(6):
        with contexts.get(context, contextlib.nullcontext)():
            if context == "no_grad":
                with torch.no_grad():
                    model(**batch)
            else:
                step(model, model(**batch).loss)
    assert warned() == 0
    learn_merging(model, False)
    model.train()
    for _ in range(3):
        step(model, model(**batch).loss)
    assert warned() == 1


class _Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.first(x)


@pytest.mark.parametrize("compiled", ["model", "loss", "step"])
def test_under_torch_compile_nothing_breaks_and_nothing_is_said(compiled, warned):
    from adamix_kernels.ops import _passes

    torch.compiler.reset()
    config = AdaMixConfig(bottleneck=2, num_experts=2, target_modules=["first"], modules_to_save=[])
    model = adapt(_Small(), config).train()
    x, y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])

    def look(logits, labels):
        return adamix_loss(logits, labels).loss

    def whole(x, y):
        return look(model(double_batch(x)), y)

    options = dict(fullgraph=True, backend="aot_eager")
    network = torch.compile(model, **options) if compiled == "model" else model
    loss = torch.compile(look, **options) if compiled == "loss" else look
    both = torch.compile(whole, **options)
    for _ in range(5):
        step(model, both(x, y) if compiled == "step" else loss(network(torch.cat([x, x])), y))
    assert warned() == 0
    assert _passes.LOOKS.compiled == (compiled != "model")


@pytest.mark.parametrize("weight", [100.0, 9.0])
def test_a_large_weight_on_a_base_with_dropout(weight, tmp_path, caplog):
    model = adapted(lambda: tiny.tiny_gpt2(dropout=0.1), consistency_weight=weight)
    for _ in range(2):
        AdaMixTrainer(model=model, args=arguments(tmp_path), train_dataset=rows(model)).train()
    told = [r.getMessage() for r in caplog.records if "has dropout" in r.getMessage()]
    if weight < 10:
        assert told == []
        return
    assert len(told) == 1
    assert "consistency_weight is 100" in told[0]
    for field in ("resid_pdrop=0.1", "embd_pdrop=0.1", "attn_pdrop=0.1", "resid_pdrop=0.0"):
        assert field in told[0]
    assert "summary_first_dropout" not in told[0]  # of the head


def test_a_loop_of_ones_own_hears_of_dropout_too(caplog):
    for dropout, times in ((0.0, 0), (0.1, 1)):
        caplog.clear()
        model = adapted(lambda d=dropout: tiny.tiny_bert(dropout=d), consistency_weight=50)
        for _ in range(3):
            step(model, _doubled(model, tiny.batch_for(model)))
        told = [r.getMessage() for r in caplog.records if "has dropout" in r.getMessage()]
        assert len(told) == times
        assert not times or "hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1" in told[0]


@pytest.mark.parametrize(
    ("options", "last", "told"),
    [
        ({}, 0.69, 1),
        ({"share": None}, 0.69, 1),
        ({}, 0.6, 0),
        ({"num_experts": 1}, 0.69, 0),
        ({"routing": "learned"}, 0.69, 0),
    ],
)  # fmt: skip
def test_a_training_whose_cross_entropy_does_not_fall_is_told(caplog, options, last, told):
    model = adapted(**options)
    falling = [{"cross_entropy": 0.7 + (last - 0.7) * n / 7, "loss": 1.0} for n in range(8)]
    warn_of_standstill([*falling, {"train_runtime": 1.0}], model, adamix_state(model))
    messages = [record.getMessage() for record in caplog.records]
    assert sum("cross-entropy did not fall" in message for message in messages) == told
    assert any("share='up'" in message for message in messages) == ("share" in options)
    caplog.clear()
    warn_of_standstill(falling[:7], model, adamix_state(model))
    assert not caplog.records


def test_a_training_that_draws_no_experts_is_told_nothing(caplog):
    model, logs = adapted(), [{"cross_entropy": 0.7}] * 8
    warn_of_standstill(logs, model, adamix_state(model))
    assert caplog.records
    caplog.clear()
    with use_experts(model, 0):
        warn_of_standstill(logs, model, adamix_state(model))
    learn_merging(model)
    warn_of_standstill(logs, model, adamix_state(model))
    assert not caplog.records


def test_the_trainer_tells_of_a_training_that_learned_nothing(caplog, tmp_path):
    for rate, told in ((0.0, 1), (0.02, 0)):
        caplog.clear()
        model = adapted(dropout=0.0)
        settings = tiny_training.arguments(
            tmp_path, max_steps=16, per_device_train_batch_size=16, logging_steps=1, learning_rate=rate
        )
        AdaMixTrainer(model, settings, train_dataset=rows(model)).train()
        assert sum("lower learning rate" in record.getMessage() for record in caplog.records) == told


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head_in_16_bits_is_told(caplog, tmp_path, dtype):
    model = adapt(tiny.tiny_bert().to(dtype), AdaMixConfig(bottleneck=4))
    rows = tiny_training.dataset_for(model)
    tiny_training.trainer_for(model, tmp_path, rows, max_steps=1).train()
    told = "2 trained parameters are bfloat16 (classifier.weight, ...): an optimizer's step of less than about 1/256"
    assert (told in caplog.text) is (dtype == torch.bfloat16)
