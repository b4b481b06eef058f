"""Layers below the first adapted one see a training batch once, and nothing else changes."""

import copy

import pytest
import tiny
import tiny_families as families
import torch
from tiny_training import rows_of, trainer_for

from adamix_kernels import AdaMixConfig, adamix_loss, adapt, both_passes, double_batch
from adamix_kernels.models.prefix import shared_prefix

TINY = {"bert": tiny.tiny_bert, "gpt2": tiny.tiny_gpt2, "gpt2_classifier": tiny.tiny_gpt2_classifier,
        "llama": tiny.tiny_llama, "t5": tiny.tiny_t5}  # fmt: skip
# ALBERT's one layer runs twice; mixtral has no adapters by default.
KINDS = [*TINY, *(kind for kind in families.FAMILIES if kind not in ("albert", "mixtral"))]


def inputs_of(model, kind):
    batch = tiny.batch_for(model) if kind in TINY else families.batch_for(kind)
    labels = batch.pop("labels")
    if kind in ("t5", "whisper"):
        batch["decoder_input_ids"] = labels.clamp_min(0)
    if kind not in (*families.ENCODERS, "bert"):
        batch["use_cache"] = False
    return batch


def upper(kind, method="lora", **options):
    """A model of two layers, or two stacks of two, with experts in the second ones alone."""
    model = TINY[kind]() if kind in TINY else families.build(kind)
    fields = dict(method=method, bottleneck=4, num_experts=3, r=2, share=None, layers_to_transform=[1])
    return families.spread(adapt(model, AdaMixConfig(**{**fields, **options}))).train()


def rows_seen(model, run):
    """Rows that each list's first layer computed with, apart from its being left out."""
    seen = []
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
    inner = [next(m for m in blocks[0].modules() if not list(m.children())) for blocks in lists]
    hooks = [m.register_forward_hook(lambda _m, args, out: seen.append(out.shape[0])) for m in inner]
    try:
        return run(), seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_outputs_and_gradients_from_half_the_rows(kind):
    model = upper(kind)
    batch = inputs_of(model, kind)
    results = []
    for run in (lambda: model(**double_batch(batch)), lambda: both_passes(model, batch)):
        torch.manual_seed(5)
        model.zero_grad()
        out, seen = rows_seen(model, run)
        out.logits.float().pow(2).sum().backward()
        results.append((out.logits, [p.grad for p in model.parameters() if p.grad is not None], seen))
    (want, grads, full), (got, same, shared) = results
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert len(grads) == len(same) > 0
    for a, b in zip(grads, same):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item() + 1e-8)
    assert sum(shared) < sum(full)
    assert "forward" not in {name for m in model.modules() for name in vars(m)}  # nothing is left behind


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_trainer_shares_by_itself_and_the_run_is_the_same(dropout, tmp_path):
    """With dropout nothing is shared, and the generator is where it would have been: the same draws, the same bits."""
    runs = []
    for share in (False, "auto"):
        model = tiny.tiny_bert(dropout=dropout)
        adapt(model, AdaMixConfig(bottleneck=4, num_experts=3, layers_to_transform=[1], shared_prefix=share))
        rows = rows_of(tiny.batch_for(model, 8))
        trainer = trainer_for(model, tmp_path / str(share), rows, seed=3, max_steps=3)
        _, seen = rows_seen(model, trainer.train)
        runs.append(([log["loss"] for log in trainer.state.log_history if "cross_entropy" in log], seen))
        assert model.adamix.prefix_is_random is (share == "auto" and dropout > 0)
    (want, full), (got, shared) = runs
    if dropout:
        assert got == want
        assert shared == [2, *full]  # one look at the first batch
    else:
        assert got == pytest.approx(want, rel=1e-5)
        assert sum(shared) == sum(full) / 2


