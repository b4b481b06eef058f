"""What gates are told of a batch where it runs again, in a backward, or for several beams."""

import contextlib
import copy
import pickle
import threading

import pytest
import tiny
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from adamix_kernels import AdaMixConfig, AdaMixTrainer, adapt, gate_losses, use_tasks
from adamix_kernels.models.gating import gates_of_layers

TARGETS = {"target_modules": ["query", "value"]}
KINDS = {
    "sentence": AdaMixConfig.smear(num_experts=3, bottleneck=4),
    "linear": AdaMixConfig.mola(r=2, num_experts=3, experts_pattern=None, balance_weight=0.5, **TARGETS),
    "task": AdaMixConfig(routing="learned", router="task", num_tasks=2, mix="weights", bottleneck=4),
}


def built(kind, recomputes=None, build=tiny.tiny_bert, config=None):
    """recomputes: use_reentrant of its activation checkpointing; None: it has none."""
    model = adapt(build(), copy.deepcopy(config or KINDS[kind])).train()
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
        assert not router.notes._begun
    fresh = built("sentence", False)  # without a mask there is nothing to keep
    batch = {"input_ids": tiny.batch_for(fresh)["input_ids"]}
    outputs = [fresh(**batch).logits.sum() for _ in range(KEPT + 2)]
    sum(outputs).backward()


def whole(model, run):
    """Reentrant checkpointing of the model: its first run has no gradients."""
    total = checkpoint(
        lambda anchor: run(batch_of(model, 5, 2)) + 0 * anchor, torch.zeros(1, requires_grad=True), use_reentrant=True
    )
    return total.backward


def hooked(model, run):
    """As GradCache: a hook on the loss computes the batch again, and its gradients."""
    with torch.no_grad():
        loss = run(batch_of(model, 5, 2)).requires_grad_()

    def again(gradient):
        with torch.enable_grad():
            (run(batch_of(model, 5, 2)) * gradient).backward()

    loss.register_hook(again)
    return loss.backward


def hooked_in_a_thread(model, run):
    """As on a GPU, whose thread counts the nodes of the hook by itself."""
    backward = hooked(model, run)

    def in_a_thread():
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()

    return in_a_thread


@pytest.mark.parametrize("recomputes", [None, True, False])
@pytest.mark.parametrize("way", [whole, hooked, hooked_in_a_thread])
@pytest.mark.parametrize("kind", ["sentence", "task"])
def test_a_forward_that_a_backward_runs_has_its_own_padding_and_tasks(kind, way, recomputes):
    def run(batch):
        torch.manual_seed(0)  # the noise of the gates
        if kind == "sentence":
            return model(**batch).logits.square().sum()
        with use_tasks(model, [1, 1, 0, 1]):
            return model(**batch).logits.square().sum()

    tasks = [0, 1, 1, 0] if kind == "task" else None
    model = built(kind)
    total = run(batch_of(model, 5, 2))
    torch.manual_seed(1)
    wanted = gradients(model, total + forward(model, 3, 0, tasks))
    model = built(kind, recomputes)
    forward(model, 7, 1, tasks).backward()
    model.zero_grad()
    torch.manual_seed(1)
    late = forward(model, 3, 0, tasks)
    way(model, run)()
    assert not model.adamix.router.notes._within
    assert_same(gradients(model, late), wanted)


def test_a_context_that_a_hook_left_is_not_kept_behind_its_backward():
    model = built("task")

    def run(batch):
        with use_tasks(model, [1, 1, 0, 1]):
            return model(**batch).logits.square().sum()

    with use_tasks(model, [0, 1, 1, 0]), torch.no_grad():
        wanted = model.eval().bert(**batch_of(model, 7, 0)).last_hidden_state
        hooked(model, run)()
        assert torch.equal(model.bert(**batch_of(model, 7, 0)).last_hidden_state, wanted)


@torch.no_grad()
def test_a_forward_of_another_thread_leaves_this_one_s_padding():
    model = built("sentence").eval()

    def meanwhile(*_):
        handle.remove()
        thread = threading.Thread(target=lambda: model(**batch_of(model, 7, 1)))
        thread.start()
        thread.join()

    wanted = model(**batch_of(model, 3, 0)).logits
    handle = model.bert.encoder.layer[0].register_forward_pre_hook(meanwhile)
    got = model(**batch_of(model, 3, 0)).logits
    torch.testing.assert_close(got, wanted)
    assert not model.adamix.router.notes._here


def test_an_encoder_that_generate_calls_alone_has_its_padding():
    config = AdaMixConfig.smear(num_experts=3, bottleneck=4, target_modules=r"encoder\..*DenseReluDense\.wo")
    model = built("sentence", build=tiny.tiny_t5, config=config).eval()
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    for kept, seed in ((3, 0), (7, 1), (5, 2)):
        batch = batch_of(model, kept, seed)
        found = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        written = found.sequences[:, :-1]
        with torch.no_grad():
            wanted = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=written
            ).logits
        torch.testing.assert_close(torch.stack(found.logits, 1), wanted, rtol=1e-4, atol=1e-5)


def test_a_router_without_losses_adds_none_in_a_forward_that_a_backward_runs():
    model, anchor = built("task"), torch.zeros((), requires_grad=True)

    def run(anchor):
        with use_tasks(model, [0, 1, 1, 0]):
            return model(**batch_of(model, 5, 2)).logits.sum() + gate_losses(model).total + 0 * anchor

    checkpoint(run, anchor, use_reentrant=True).backward()
    assert all(gate.logits.grad is not None for gate in gates_of_layers(model).values())


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_losses_of_a_forward_that_a_backward_runs(reentrant, kept):
    """Those of the first run hold a gradient, or are refused."""
    found = []
    for recomputes in (None, reentrant):
        model, anchor = built("linear"), torch.zeros((), requires_grad=True)

        def run(anchor, model=model):
            return model(**batch_of(model, 5, 2)).logits.sum() * 0 + gate_losses(model).total * 100 + 0 * anchor

        total = run(anchor) if recomputes is None else checkpoint(run, anchor, use_reentrant=recomputes)
        if recomputes:
            hooks = torch.autograd.graph.save_on_cpu() if kept else contextlib.nullcontext()
            with hooks, pytest.raises(RuntimeError, match="model: got a forward that a backward runs"):
                total.backward()
            return
        found.append(gradients(model, total))
    assert_same(found[1], found[0])


def test_only_what_may_run_again_is_kept():
    model = built("sentence")
    for seed in range(3):
        forward(model, 3, seed).backward()
    notes = model.adamix.router.notes
    assert not notes._begun
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward(model.eval(), 3, 0)
    with torch.no_grad():
        forward(model.train(), 3, 0)
    assert not notes._begun
    forward(model, 3, 0)
    assert len(notes._begun) == 1


def test_behind_a_nested_context_are_the_tasks_of_the_outer():
    found = []
    for recomputes in (None, False):
        torch.manual_seed(0)
        model = built("task", recomputes)
        batch = batch_of(model, 7, 0)
        with use_tasks(model, [0, 1, 1, 0]):
            with use_tasks(model, [1, 1, 0, 1]):
                total = model(**batch).logits.square().sum()
            total = total + model.bert(**batch).last_hidden_state.square().sum()
        found.append(gradients(model, total))
    assert_same(found[1], found[0])


def test_a_router_of_an_earlier_version_notes_too():
    model = built("sentence", False)
    vars(model.adamix.router).pop("notes", None)
    again = pickle.loads(pickle.dumps(model.adamix.router))
    assert again.told() == (None, None, None)
    again.note()
    assert again.notes is not type(again).notes


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
