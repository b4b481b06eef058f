"""Layers that are given no [B, S, H]: OPT's take rows [B * S, H], XLNet's [S, B, H], a mixture's mixed tokens."""

import pytest
import torch
import transformers as tr
from tiny import batch_for
from tiny_training import trainer_for
from torch._dynamo.testing import CompileCounter

from adamix_kernels import AdaMixConfig, PackJob, PackTrainer, adapt, pack, save_adamix, use_experts
from adamix_kernels.models.prefix import both_passes
from adamix_kernels.routing import Router

SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder")
         for what, n in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()}  # fmt: skip
STILL = {name: 0.0 for name in ("dropout", "attention_dropout", "activation_dropout")}
MODELS = {
    "opt": (tr.OPTForCausalLM, lambda: tr.OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=40, dropout=0.0, attention_dropout=0.0)),
    "xlnet": (tr.XLNetLMHeadModel, lambda: tr.XLNetConfig(
        vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64, dropout=0.0)),
    "fsmt": (tr.FSMTForConditionalGeneration, lambda: tr.FSMTConfig(
        langs=["en", "de"], src_vocab_size=64, tgt_vocab_size=64, d_model=32, max_position_embeddings=40, init_std=0.3,
        **SIDES, **STILL)),
    "longformer": (tr.LongformerForSequenceClassification, lambda: tr.LongformerConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40, attention_window=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=0, initializer_range=0.3)),
    "switch": (tr.SwitchTransformersForConditionalGeneration, lambda: tr.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=2,
        num_sparse_decoder_layers=1, num_heads=4, num_experts=2, dropout_rate=0.0, router_jitter_noise=0.0)),
}  # fmt: skip
LAYERS = {
    "opt": ("fc2", "fc1"), "xlnet": ("ff.layer_2", "ff.layer_1"), "fsmt": ("fc2", "q_proj"),
    "longformer": ("query", "value"), "switch": ("wo", "wo"),
}  # fmt: skip
TURNED = ("opt", "xlnet", "fsmt", "longformer")
EXPERTS = [2, 0, 1, 0]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def bare(kind):
    torch.manual_seed(1)
    model_class, config = MODELS[kind]
    return model_class(config()).eval()


def adapted(kind, method="adapter", **options):
    target = LAYERS[kind][method == "lora"]
    fields = dict(method=method, num_experts=3, share=None, r=4, alpha=8.0, bottleneck=4, target_modules=[target])
    model = adapt(bare(kind), AdaMixConfig(**{**fields, **options}))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "classifier" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def inputs_of(model, tokens=6, rows=4):
    batch = {k: v for k, v in batch_for(model, rows, tokens).items() if k != "labels"}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)
    return batch


def alone(model, batch, experts):
    """Each sample's logits in a forward of its own."""
    found = []
    for row, expert in enumerate(experts):
        with use_experts(model, expert):
            found.append(model(**{name: value[row : row + 1] for name, value in batch.items()}).logits)
    return torch.cat(found)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["adapter", "lora"])