def test_true_shares_the_masks_too():
    model = tiny.tiny_bert(dropout=0.2)
    adapt(model, AdaMixConfig(bottleneck=4, num_experts=3, layers_to_transform=[1], shared_prefix=True)).train()
    batch = inputs_of(model, "bert")
    with shared_prefix(model, batch) as shared:
        assert shared
        hidden = model(**double_batch(batch), output_hidden_states=True).hidden_states[1]
    assert torch.equal(hidden[:4], hidden[4:])


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"layers_to_transform": None}, lambda model: None),
        ({"shared_prefix": False}, lambda model: None),
        ({"consistency_weight": 0.0}, lambda model: setattr(model.adamix.router, "passes", 1)),
        ({}, lambda model: model.eval()),
    ],
    ids=["first layer adapted", "refused", "one pass", "evaluation"],
)
def test_where_nothing_is_shared(options, change):
    model = upper("bert", **options)
    change(model)
    batch = inputs_of(model, "bert")
    torch.manual_seed(1)
    want = model(**double_batch(batch)).logits
    torch.manual_seed(1)
    with shared_prefix(model, batch) as shared:
        assert not shared
    torch.manual_seed(1)
    assert torch.equal(both_passes(model, batch).logits, want)


def test_a_trained_embedding_gets_the_gradient_of_both_passes():
    model = tiny.tiny_bert()
    fields = dict(
        bottleneck=4, num_experts=3, layers_to_transform=[1], modules_to_save=["word_embeddings", "classifier"]
    )
    families.spread(adapt(model, AdaMixConfig(**fields))).train()
    batch = inputs_of(model, "bert")
    grads = []
    for run in (lambda: model(**double_batch(batch)), lambda: both_passes(model, batch)):
        torch.manual_seed(5)
        model.zero_grad()
        adamix_loss(run().logits, torch.tensor([0, 1, 1, 0])).loss.backward()
        grads.append(model.get_submodule("bert.embeddings.word_embeddings").weight.grad.clone())
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)


def test_activation_checkpointing():
    model = upper("bert")
    batch = inputs_of(model, "bert")
    plain = copy.deepcopy(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    grads = []
    for each in (plain, model):
        torch.manual_seed(5)
        both_passes(each, batch).logits.pow(2).sum().backward()
        grads.append([p.grad for p in each.parameters() if p.grad is not None])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_a_trained_embedding_under_reentrant_checkpointing():
    """transformers 4 recomputes a layer by its forward of that time: here it would be the layer's own output."""
    model = tiny.tiny_llama(num_hidden_layers=4)
    fields = dict(bottleneck=4, num_experts=3, layers_to_transform=[3], modules_to_save=["embed_tokens"])
    families.spread(adapt(model, AdaMixConfig(**fields))).train()
    batch = inputs_of(model, "llama")
    grads = []
    for reentrant in (None, True):
        if reentrant:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": True})
        torch.manual_seed(5)
        model.zero_grad()
        with shared_prefix(model, batch) as shared:
            model(**double_batch(batch)).logits.float().pow(2).sum().backward()
        assert shared is not reentrant
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_decoder_shares_nothing_that_has_read_drawn_experts():
    """The encoder's first layer has experts, the decoder's first has none, but attends to their output."""
    model = tiny.tiny_t5()
    targets = r"(encoder\.block\.\d+|decoder\.block\.1)\..*DenseReluDense\.wo"
    fields = dict(bottleneck=4, num_experts=3, share=None, target_modules=targets, shared_prefix=True)
    families.spread(adapt(model, AdaMixConfig(**fields))).train()
    batch = inputs_of(model, "t5")
    results = []
    for run in (lambda: model(**double_batch(batch)), lambda: both_passes(model, batch)):
        torch.manual_seed(5)
        results.append(run().logits)
    assert torch.equal(*results)


def test_an_error_inside_leaves_nothing_behind():
    model = upper("bert")
    batch = inputs_of(model, "bert")
    with pytest.raises(RuntimeError, match="stop"), shared_prefix(model, batch):
        raise RuntimeError("stop")
    with pytest.raises(IndexError):
        both_passes(model, {**batch, "input_ids": batch["input_ids"] + tiny.VOCAB})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.bert.encoder.layer[0].modules())
    assert "forward" not in vars(model.bert.encoder.layer[0])
    with pytest.raises(ValueError, match="shared_prefix: got 'yes', expected 'auto', True or False"):
        AdaMixConfig(shared_prefix="yes")
