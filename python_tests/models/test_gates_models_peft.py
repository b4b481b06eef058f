"""accelerate on PEFT's X-LoRA and Arrow models: the same numbers as its own layers, in float64, gradients included."""

import copy

import pytest
import tiny
import torch

from adamix_kernels.peft import accelerate, restore

peft = pytest.importorskip("peft")
pytest.importorskip("peft.tuners.lora.arrow")

TARGETS = ["query", "value", "q_proj", "down_proj"]


def adapters(folder, ranks, base):
    """PEFT LoRA folders of the model that base() gives, of these ranks and of other scalings."""
    found = {}
    for number, rank in enumerate(ranks):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=rank, lora_alpha=3 + number, target_modules=TARGETS)
        model = peft.get_peft_model(base(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
        model.save_pretrained(folder / f"{number}")
        found[str(number)] = str(folder / f"{number}")
    return found


def xlora(folder, **options):
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=tiny.HIDDEN, adapters=adapters(folder, (2, 4, 3), tiny.tiny_llama), **options
    )
    base = tiny.tiny_llama(use_cache=False)  # PEFT loads adapters of models whose layers are in `model` alone
    for layer in base.model.layers:  # Llama's own norms round to float32
        layer.input_layernorm = torch.nn.RMSNorm(tiny.HIDDEN, 1e-6)
        layer.post_attention_layernorm = torch.nn.RMSNorm(tiny.HIDDEN, 1e-6)
    base.model.norm = torch.nn.RMSNorm(tiny.HIDDEN, 1e-6)
    torch.manual_seed(9)
    model = peft.get_peft_model(base, config).double()
    model.base_model.internal_xlora_classifier.dtype = torch.float64
    return model


def arrow(folder, top_k, **options):
    config = peft.ArrowConfig(top_k=top_k, router_temperature=0.7, rng_seed=0, **options)
    paths = list(adapters(folder, (2, 2, 2, 2), tiny.tiny_bert).values())
    more = {"general_adapter_paths": paths[3:]} if options.get("use_gks") else {}
    model = peft.tuners.lora.create_arrow_model(tiny.tiny_bert(), paths[:3], config, **more)
    return model.double()


def run(model):
    """logits, and the gradient of every parameter and of the embedded inputs, all of which are trained."""
    model.requires_grad_(True).zero_grad()
    batch = tiny.batch_for(tiny.tiny_bert())
    batch.pop("labels")
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, **batch).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {**grads, "x": embedded.grad.clone()}


def as_theirs(model, calls, forwards=1):
    own = run(model)
    fast = accelerate(model)
    calls.clear()
    got = run(model)
    assert len(calls) == forwards * len(fast.layers) == forwards * 4
    assert not fast.left
    torch.testing.assert_close(got[0], own[0], rtol=1e-8, atol=1e-10)
    assert got[1].keys() == own[1].keys()
    for name, value in own[1].items():
        torch.testing.assert_close(got[1][name], value, rtol=1e-8, atol=1e-10, msg=name)
    if hasattr(model.base_model, "internal_xlora_scalings"):
        model.base_model.internal_xlora_scalings = None  # of PEFT, which no copy can hold
    copied = copy.deepcopy(model)
    torch.testing.assert_close(run(copied)[0], own[0], rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"accelerated already"):
        accelerate(model)
    return own


@pytest.fixture
def calls(monkeypatch):
    from adamix_kernels.peft import gates

    made, op = [], gates.routed_lora
    monkeypatch.setattr(gates, "routed_lora", lambda *a, **k: made.append(k["gates"].shape) or op(*a, **k))
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k_lora": 2, "enable_softmax_topk": True, "layerwise_scalings": True}, {"global_scaling_weight": 0.5}],
    ids=["dense", "top-2", "scaled"],
)
def test_xlora_is_as_pefts_own(options, tmp_path, calls):
    model = xlora(tmp_path, **options)
    logits, grads = as_theirs(model, calls, 2)  # PEFT runs the model once before, for the scalings
    assert calls[0][-1] == 3
    learned = [n for n in grads if "internal_xlora_classifier" in n]
    assert learned  # the gates got a gradient
    assert all(grads[n].abs().sum() > 0 for n in learned)
    with model.disable_adapter():
        plain = run(model)[0]
    assert (plain - logits).abs().max() > 1e-3
    assert restore(model) is model
    calls.clear()
    assert torch.equal(run(model)[0], logits)
    assert not calls


@pytest.mark.parametrize(("top_k", "gks"), [(2, False), (1, False), (3, False), (2, True)])
def test_arrow_is_as_pefts_own(top_k, gks, tmp_path, calls):
    model = arrow(tmp_path, top_k, use_gks=gks)
    logits, grads = as_theirs(model, calls)
    assert calls[0][-1] == top_k
    assert sum(".task_" in n and "lora_" in n for n in grads) == 3 * 2 * 4
    restore(model)
    calls.clear()
    assert torch.equal(run(model)[0], logits)
    assert not calls


def test_what_is_no_plain_mixture_stays_pefts(tmp_path, calls):
    model = xlora(tmp_path)
    accelerate(model)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.lora_dropout["0"] = torch.nn.Dropout(0.5)
    run(model.train())
    assert not calls
    run(model.eval())
    assert len(calls) == 8
