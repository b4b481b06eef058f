"""Causal models whose own forward shifts no labels, and those whose loss is another: AdaMixTrainer's is the model's."""

import inspect
import re

import pytest
import tiny_recipes
import torch
import transformers
from tiny import batch_for, tiny_bert, tiny_gpt2, tiny_llama
from tiny_training import adapted, ignoring, trainer_for
from transformers.models.auto import modeling_auto as auto

from adamix_kernels.models import objectives
from adamix_kernels.tasks.generation import check_causal, encode_texts, labels_for, pair_collator, token_loss

SIZES = {"vocab_size": 64, "d_model": 32}
LAYERS = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
          {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()}  # fmt: skip
RATES = {name: 0.0 for name in ("dropout", "attention_dropout", "activation_dropout")}
CONFIGS = {
    "XLNetLMHeadModel": lambda: transformers.XLNetConfig(**SIZES, n_layer=2, n_head=4, d_inner=64, dropout=0.0),
    "BartForCausalLM": lambda: transformers.BartConfig(**SIZES, **LAYERS, **RATES, max_position_embeddings=40),
}
TARGETS = {"XLNetLMHeadModel": ["ff.layer_2"], "BartForCausalLM": ["fc2"]}


def bare(name):
    torch.manual_seed(1)
    return getattr(transformers, name)(CONFIGS[name]())


def model_of(name, **options):
    return adapted(bare(name), target_modules=TARGETS[name], **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_labels_that_the_model_does_not_shift(name, tmp_path):
    model = model_of(name, num_experts=1)
    batch = ignoring(batch_for(model, 4, 6))
    batch["labels"][:, 0] = 7  # of no weight, were the labels shifted
    trainer = trainer_for(model, tmp_path)
    loss, outputs = trainer.compute_loss(model.train(), dict(batch), return_outputs=True)
    theirs = model(**batch)
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs.logits, theirs.logits)
    with trainer._own_normalisation():
        assert trainer._get_num_items_in_batch([batch], torch.device("cpu")) == (batch["labels"] != -100).sum()


def test_both_passes_of_such_a_model(tmp_path):
    model = model_of("BartForCausalLM", consistency_weight=0.0).train()
    model.adamix.router.experts = torch.tensor(1)
    batch = ignoring(batch_for(model, 4, 6))
    plain = trainer_for(model, tmp_path).compute_loss(model, dict(batch))
    model.adamix.config = model_of("BartForCausalLM", consistency_weight=1.0).adamix.config
    model.adamix.router.passes = 2
    both = trainer_for(model, tmp_path).compute_loss(model, dict(batch))
    torch.testing.assert_close(plain, model(**batch).loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both, plain, rtol=1e-5, atol=1e-6)


def test_the_commands_shift_for_such_a_model(tmp_path):
    """Their rows have the text's ids as labels; the loss that trains is the loss per token that is told."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_recipes.write_causal(tmp_path / "gpt"))
    rows = encode_texts(["name : blue", "a"], ["a blue place", "the place is red ."], tokenizer, 12)
    model = model_of("BartForCausalLM", num_experts=1)
    collate = pair_collator(tokenizer)
    assert objectives.is_unshifted(model)
    batch = labels_for(model, collate)(rows)
    assert labels_for(tiny_gpt2(), collate) is collate
    loss = trainer_for(model, tmp_path).compute_loss(model.train(), dict(batch))
    assert float(loss.detach()) == pytest.approx(token_loss(model, rows, collate), rel=1e-5)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, lambda: bare("BartForCausalLM")])
def test_what_reads_on_from_its_past_alone(build):
    model = build().train()
    check_causal(model, "it")
    check_causal(model.bfloat16(), "it")
    assert model.training


@pytest.mark.parametrize("build", [lambda: tiny_bert(model_class=transformers.BertLMHeadModel),
                                   lambda: bare("XLNetLMHeadModel")])  # fmt: skip
def test_what_sees_its_answers(build):
    """XLNet's attention looks both ways, but for a permutation that no command gives it."""
    with pytest.raises(ValueError, match=r"model: got 'it' \((Bert|XLNet)LMHeadModel\), which sees the tokens behind"):
        check_causal(build(), "it")


def test_every_model_of_transformers_that_shifts_nothing_is_known():
    """A causal model whose loss is its own cross-entropy, and whose forward speaks of no shift."""
    found = set()
    for name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
            continue  # its labels are those of the masked tokens
        code = re.sub(r'""".*?"""', "", inspect.getsource(getattr(transformers, name).forward), flags=re.DOTALL)
        if "CrossEntropyLoss()" in code and "shift" not in code and not name.startswith(objectives._OWN_LOSS):
            found.add(name)
    assert len(found) > 10
    assert found <= objectives._UNSHIFTED


def test_a_loss_of_several_tokens_ahead_is_named():
    config = transformers.ProphetNetConfig(
        vocab_size=64, hidden_size=32, num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=40,
    )  # fmt: skip
    for name in ("ProphetNetForCausalLM", "ProphetNetForConditionalGeneration"):
        with pytest.raises(NotImplementedError, match=name):
            objectives.Objective(getattr(transformers, name)(config))
