"""Activation checkpointing: the gradients without it, or an error, never others."""

import copy

import pytest
import torch
from tiny import batch_for, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import TrainingArguments

from adamix_kernels import AdaMixConfig, AdaMixTrainer, adapt, disable, double_batch, use_experts
from adamix_kernels.functional import adamix_loss

MODELS = {
    "bert adapter": lambda: (tiny_bert(3, dropout=0.1), {}),
    "gpt2 adapter": lambda: (tiny_gpt2(dropout=0.1), {}),
    "gpt2 lora": lambda: (tiny_gpt2(dropout=0.1), {"method": "lora", "dropout": 0.2}),
    "llama lora": lambda: (tiny_llama(), {"method": "lora", "dropout": 0.2}),
    "t5 adapter": lambda: (tiny_t5(dropout=0.1), {}),
}


def build(name, **options):
    base, method = MODELS[name]()
    model = adapt(base, AdaMixConfig(**{"bottleneck": 4, "num_experts": 3, **method, **options}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def checkpointed(model, **kwargs):
    model = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return model


def forward_loss(model, seed):
    """One doubled forward; the batch depends on the seed."""
    batch = batch_for(model, 2, 5, seed)
    labels = batch.pop("labels")
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    if "classifier" not in dict(model.named_children()):
        batch["use_cache"] = False
    return adamix_loss(model(**double_batch(batch)).logits, labels).loss


def gradients(model, forwards):
    """All gradients of `forwards` forwards and one backward, from one seed."""
    model.zero_grad()
    torch.manual_seed(3)
    sum(forward_loss(model, seed) for seed in range(forwards)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
@pytest.mark.parametrize("name", ["bert adapter", "gpt2 lora"])
def test_same_gradients_at_every_routing_level(name, routing, reentrant):
    model = build(name, routing=routing)
    wanted = gradients(model, 1)
    assert all(value.abs().sum() > 0 for n, value in wanted.items() if "down_weight" in n or "lora_a" in n)
    assert_same(gradients(checkpointed(model, use_reentrant=reentrant), 1), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_two_forwards_then_one_backward(name, reentrant):
    model = build(name)
    wanted = gradients(model, 2)
    assert_same(gradients(checkpointed(model, use_reentrant=reentrant), 2), wanted)


def test_the_recomputation_really_runs_and_redraws(monkeypatch):
    from adamix_kernels.routing import Router

    drawn = []
    draw = Router.draw

    def spy(self, *args):
        index = draw(self, *args)
        if index is not None:
            drawn.append(index.tolist())
        return index

    monkeypatch.setattr(Router, "draw", spy)
    gradients(checkpointed(build("bert adapter", routing="sample"), use_reentrant=False), 1)
    layers = 2
    assert len(drawn) == 2 * layers
    assert sorted(drawn[:layers]) == sorted(drawn[layers:])
    assert len(set(map(tuple, drawn))) > 1


def arguments(folder, **options):
    defaults = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    return TrainingArguments(str(folder), **defaults, per_device_train_batch_size=4, learning_rate=1e-2, **options)


def trained(model, folder, **options):
    batch = batch_for(model, 8, 6)
    data = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    AdaMixTrainer(model, arguments(folder, **options), train_dataset=data).train()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert adapter", "gpt2 lora"])
def test_trainer_with_checkpointing_learns_the_same(name, reentrant, tmp_path):
    model = build(name)
    wanted = trained(copy.deepcopy(model), tmp_path)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_same(trained(copy.deepcopy(model), tmp_path, **options), wanted)


def test_rng_state_must_be_preserved(tmp_path):
    model = build("bert adapter")
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs: got preserve_rng_state=False"):
        trained(model, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    with pytest.raises(ValueError, match="model's activation checkpointing: got preserve_rng_state=False"):
        trained(checkpointed(model, **kwargs), tmp_path)


def wrapped(model, **options):
    """A copy whose transformer layers stand in torch's CheckpointWrapper."""
    model = copy.deepcopy(model)
    layers = model.bert.encoder.layer
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer, **options)
    return model


def test_torch_checkpoint_wrapper(tmp_path):
    model = build("bert adapter")
    assert_same(
        {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in gradients(wrapped(model), 2).items()},
        gradients(model, 2),
    )
    with pytest.raises(ValueError, match="model's activation checkpointing: got preserve_rng_state=False"):
        trained(wrapped(model, preserve_rng_state=False), tmp_path)
    model = wrapped(model)
    with (
        use_experts(model, torch.tensor([0, 1])),
        pytest.raises(RuntimeError, match="under activation checkpointing"),
    ):
        model(**batch_for(model, 2, 5))


def test_chosen_experts_refuse_checkpointed_training():
    model = checkpointed(build("bert adapter"), use_reentrant=False)
    batch = batch_for(model, 2, 5)
    with use_experts(model, torch.tensor([0, 1])):
        with pytest.raises(RuntimeError, match="use_experts: got a training forward under activation checkpointing"):
            model(**batch)
        model.eval()(**batch)


def test_disabled_model_has_no_adapter_gradient_with_checkpointing():
    model = checkpointed(build("bert adapter"), use_reentrant=False)
    with disable(model):
        forward_loss(model, 0).backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    assert all(p.grad is None for n, p in model.named_parameters() if "adapter" in n)
