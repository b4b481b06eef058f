"""load_official: both checkpoint families, against a transcription of the published evaluation."""

import copy
import logging
import pickle

import official_files as files
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers

from adamix_kernels.convert import clip_predictions, load_official
from adamix_kernels.models.config import AdaMixConfig
from adamix_kernels.models.inject import adapt
from adamix_kernels.models.merging import merge

H, L, R = tiny.HIDDEN, tiny.LAYERS, 5
NLU = {"bert": tiny.tiny_bert, "roberta": tiny.tiny_roberta}


def write(state, tmp_path, name="model.bin"):
    torch.save(state, tmp_path / name)
    return tmp_path / name


def published_mean(state, stem, kind, scores):
    rows = [
        state[f"{stem}.{m}{kind}"] for m in range(sum(k.startswith(f"{stem}.") and k.endswith(kind) for k in state))
    ]
    weights = torch.softmax(state[scores], 0) if len(rows) > 1 else torch.ones(1)
    return sum(w * row for w, row in zip(weights, rows))


def hook_soup(layer, state, stem, act):
    """The published merged evaluation, on the output of `layer`."""
    sides = [
        [published_mean(state, f"{stem}.{side}.deepspeed_experts", kind, f"{stem}.{side}.expert_score_weight")
         for kind in (".weight", ".bias")]
        for side in ("MoA_A", "MoA_B")
    ]  # fmt: skip
    layer.register_forward_hook(lambda _m, _i, out: F.linear(act(F.linear(out, *sides[0])), *sides[1]) + out)


def hook_lora(layer, state, stem, scaling):
    factor_a, factor_b = (
        published_mean(state, f"{stem}.experts_lora_{side}", "", f"{stem}.lora_expert_score_weight") for side in "AB"
    )
    r = factor_a.shape[0] // 2

    def hook(_module, inputs, out):
        (x,) = inputs
        q, v = x @ factor_a[:r].T @ factor_b[:H].T, x @ factor_a[r:].T @ factor_b[H:].T
        return out + scaling * torch.cat([q, torch.zeros_like(q), v], -1)

    layer.register_forward_hook(hook)


def published_nlu(model, family, state):
    model = copy.deepcopy(model)
    for i, layer in enumerate(getattr(model, family).encoder.layer):
        hook_soup(layer.output.dense, state, f"{family}.encoder.layer.{i}.output.ExpertSoup", F.gelu)
    model.load_state_dict({k: v for k, v in state.items() if k.startswith("classifier")}, strict=False)
    return model


def logits(model):
    with torch.no_grad():
        return model(**tiny.batch_for(model)).logits


@pytest.mark.parametrize("family", NLU)
@pytest.mark.parametrize(("down", "up", "share"), [(4, 1, "up"), (1, 3, "down"), (3, 3, None)])
def test_nlu_file_gives_the_published_evaluation(family, down, up, share, tmp_path):
    state = files.nlu_state(family, L, H, R, down, up)
    base = NLU[family]()
    want = logits(published_nlu(base, family, state))
    model = load_official(base, write(state, tmp_path))
    config = model.adamix.config
    assert (config.num_experts, config.bottleneck, config.share) == (max(down, up), R, share)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, logits(NLU[family]()), atol=1e-2)
    adapted = adapt(NLU[family](), AdaMixConfig(num_experts=max(down, up), bottleneck=R, share=share))
    assert torch.equal(logits(load_official(adapted, write(state, tmp_path))), logits(model))


@pytest.mark.parametrize(("down", "up"), [(8, 1), (2, 2)])
def test_gpt2_lora_file_gives_the_published_evaluation(down, up, tmp_path):
    base = tiny.tiny_gpt2()
    wrapped = files.nlg_lora_state(L, H, 4, down, up, base)
    state = {k.removeprefix("module."): v for k, v in wrapped["model_state_dict"].items()}
    published = copy.deepcopy(base)
    for i, block in enumerate(published.transformer.h):
        hook_lora(block.attn.c_attn, state, f"transformer.h.{i}.attn.c_attn", 32 / 4)
    want = logits(published)
    model = load_official(base, write(wrapped, tmp_path))
    assert (model.adamix.config.r, model.adamix.config.alpha, model.adamix.config.num_experts) == (4, 32.0, down)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, logits(tiny.tiny_gpt2()), atol=1e-2)