@pytest.mark.parametrize("kind", TURNED)
def test_each_sample_of_a_mixed_batch_is_as_when_run_alone(kind, method, training):
    model = adapted(kind, method).train(training)
    for tokens in (2, 8):  # half as many as samples, and twice
        batch = inputs_of(model, tokens)
        with torch.no_grad():
            with use_experts(model, EXPERTS):
                mixed = model(**batch).logits
            torch.testing.assert_close(mixed, alone(model, batch, EXPERTS), **CLOSE)
            other = alone(model, batch, [(expert + 1) % 3 for expert in EXPERTS])
            assert ((other - mixed).flatten(1).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("kind", ["opt", "xlnet"])
def test_experts_of_each_token(kind):
    model = adapted(kind, layers_to_transform=[1])
    batch = inputs_of(model, 8)
    index = torch.randint(3, (4, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        with use_experts(model, index):
            mixed = model(**batch).logits
        for expert in range(3):
            with use_experts(model, expert):
                torch.testing.assert_close(mixed[index == expert], model(**batch).logits[index == expert], **CLOSE)


def drawn_by(model, batch, rows):
    """Of each of `rows`: which of the three experts, for the whole sample, gives its logits in training."""
    model.train()
    with torch.no_grad():
        torch.manual_seed(5)
        got = model(**batch).logits
        every = []
        for expert in range(3):
            with use_experts(model, expert):
                every.append(model(**batch).logits)
    near = [[torch.allclose(one[row], got[row], **CLOSE) for one in every] for row in range(rows)]
    assert all(any(row) for row in near)
    return [row.index(True) for row in near]


@pytest.mark.parametrize("kind", ["opt", "xlnet"])
def test_a_draw_of_a_sample_is_for_all_its_tokens(kind):
    """And one of a pass for its half of the samples: one adapted layer, whose shared side leaves one draw."""
    model = adapted(kind, routing="sample", share="up", layers_to_transform=[1])
    assert len(set(drawn_by(model, inputs_of(model, 6, 8), 8))) > 1
    model = adapted(kind, routing="batch", share="up", layers_to_transform=[1])
    seen = set()
    for _ in range(4):
        model.adamix.router.rank = len(seen)
        chosen = drawn_by(model, inputs_of(model, 6), 4)
        assert chosen[0] == chosen[1]
        assert chosen[2] == chosen[3]
        seen.add((chosen[0], chosen[2]))
    odd = inputs_of(model, 6, 3)  # one pass, though its 18 rows of OPT could be halved
    assert len(set(drawn_by(model, odd, 3))) == 1


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_what_is_recomputed_draws_the_same(options):
    grads = []
    for recomputed in (False, True):
        model = adapted("opt", routing="sample").train()
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        torch.manual_seed(5)
        model(**batch_for(model, 4, 6)).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)


def test_both_passes_differ_in_a_training_of_xlnet(tmp_path):
    model = adapted("xlnet").train()
    trainer = trainer_for(model, tmp_path)
    assert trainer.compute_loss(model, batch_for(model, 4, 6)).isfinite()
    assert float(trainer._component_sums[1]) > 1e-4  # the consistency


def test_blocks_that_give_tokens_first_are_not_shared():
    """Their first axis is not the samples', and was doubled where it was as long as they are many."""
    model = adapted("xlnet", routing="token", layers_to_transform=[1]).train()
    batch = inputs_of(model, 4)
    assert both_passes(model, batch).logits.shape == (8, 4, 64)
    model.adamix.router.level, model.adamix.router.passes = "batch", 2
    with torch.no_grad():
        torch.manual_seed(3)
        got = both_passes(model, batch).logits
        torch.manual_seed(3)
        want = model(**{name: torch.cat([value, value]) for name, value in batch.items()}).logits
    torch.testing.assert_close(got, want, **CLOSE)


def test_gates_count_no_padding_of_layers_that_are_given_tokens_first():
    model = adapted("xlnet", routing="learned", share="up").train()
    batch = inputs_of(model, 6)
    batch["attention_mask"][1:, 4:] = 0
    means = []
    for word in (7, 9):
        batch["input_ids"][1:, 4:] = word
        for gate in (m for m in model.modules() if hasattr(m, "mean_gates")):
            gate.batches.zero_()
        with torch.no_grad():
            model(**batch)
        means.append([m.mean_gates.clone() for m in model.modules() if hasattr(m, "mean_gates")])
    for first, second in zip(*means, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["opt", "xlnet"])
def test_names_of_a_pack(kind, tmp_path):
    folders, want = {}, {}
    batch = inputs_of(bare(kind), 8)
    for seed, name in enumerate(("leases", "patents")):
        model = adapted(kind, num_experts=1)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(seed + 0.1)
            want[name] = model(**batch).logits
        folders[name] = save_adamix(model, tmp_path / name)
    served = pack(bare(kind), folders)
    names = ["patents", "leases", "leases", "patents"]
    with torch.no_grad(), use_experts(served, names):
        got = served(**batch).logits
    torch.testing.assert_close(got, torch.stack([want[n][row] for row, n in enumerate(names)]), **CLOSE)


def test_names_are_not_trained_together_there():
    config = AdaMixConfig(bottleneck=2, target_modules=["ff.layer_2"])
    with pytest.raises(ValueError, match=r"leases: transformer.layer.0.ff.layer_2: got a layer that is given tokens"):
        PackTrainer(bare("xlnet"), {"leases": PackJob(config)})


def test_a_mixture_s_own_experts_take_no_experts_of_a_pass_or_a_sample(tmp_path):
    for routing in ("batch", "sample"):
        model = adapted("switch", routing=routing).train()
        assert any("experts.expert_0.wo" in path for path in model.adamix.paths)
        with pytest.raises(ValueError, match=rf"routing: got '{routing}' for 'encoder.block.*experts.expert_0.wo'"):
            trainer_for(model, tmp_path)
        with pytest.raises(ValueError, match="got experts of a pass or a sample for 'encoder"):
            model(**inputs_of(model))
    with use_experts(model.eval(), EXPERTS), pytest.raises(ValueError, match="got experts of a pass or a sample"):
        model(**inputs_of(model))
    with use_experts(model, 1):
        assert model(**inputs_of(model)).logits.isfinite().all()
    model = adapted("switch", routing="token")
    trainer_for(model, tmp_path)
    assert model.train()(**inputs_of(model)).logits.isfinite().all()


def test_a_sample_of_several_rows():
    """Multiple choice: [B, C, S] are B * C rows of a layer, each sample's side by side, in either pass."""
    router = Router(passes=2)
    router.experts = torch.tensor([0, 1, 2])
    cpu = torch.device("cpu")
    router.samples.begin(torch.empty(3))
    assert router.draw(3, 6, 4, cpu, True).tolist() == [0, 0, 1, 1, 2, 2]
    router.tasks = torch.tensor([4, 5, 6])
    assert router.tasks_of(3, True) is router.tasks_of(6, False) is router.tasks
    assert router.tasks_of(6, True).tolist() == [4, 4, 5, 5, 6, 6]
    router.samples.begin(torch.empty(6))
    assert router.draw(3, 12, 4, cpu, True).tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert router.tasks_of(12, True).tolist() == [4, 4, 5, 5, 6, 6] * 2
    router.samples.end()
    assert router.draw(3, 6, 4, cpu, True).tolist() == [0, 1, 2, 0, 1, 2]


def test_a_compiled_forward_knows_the_samples_of_any_batch():
    torch._dynamo.reset()
    model = adapted("opt").train()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for experts in ([1, 0], [2, 0, 1, 0], [0, 1, 2, 2, 1, 0]):
        batch = inputs_of(model, 6, len(experts))
        with torch.no_grad(), use_experts(model, experts):
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, **CLOSE)
    assert counter.frame_count == 2  # for the first size, then for every size
