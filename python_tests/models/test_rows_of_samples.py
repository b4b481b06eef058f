"""Rows [B * S, H] of a layer (OPT's fc1): of how many samples they are, run again, beside other threads, or cut off."""

import copy
import threading
import weakref

import pytest
import torch
import transformers as tr
from torch.utils.checkpoint import checkpoint

from adamix_kernels import AdaMixConfig, adapt, use_experts
from adamix_kernels.models import guards
from adamix_kernels.routing import Router


def built(recomputes=None, **options):
    """recomputes: use_reentrant of its activation checkpointing; None: it has none."""
    torch.manual_seed(0)
    config = tr.OPTConfig(
        vocab_size=50, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
        max_position_embeddings=40, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    fields = dict(method="lora", target_modules=["fc1", "fc2"], num_experts=3, routing="sample", consistency_weight=0.0)
    model = adapt(tr.OPTForCausalLM(config), AdaMixConfig(**fields, **options)).train()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    if recomputes is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": recomputes})
    return model


def ids(samples):
    return torch.arange(samples * 12).view(samples, 12) % 50


def gradients(model, run):
    torch.manual_seed(3)
    run(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def two_sizes(model):
    outputs = [model(input_ids=ids(samples), use_cache=False).logits for samples in (4, 6, 3)]
    with torch.no_grad():
        model(input_ids=ids(2))
    return sum(logits.square().sum() for logits in outputs)


def decoder_alone(model):
    model.adamix.router.samples._forwards._lost = True  # as after some thousand steps
    model(input_ids=ids(2), use_cache=False)
    states = model.model(input_ids=ids(4), use_cache=False).last_hidden_state
    alone = (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum()
    model.adamix.router.eval_level = "sample"
    with torch.no_grad():
        model.eval()(input_ids=ids(3))
    model.train()
    return alone


@pytest.mark.parametrize("run", [two_sizes, decoder_alone])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_layer_has_the_samples_of_its_own_forward(reentrant, run):
    got, wanted = gradients(built(reentrant), run), gradients(built(), run)
    assert got.keys() == wanted.keys()
    assert any(value.abs().max() > 0.01 for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, n=name: f"{n}: {text}")


def in_a_thread(backward):
    """As on a GPU, whose thread counts the nodes that it makes by itself."""
    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()


@pytest.mark.parametrize("way", [lambda backward: backward(), in_a_thread])
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_recomputed_within_a_recomputation_has_the_samples_of_its_own_forward(reentrant, way):
    found = []
    for recomputes in (None, reentrant):
        model = built(recomputes)
        model(input_ids=ids(6), use_cache=False).logits.sum().backward()
        model.zero_grad()
        with torch.no_grad():
            model.eval()(input_ids=ids(3))
        model.train()
        embedded = model.get_input_embeddings()(ids(4)).requires_grad_()
        torch.manual_seed(3)
        whole = checkpoint(lambda x, m=model: m(inputs_embeds=x, use_cache=False).logits, embedded, use_reentrant=True)
        way(whole.square().sum().backward)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any(value.abs().max() > 0.01 for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda text, n=name: f"{n}: {text}")
    assert not model.adamix.router.samples._forwards._within


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_within_a_forward_has_the_samples_of_its_own(reentrant):
    def run(model):
        first = model(input_ids=ids(4), use_cache=False).logits.square().sum()

        def meanwhile(*_):
            handle.remove()
            first.backward()

        handle = model.lm_head.register_forward_hook(meanwhile)
        return model(input_ids=ids(6), use_cache=False).logits.square().sum()

    got, wanted = gradients(built(reentrant), run), gradients(built(), run)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, n=name: f"{n}: {text}")


def test_a_forward_of_a_backward_that_is_over_is_not_guessed():
    model, late = built(True), []
    embedded = model.get_input_embeddings()(ids(4)).requires_grad_()

    @torch.enable_grad()
    def hook(_):
        late.append(model(inputs_embeds=embedded, use_cache=False).logits.sum())

    anchor = torch.ones(1, requires_grad=True)
    anchor.register_hook(hook)
    anchor.sum().backward()
    with pytest.raises(RuntimeError, match="expected one of them: of how many samples its rows are is not known"):
        late[0].backward()


@pytest.mark.parametrize("experts", [1, [2, 0]])
def test_a_forward_of_another_thread_leaves_this_one_s_samples(experts):
    model = built().eval()
    layer = model.model.decoder.layers[0].fc1.base

    @torch.no_grad()
    def other():
        model(input_ids=ids(6))

    def meanwhile(*_):
        handle.remove()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with use_experts(model, experts), torch.no_grad():
        wanted = model(input_ids=ids(4)).logits
        handle = layer.register_forward_hook(meanwhile)
        assert torch.equal(model(input_ids=ids(4)).logits, wanted)


def test_a_forward_that_failed_leaves_nothing_behind():
    model = built()
    handle = model.model.decoder.layers[0].fc2.register_forward_hook(lambda *_: 1 / 0)
    embedded = model.get_input_embeddings()(ids(4)).requires_grad_() * 1
    with pytest.raises(ZeroDivisionError):
        model(inputs_embeds=embedded)
    handle.remove()
    assert model.adamix.router.samples.known() is None
    assert copy.deepcopy(model)(input_ids=ids(2)).logits.isfinite().all()
    alive = weakref.ref(embedded)
    del embedded
    assert alive() is None


def test_a_model_that_an_earlier_version_pickled_runs():
    model = built()
    router = Router.__new__(Router)
    router.__setstate__({n: v for n, v in vars(model.adamix.router).items() if n not in ("samples", "notes")})
    assert router.samples.known() is None
    assert router.notes is None
    guards._before_forward(model, (ids(4),))  # its hook was registered without the keywords
    assert model.adamix.router.samples.known() == 4