@pytest.mark.parametrize("full", [False, True])
def test_gpt2_adapter_file_gives_the_published_evaluation(full, tmp_path):
    base = tiny.tiny_gpt2()
    wrapped = files.nlg_soup_state(L, H, 8)
    state = {k.removeprefix("module."): v for k, v in wrapped["model_state_dict"].items()}
    published = copy.deepcopy(base)
    for i, block in enumerate(published.transformer.h):
        stem = f"transformer.h.{i}.mlp.ExpertSoup"
        hook_soup(block.mlp.c_proj, state, stem, lambda z: F.gelu(z, approximate="tanh"))
    want = logits(published)
    model = load_official(base, write(files.full_gpt2_state(base, wrapped) if full else wrapped, tmp_path))
    assert model.adamix.config.consistency_weight == 100.0
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


def test_base_weights_in_the_file_are_loaded_with_a_warning(tmp_path, caplog):
    base = tiny.tiny_gpt2()
    wrapped = files.nlg_lora_state(L, H, 4, base=base)
    with caplog.at_level(logging.WARNING):
        load_official(tiny.tiny_gpt2(), write(wrapped, tmp_path))
    assert not caplog.records
    wrapped["model_state_dict"]["module.transformer.h.1.attn.c_attn.bias"] += 1
    with caplog.at_level(logging.WARNING):
        model = load_official(tiny.tiny_gpt2(), write(wrapped, tmp_path))
    assert "1 base weights" in caplog.text
    assert torch.equal(model.transformer.h[1].attn.c_attn.bias, base.transformer.h[1].attn.c_attn.bias + 1)


def test_a_model_without_the_prefix_or_the_head(tmp_path):
    state = files.nlu_state("bert", L, H, R)
    path = write(state, tmp_path)
    whole = load_official(tiny.tiny_bert(), path)
    headless = load_official(tiny.tiny_bert(model_class=transformers.BertModel), path)
    for a, b in zip(whole.bert.encoder.layer, headless.encoder.layer):
        assert torch.equal(a.output.dense.adapter.down_weight, b.output.dense.adapter.down_weight)
    wrapped = files.nlg_lora_state(L, H, 4)
    inner = load_official(tiny.tiny_gpt2().transformer, write(wrapped, tmp_path))
    want = wrapped["model_state_dict"]["module.transformer.h.1.attn.c_attn.experts_lora_A.3"]
    assert torch.equal(inner.h[1].attn.c_attn.lora_a[3], want)


def test_another_tasks_head_can_be_left_out(tmp_path):
    path = write(files.nlu_state("bert", L, H, R, labels=3), tmp_path)
    model = tiny.tiny_bert(num_labels=2)
    kept = model.classifier.weight.clone()
    with pytest.raises(ValueError, match=r"classifier.(bias|weight): got shape \(3"):
        load_official(model, path)
    load_official(model, path, head=False)
    assert torch.equal(model.classifier.weight, kept)


