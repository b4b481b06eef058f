"""adapt, merge, unmerge and the contexts on real (tiny) Transformers models."""

import copy
import pickle

import pytest
import torch
from tiny import batch_for, tiny_bert, tiny_gpt2, tiny_gpt2_classifier, tiny_llama, tiny_roberta, tiny_t5
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from adamix_kernels import (
    AdaMixConfig,
    adapt,
    disable,
    double_batch,
    eval_routing,
    learn_merging,
    merge,
    print_trainable_parameters,
    unmerge,
    use_experts,
)
from adamix_kernels.models import families, targets

MODELS = {"bert": tiny_bert, "roberta": tiny_roberta, "gpt2": tiny_gpt2, "t5": tiny_t5, "llama": tiny_llama}


def adapted(build=tiny_bert, randomise=True, **options):
    options.setdefault("bottleneck", 4)
    model = adapt(build(), AdaMixConfig(**options)).eval()
    if randomise:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("method", ["adapter", "lora"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_placement_training_and_merging(kind, method):
    build = MODELS[kind]
    model = adapted(build, method=method, num_experts=3)
    suffix = {
        ("bert", "adapter"): "output.dense", ("roberta", "adapter"): "output.dense", ("gpt2", "adapter"): "mlp.c_proj",
        ("t5", "adapter"): "DenseReluDense.wo", ("llama", "adapter"): "mlp.down_proj",
        ("bert", "lora"): ("query", "value"), ("roberta", "lora"): ("query", "value"), ("gpt2", "lora"): "attn.c_attn",
        ("t5", "lora"): (".q", ".v"), ("llama", "lora"): ("q_proj", "v_proj"),
    }[kind, method]  # fmt: skip
    assert model.adamix.paths
    assert all(p.endswith(suffix) and "attention.output" not in p for p in model.adamix.paths)
    batch = batch_for(model)
    before = logits(model, batch)
    saved = copy.deepcopy(model.state_dict())

    model.train()
    model(**double_batch(batch)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    model.eval()

    assert merge(model) is model
    # In units of the largest logit: T5's is 4, the others' are below 1.
    torch.testing.assert_close(logits(model, batch), before, atol=2e-6 * max(1.0, before.abs().max().item()), rtol=1e-5)
    assert unmerge(model) is model
    now = model.state_dict()
    assert list(now) == list(saved)
    assert all(torch.equal(now[name], saved[name]) for name in saved)
    assert torch.equal(logits(model, batch), before)


def test_merged_equals_the_forward_of_averaged_experts():
    model = adapted(num_experts=4, share=None)
    batch = batch_for(model)
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        for path in averaged.adamix.paths:
            adapter = averaged.get_submodule(path).adapter
            for bank in adapter.banks():
                bank.copy_(bank.mean(0, keepdim=True).expand_as(bank))
    with use_experts(averaged, 2):
        want = logits(averaged, batch)
    torch.testing.assert_close(logits(model, batch), want, atol=1e-6, rtol=1e-5)


def test_a_merged_lora_model_is_a_plain_model():
    model = adapted(tiny_gpt2, method="lora", num_experts=3)
    plain = tiny_gpt2()
    batch = batch_for(model)
    want = logits(model, batch)
    merge(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(plain, batch), want, atol=2e-6, rtol=1e-5)


def test_parameter_counts_of_the_paper():
    config = BertConfig(num_hidden_layers=12, vocab_size=100)
    with torch.device("meta"):
        bert = BertForSequenceClassification(config)
        large = RobertaForSequenceClassification(
            RobertaConfig(num_hidden_layers=24, hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
        )
    for model, bottleneck, experts, merged in ((bert, 48, 2_223_360, 894_528), (large, 16, 1_992_192, 811_392)):
        adapt(model, AdaMixConfig(bottleneck=bottleneck, modules_to_save=[]))
        assert print_trainable_parameters(model)[0] == experts
        merge(model)
        assert print_trainable_parameters(model)[0] == merged


def test_only_banks_and_the_head_train(capsys):
    model = adapted(num_experts=3, randomise=False)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".adapter." in n or n.startswith("classifier.") for n in trainable)
    assert not any(n.endswith("_score") for n in trainable)
    count, total = print_trainable_parameters(model)
    assert f"trainable params: {count:,} || all params: {total:,}" in capsys.readouterr().out


def _two_layers(kind):
    config = AutoConfig.for_model(kind)
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
        if hasattr(config, name):
            setattr(config, name, 2)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        return AutoModel.from_config(config)


@pytest.mark.parametrize("kind", sorted(set(families.ADAPTER_TARGETS) | set(families.LORA_TARGETS)))
def test_every_default_finds_the_layers_of_its_family(kind):
    model = _two_layers(kind)
    blocks = {"bart": 4, "t5": 4, "mt5": 4, "whisper": 4}.get(kind, 2)  # encoder and decoder
    # A gated feed-forward block still has one output; fused projections are one layer instead of q and v.
    fused = kind in ("gpt2", "gpt_neox", "deberta", "modernbert", "phi3", "bloom", "falcon")
    attentions = 6 if blocks == 4 else 1 if kind == "albert" else 2  # ALBERT has one layer for all
    if kind in families.ADAPTER_TARGETS:
        assert len(targets.target_layers(model, AdaMixConfig())) == (1 if kind == "albert" else blocks)
    assert len(targets.target_layers(model, AdaMixConfig(method="lora"))) == attentions * (1 if fused else 2)


def test_targets_follow_pefts_rules():
    paths = lambda **options: adapted(randomise=False, method="lora", **options).adamix.paths  # noqa: E731
    prefix = "bert.encoder.layer."
    assert paths(target_modules=["query"]) == [f"{prefix}{i}.attention.self.query" for i in (0, 1)]
    assert paths(target_modules=["bert.encoder.layer.1.attention.self.key"]) == [f"{prefix}1.attention.self.key"]
    assert paths(target_modules=r".*\.layer\.\d+\.output\.dense") == [f"{prefix}{i}.output.dense" for i in (0, 1)]
    assert paths(layers_to_transform=1) == [f"{prefix}1.attention.self.query", f"{prefix}1.attention.self.value"]
    everything = paths(target_modules="all-linear")
    assert len(everything) == 2 * 6 + 1  # six in each layer, and the pooler
    assert not any("classifier" in p for p in everything)
    there = "query, key, value, output.dense, intermediate.dense, pooler.dense"
    with pytest.raises(ValueError, match=rf"target_modules: got \['nothing'\].*its linear layers end in: {there}"):
        paths(target_modules=["nothing"])
    with pytest.raises(ValueError, match=r"target_modules: got '.\*quer'.*nothing matches: .*\(closest: query\)"):
        paths(target_modules=".*quer")
    with pytest.raises(ValueError, match=r"target_modules: got .*LayerNorm.*expected nn.Linear"):
        paths(target_modules=["LayerNorm"])


def test_modules_to_save():
    model = adapted(modules_to_save=["pooler", "classifier"])
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert "bert.pooler.dense.weight" in trainable
    assert "classifier.weight" in trainable
    with pytest.raises(ValueError, match=r"modules_to_save: got 'pool', expected the name of .*closest: pooler"):
        adapted(modules_to_save=["pool"])


def test_a_family_without_defaults_is_answered_with_its_own_layers():
    model = tiny_llama()
    model.config.model_type = "unheard"
    there = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;"
    for method in ("adapter", "lora"):
        with pytest.raises(ValueError, match=f"got None for model_type 'unheard'.*its linear layers end in: {there}"):
            adapt(model, AdaMixConfig(method=method))
    with pytest.raises(ValueError, match="Embedding has no linear layers"):
        adapt(torch.nn.Embedding(3, 4), AdaMixConfig(target_modules=["x"]))
    assert len(adapt(model, AdaMixConfig(target_modules="all-linear")).adamix.paths) == 14


def test_a_name_that_matches_nothing_beside_others_is_told(caplog):
    model = adapted(method="lora", target_modules=["query", "vlue"])
    assert len(model.adamix.paths) == 2
    (record,) = [r for r in caplog.records if "target_modules" in r.getMessage()]
    assert "nothing is named vlue" in record.getMessage()
    assert "(closest: value)" in record.getMessage()
    caplog.clear()
    adapted(method="lora", target_modules=["query", "key"], layers_to_transform=[1], exclude_modules=["key"])
    assert not caplog.records
    assert len(adapted(layers_to_transform=[-1, 1, 7]).adamix.paths) == 1
    assert "layers_to_transform: no layer to adapt is numbered -1, 7" in caplog.text


def test_a_refused_config_changes_nothing():
    model = tiny_bert()
    before = [(n, type(m)) for n, m in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="modules_to_save"):
        adapt(model, AdaMixConfig(modules_to_save=["none"]))
    assert [(n, type(m)) for n, m in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags
    adapt(model, AdaMixConfig())
    with pytest.raises(ValueError, match="adapted already"):
        adapt(model, AdaMixConfig())


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_disable_is_the_base_model(method):
    base = tiny_bert()
    model = adapted(method=method)
    with torch.no_grad():
        model.classifier.load_state_dict(base.classifier.state_dict())
    batch = batch_for(model)
    for prepare in (lambda m: m, merge):
        prepare(model)
        before = logits(model, batch)
        with disable(model):
            assert torch.equal(logits(model, batch), logits(base, batch))
        assert torch.equal(logits(model, batch), before)
        assert not torch.equal(before, logits(base, batch))


def test_use_experts_serves_each_sample_by_its_own_expert():
    model = adapted(num_experts=3, share=None)
    batch = batch_for(model, batch=3)
    alone = []
    for m in range(3):
        with use_experts(model, m):
            alone.append(logits(model, batch)[m])
    with use_experts(model, [0, 1, 2]):
        torch.testing.assert_close(logits(model, batch), torch.stack(alone))
        per_token = torch.tensor([0, 1, 2]).unsqueeze(1).expand(3, 8)
        with use_experts(model, per_token):
            torch.testing.assert_close(logits(model, batch), torch.stack(alone))
    with (
        pytest.raises(ValueError, match="index: got ids from 0 to 3, expected 0 <= id < 3"),
        use_experts(model, [0, 3]),
    ):
        pass
    with pytest.raises(ValueError, match="use_experts index: got 2 rows for a batch of 3"), use_experts(model, [0, 1]):
        logits(model, batch)
    with pytest.raises(TypeError, match=r"index: got torch.float32"), use_experts(model, [0.5]):
        pass


def test_use_experts_in_generation_with_beams_and_cache():
    model = adapted(tiny_gpt2, method="lora", num_experts=3, share=None)
    ids = torch.randint(3, 60, (2, 4))
    options = dict(max_new_tokens=5, do_sample=False, num_beams=2, pad_token_id=0)
    with use_experts(model, [2, 0]):
        mixed = model.generate(ids, **options)
    for row, expert in ((0, 2), (1, 0)):
        with use_experts(model, expert):
            single = model.generate(ids[row : row + 1], **options)[0]
        assert torch.equal(mixed[row][: len(single)], single)


def test_evaluation_routes_at_random_only_when_asked():
    model = adapted(num_experts=4)
    batch = batch_for(model)
    merged = logits(model, batch)
    assert torch.equal(logits(model, batch), merged)
    for level in ("batch", "sample", "token"):
        with eval_routing(model, level):
            assert any(not torch.equal(logits(model, batch), merged) for _ in range(3))
    assert torch.equal(logits(model, batch), merged)
    with pytest.raises(ValueError, match="level: got 'best'"), eval_routing(model, "best"):
        pass


def test_evaluation_never_uses_a_stale_merge():
    model = adapted(num_experts=4)
    batch = batch_for(model)
    first = logits(model, batch)
    path = model.adamix.paths[0]
    with torch.no_grad():
        model.get_submodule(path).adapter.down_weight.data.add_(1.0)
    assert not torch.equal(logits(model, batch), first)


def test_learned_merging_trains_the_scores_alone_and_uses_them():
    model = adapted(num_experts=3)
    batch = batch_for(model)
    learn_merging(model).train()
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "down_score", "up_score", "weight", "bias"
    }  # fmt: skip
    torch.testing.assert_close(model(**batch).logits.detach(), logits(model.eval(), batch), atol=1e-6, rtol=1e-5)
    model.train()
    model(**batch).loss.backward()
    scores = [model.get_submodule(p).adapter.down_score for p in model.adamix.paths]
    assert all(s.grad.abs().sum() > 0 for s in scores)
    before = logits(model.eval(), batch)
    with torch.no_grad():
        scores[0][1] += 2.0
    assert not torch.equal(logits(model, batch), before)
    learn_merging(model, enable=False)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("_score"))


def test_generate_in_training_mode_warns_and_does_not_reroute(caplog):
    model = adapted(tiny_gpt2, num_experts=4)
    ids = torch.randint(3, 60, (2, 4))
    want = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.train()
    with caplog.at_level("WARNING"):
        got = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want)
    assert "training mode" in caplog.text
    assert not model.adamix.router.force_merged


def test_use_experts_refuses_training_under_activation_checkpointing():
    model = adapted(num_experts=3).train()
    model.gradient_checkpointing_enable()
    batch = batch_for(model)
    with use_experts(model, 1), pytest.raises(RuntimeError, match="use_experts: got a training forward under"):
        model(**batch)


def test_copies_and_pickles_are_independent_models():
    for build, options in ((tiny_gpt2, dict(method="lora")), (tiny_gpt2_classifier, dict(num_experts=3))):
        model = adapted(build, **options)
        batch = batch_for(model)
        want = logits(model, batch)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(twin, batch), want)
            merge(twin)
            assert not model.adamix.merged
            with eval_routing(twin, "sample") if not twin.adamix.merged else disable(twin):
                assert model.adamix.router.enabled
            if hasattr(twin, "generate"):
                assert twin.generate.model is twin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_keeps_float32_banks(dtype):
    for method in ("adapter", "lora"):
        model = adapt(tiny_bert().to(dtype), AdaMixConfig(method=method, bottleneck=4))
        layer = model.get_submodule(model.adamix.paths[0])
        banks = [p for n, p in layer.named_parameters() if not n.startswith("base.")]
        assert all(p.dtype == torch.float32 for p in banks)
        batch = batch_for(model)
        model.train()
        out = model(**double_batch({k: v for k, v in batch.items() if k != "labels"}))
        assert out.logits.dtype == dtype
        out.logits.float().sum().backward()
        assert all(p.grad is not None for p in banks if p.requires_grad)


def test_torch_compile_of_a_training_step_has_no_graph_break_and_no_recompile():
    model = adapt(tiny_bert(), AdaMixConfig(num_experts=4, bottleneck=4)).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (5, 6, 9):
            inputs = double_batch({"input_ids": torch.randint(3, 60, (batch, 7))})
            compiled(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
