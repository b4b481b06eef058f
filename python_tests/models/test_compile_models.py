"""torch.compile of whole adapted models in training: one graph, and no recompilation from step to step."""

import copy

import pytest
import torch
from tiny import batch_for, tiny_bert, tiny_gpt2
from tiny_training import adapted, dataset_for, parameters, trainer_for
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from adamix_kernels import RoutedAdapter, Router, adamix_loss, double_batch

MODELS = {
    "bert adapter": lambda: adapted(tiny_bert(3, dropout=0.1)),
    "gpt2 lora": lambda: adapted(tiny_gpt2(dropout=0.1), method="lora", dropout=0.2, routing="sample"),
}
SIZES = (2, 2, 4, 6)  # samples of each step, before doubling


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def test_every_call_of_a_compiled_model_draws_again():
    router = Router("sample", passes=1)
    layer = torch.compile(RoutedAdapter(8, 2, 64, share=None, router=router), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        layer.up_bias.normal_()
    x = torch.randn(2, 3, 8)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    assert counters["stats"]["unique_graphs"] == 1


def step(network, model, rows, seed):
    """The loss and all gradients of one training step."""
    batch = batch_for(model, rows, 6, seed)
    labels = batch.pop("labels")
    torch.manual_seed(seed)
    logits = network(**double_batch(batch)).logits
    if labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = adamix_loss(logits, labels).loss
    return loss.detach(), torch.autograd.grad(loss, parameters(model))


@pytest.mark.parametrize(("name", "checkpointing"), [("bert adapter", False), ("gpt2 lora", True)])
def test_a_training_step_is_one_graph_that_compiles_twice(name, checkpointing):
    model = MODELS[name]().train()
    model.config.use_cache = False  # with checkpointing, transformers warns of a cache inside the graph
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers sets requires_grad inside the graph, which this kind of checkpointing does not need.
        model.disable_input_require_grads()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    eager = copy.deepcopy(model)
    losses = []
    for seed, rows in enumerate(SIZES):
        loss, gradients = step(compiled, model, rows, seed)
        wanted, wanted_gradients = step(eager, eager, rows, seed)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
        for got, expected in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        losses.append(loss)
    assert counter.frame_count == 2  # for the first size, then for every size
    assert not counters["graph_break"]
    assert len({float(loss) for loss in losses}) == len(SIZES)


def test_trainer_with_torch_compile(tmp_path):
    model = MODELS["gpt2 lora"]()
    data = dataset_for(model, 6)
    trainer = trainer_for(
        model, tmp_path, data, max_steps=4, per_device_train_batch_size=4, torch_compile=True,
        torch_compile_backend="aot_eager",
    )  # fmt: skip
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # batches of 4 and of 2, at each of two epochs
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