@pytest.mark.parametrize(
    ("model_class", "config_class", "sizes", "width", "keys"),
    [
        (transformers.BertForSequenceClassification, transformers.BertConfig, (768, 12, 12, 3072), 48, 146),
        (transformers.RobertaForSequenceClassification, transformers.RobertaConfig, (1024, 24, 16, 4096), 16, 292),
    ],
)
def test_full_size_files_have_the_published_key_counts(model_class, config_class, sizes, width, keys, tmp_path):
    """Every one of them is wanted: the model without memory, the file of expanded zeros."""
    hidden, layers, heads, inner = sizes
    config = config_class(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner
    )
    with torch.device("meta"):
        model = model_class(config)
        state = files.nlu_state(config.model_type, layers, hidden, width)
    assert len(state) == keys
    tensors = {k: torch.zeros(1).expand(v.shape) for k, v in state.items()}
    path = write(tensors, tmp_path)
    adamix = {k: v for k, v in tensors.items() if "ExpertSoup" in k}
    for key in (next(iter(adamix)), list(adamix)[-1], list(tensors)[-1]):
        with pytest.raises(ValueError, match=f"missing keys {key};"):
            load_official(model, write({k: v for k, v in tensors.items() if k != key}, tmp_path, "less.bin"))
    load_official(model, path)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)
    assert trained == {146: 2_223_360, 292: 1_992_192}[keys]


def picture(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        {k: type(m) for k, m in model.named_modules()},
        {k: p.requires_grad for k, p in model.named_parameters()},
    )


def refused(model, path, message):
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        load_official(model, path)
    after = picture(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())


STEM = "bert.encoder.layer.1.output.ExpertSoup"
FLAWS = {
    "expert weight": (f"{STEM}.MoA_A.deepspeed_experts.2.weight", None, "missing keys {key};"),
    "expert bias": (f"{STEM}.MoA_B.deepspeed_experts.0.bias", None, "missing keys {key};"),
    "scores": (f"{STEM}.MoA_A.expert_score_weight", None, "missing keys {key};"),
    "head": ("classifier.bias", None, "missing keys {key};"),
    "expert shape": (f"{STEM}.MoA_A.deepspeed_experts.2.weight", (R, H + 1), "{key}: got shape"),
    "score shape": (f"{STEM}.MoA_A.expert_score_weight", (5,), "{key}: got shape"),
    "head shape": ("classifier.bias", (3,), "{key}: got shape"),
    "another layer": (f"{STEM.replace('1', '7')}.MoA_A.deepspeed_experts.2.weight", (R, H), "unexpected keys {key}"),
    "unknown key": ("bert.encoder.novel", (2,), "unexpected keys {key}"),
    "unknown part": (f"{STEM}.MoA_C.expert_score_weight", (2,), "unexpected keys {key}"),
    "base shape": ("bert.embeddings.word_embeddings.weight", (3, H), "{key}: got shape"),
}


@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("bare", [True, False])
def test_flawed_keys_are_named_and_nothing_changes(flaw, bare, tmp_path):
    key, shape, message = FLAWS[flaw]
    state = files.nlu_state("bert", L, H, R)
    if shape is None:
        del state[key]
    else:
        state[key] = torch.zeros(shape)
    model = tiny.tiny_bert() if bare else adapt(tiny.tiny_bert(), AdaMixConfig(bottleneck=R))
    refused(model, write(state, tmp_path), message.format(key=key))


def test_gpt2_flaws_are_named(tmp_path):
    stem = "transformer.h.0.attn.c_attn"
    for key, shape, message in (
        (f"{stem}.experts_lora_A.1", None, f"missing keys {stem}.experts_lora_A.1;"),
        (f"{stem}.experts_lora_B.0", (H, 4), f"{stem}.experts_lora_B.0: got shape"),
        (f"{stem}.weight", (H, H), f"{stem}.weight: got shape"),
        ("transformer.h.9.mlp.c_fc.weight", (H, H), "unexpected keys transformer.h.9.mlp.c_fc.weight"),
    ):
        wrapped = files.nlg_lora_state(L, H, 4)
        state = wrapped["model_state_dict"]
        if shape is None:
            del state[f"module.{key}"]
        else:
            state[f"module.{key}"] = torch.zeros(shape)
        refused(tiny.tiny_gpt2(), write(wrapped, tmp_path), message)


