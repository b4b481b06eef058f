"""What gates are told of a batch where it runs again, in a backward, or for several beams."""

import copy
import pickle

import pytest
import tiny
import torch
import transformers

from adamix_kernels import AdaMixConfig, AdaMixTrainer, adapt, gate_losses, use_tasks
from adamix_kernels.models.gating import gates_of_layers

TARGETS = {"target_modules": ["query", "value"]}
KINDS = {
    "sentence": AdaMixConfig.smear(num_experts=3, bottleneck=4),
    "linear": AdaMixConfig.mola(r=2, num_experts=3, experts_pattern=None, balance_weight=0.5, **TARGETS),
    "task": AdaMixConfig(routing="learned", router="task", num_tasks=2, mix="weights", bottleneck=4),
}


def built(kind, recomputes=None, build=tiny.tiny_bert):
    """recomputes: use_reentrant of its activation checkpointing; None: it has none."""
    model = adapt(build(), copy.deepcopy(KINDS[kind])).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    if recomputes is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": recomputes})
    return model


def batch_of(model, kept, seed):
    batch = {name: value for name, value in tiny.batch_for(model, 4, 7, seed).items() if name != "labels"}
    batch["attention_mask"][:, kept:] = 0
    return batch


def forward(model, kept, seed, tasks=None):
    batch = batch_of(model, kept, seed)
    if tasks is None:
        return model(**batch).logits.square().sum() + gate_losses(model).total
    with use_tasks(model, tasks):
        return model(**batch).logits.square().sum()


def gradients(model, total):
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(got, wanted):
    assert any(g is not None and g.abs().sum() > 0 for n, g in wanted.items() if ".gate." in n)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", ["sentence", "linear"])
def test_a_recomputed_forward_has_its_own_padding(kind):
    found = []
    for recomputes in (None, False):
        model = built(kind, recomputes)
        total = forward(model, 3, 0) + forward(model, 7, 1)
        with torch.no_grad():
            model(**batch_of(model, 5, 2))
        found.append(gradients(model, total))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_has_its_own_tasks(reentrant):
    found = []
    for recomputes in (None, reentrant):
        model = built("task", recomputes)
        torch.manual_seed(0)
        total = forward(model, 7, 0, [0, 1, 1, 0]) + forward(model, 7, 1, [1, 1, 0, 0])
        found.append(gradients(model, total))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_trainer_recomputes_gates_of_tasks(reentrant, tmp_path):
    found = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        model = built("task")
        batch = tiny.batch_for(model)
        rows = [{**{name: value[n] for name, value in batch.items()}, "task_ids": n % 2} for n in range(4)]
        more = dict(report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", max_steps=2)
        arguments = transformers.TrainingArguments(str(tmp_path), learning_rate=0.01, **more, **options)
        AdaMixTrainer(model, arguments, train_dataset=rows).train()
        found.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    assert_same(found[1], found[0])


def test_a_forward_of_long_ago_is_not_guessed():
    from adamix_kernels.routing.forwards import KEPT

    model = built("sentence", False)
    first = forward(model, 3, 0)
    for _ in range(KEPT):
        forward(model, 7, 1)
    with pytest.raises(RuntimeError, match=f"a forward behind {KEPT} later ones"):
        first.backward()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.adamix.router))):
        router = getattr(again, "adamix", None)
        router = again if router is None else router.router
        assert not router.forwards._begun
    fresh = built("sentence", False)  # without a mask there is nothing to keep
    batch = {"input_ids": tiny.batch_for(fresh)["input_ids"]}
    outputs = [fresh(**batch).logits.sum() for _ in range(KEPT + 2)]
    sum(outputs).backward()


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_in_training_mode_weighs_as_in_evaluation(beams, caplog):
    model = built("task", build=tiny.tiny_gpt2)
    gates = list(gates_of_layers(model).values())
    with torch.no_grad():
        for gate in gates:
            gate.logits.copy_(torch.randn(gate.logits.shape, generator=torch.Generator().manual_seed(1)) * 3)
    batch = {name: value for name, value in tiny.batch_for(model, 4, 5).items() if name != "labels"}
    options = dict(num_beams=beams, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    seen = [gate.batches.item() for gate in gates]
    with use_tasks(model, [0, 1, 1, 0]):
        wanted = model.eval().generate(**batch, **options)
        assert torch.equal(model.train().generate(**batch, **options), wanted)
    assert "generate() was called in training mode" in caplog.text
    assert [gate.batches.item() for gate in gates] == seen  # no batch of the training
    assert all(gate.training for gate in gates)