def test_wrong_models_are_refused(tmp_path):
    path = write(files.nlu_state("bert", L, H, R), tmp_path)
    refused(tiny.tiny_roberta(), path, "model_type 'roberta', expected 'bert'")
    refused(adapt(tiny.tiny_bert(), AdaMixConfig(bottleneck=R + 1)), path, "bottleneck: got 6")
    refused(adapt(tiny.tiny_bert(), AdaMixConfig(bottleneck=R, num_experts=2)), path, "num_experts: got 2")
    refused(adapt(tiny.tiny_bert(), AdaMixConfig(bottleneck=R, activation="relu")), path, "activation: got 'relu'")
    refused(merge(adapt(tiny.tiny_bert(), AdaMixConfig(bottleneck=R))), path, "merged model")
    lora = adapt(tiny.tiny_gpt2(), AdaMixConfig(method="lora", r=4, alpha=16.0))
    refused(lora, write(files.nlg_lora_state(L, H, 4), tmp_path), "alpha: got 16.0")


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classifier.weight": Malicious()}, "holds more than tensors and is refused"),
        ({"classifier.weight": "text"}, "got a str, expected a tensor"),
        ([torch.ones(1)], "got a list"),
        ({"classifier.weight": torch.ones(1)}, "no kind"),
        ({**files.nlu_state("bert", 1, 8, 2), **files.nlu_state("roberta", 1, 8, 2)}, "'bert'.*'roberta'"),
        (files.nlu_state("bert", 1, 8, 2, down=3, up=2), "3 experts on side A and 2 on side B"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    refused(tiny.tiny_bert(), write(content, tmp_path), message)


def test_unreadable_files_are_refused(tmp_path):
    refused(tiny.tiny_bert(), tmp_path / "none.bin", "which is no file")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Malicious(), protocol=2))
    refused(tiny.tiny_bert(), tmp_path / "raw.bin", "refused|cannot read")
    path = write(files.nlu_state("bert", L, H, R), tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(tiny.tiny_bert(), path, "cannot read")


@pytest.mark.parametrize("family", NLU)
def test_one_label_of_roberta_is_clipped_in_evaluation_as_released(family, tmp_path):
    """STS-B: torch.clip(logits, min=0) after the losses, in RoBERTa alone; neither training nor a loss sees it."""
    state = files.nlu_state(family, L, H, R, labels=1)
    base = NLU[family](num_labels=1)
    raw = logits(published_nlu(base, family, state))
    state = {k: v - raw.mean() if k in ("classifier.bias", "classifier.out_proj.bias") else v for k, v in state.items()}
    raw = logits(published_nlu(base, family, state))
    assert (raw < 0).any()
    assert (raw > 0).any()
    want = raw.clamp(min=0) if family == "roberta" else raw
    model = load_official(copy.deepcopy(base), write(state, tmp_path)).eval()
    batch = tiny.batch_for(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), merge(copy.deepcopy(model))):
        torch.testing.assert_close(logits(other), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        loss, clipped, *_ = model(**batch, return_dict=False)
        torch.testing.assert_close(clipped, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, F.mse_loss(raw[:, 0], batch["labels"]), rtol=1e-5, atol=1e-5)
        (clipped,) = model(**{k: v for k, v in batch.items() if k != "labels"}, return_dict=False)
        torch.testing.assert_close(clipped, want, rtol=1e-5, atol=1e-5)
        assert (model.train()(**batch).logits < 0).any()
    # Another head, or two labels: nothing is clipped. Loading twice clips once.
    fresh = load_official(copy.deepcopy(base), write(state, tmp_path), head=False)
    hooks = len(fresh._forward_hooks)  # those of any adapted model
    assert hooks == len(adapt(copy.deepcopy(base))._forward_hooks)
    again = load_official(model.eval(), write(state, tmp_path))
    assert len(again._forward_hooks) - hooks == (family == "roberta")


def test_clip_predictions_by_hand():
    model = clip_predictions(adapt(tiny.tiny_roberta(num_labels=1)).eval(), 0.25)
    assert logits(model).min() == 0.25 or logits(model).min() > 0.25
    assert logits(clip_predictions(model, 9.0)).unique().item() == 9.0
