"""Families beyond the five of tiny.py: default targets, a training step, merging, checkpoints, in-place additions."""

import peft
import pytest
import tiny
import torch
import transformers as tr
from tiny_training import rows_of, trainer_for

from adamix_kernels import (
    AdaMixConfig,
    adamix_loss,
    adapt,
    double_batch,
    load_adamix,
    merge,
    save_adamix,
)
from adamix_kernels.convert import export_peft
from adamix_kernels.models.families import ADAPTER_TARGETS

TEXT = dict(
    vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
WIDE = dict(**TEXT, intermediate_size=64)
IMAGE = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
)
WHISPER = dict(
    vocab_size=tiny.VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=8,
    max_target_positions=16, bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1,
    suppress_tokens=None, begin_suppress_tokens=None,
)  # fmt: skip
SMALL = dict(vocab_size=tiny.VOCAB, hidden_size=32, bos_token_id=1, eos_token_id=2, pad_token_id=0)

# The model, its configuration's class and fields, and how many layers "adapter" and "lora" adapt.
FAMILIES = {
    "modernbert": (
        tr.ModernBertForSequenceClassification, tr.ModernBertConfig,
        dict(**WIDE, local_attention=8, cls_token_id=1, sep_token_id=2, reference_compile=False), 2, 2,
    ),
    "albert": (  # one layer, which runs twice
        tr.AlbertForSequenceClassification, tr.AlbertConfig,
        dict(**WIDE, embedding_size=16, classifier_dropout_prob=0.0), 1, 2,
    ),
    "mpnet": (tr.MPNetForSequenceClassification, tr.MPNetConfig, WIDE, 2, 4),
    "gemma3_text": (tr.Gemma3ForCausalLM, tr.Gemma3TextConfig, dict(**WIDE, head_dim=8, num_key_value_heads=2), 2, 4),
    "phi3": (tr.Phi3ForCausalLM, tr.Phi3Config, dict(**WIDE, num_key_value_heads=2), 2, 2),
    "bloom": (tr.BloomForCausalLM, tr.BloomConfig, dict(**SMALL, n_layer=2, n_head=4), 2, 2),
    "gpt_neo": (
        tr.GPTNeoForCausalLM, tr.GPTNeoConfig,
        dict(**SMALL, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], intermediate_size=64,
             max_position_embeddings=40), 2, 4,
    ),
    "gptj": (
        tr.GPTJForCausalLM, tr.GPTJConfig,
        dict(vocab_size=tiny.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=40, rotary_dim=4, bos_token_id=1,
             eos_token_id=2), 2, 4,
    ),
    "falcon": (tr.FalconForCausalLM, tr.FalconConfig, dict(**SMALL, num_hidden_layers=2, num_attention_heads=4), 2, 2),
    "mixtral": (
        tr.MixtralForCausalLM, tr.MixtralConfig, dict(**WIDE, num_key_value_heads=2, num_local_experts=2), None, 4,
    ),
    "vit": (tr.ViTForImageClassification, tr.ViTConfig, IMAGE, 2, 4),
    "whisper": (tr.WhisperForConditionalGeneration, tr.WhisperConfig, WHISPER, 4, 12),
}  # fmt: skip
METHODS = [
    (kind, method) for kind in FAMILIES for method in ("adapter", "lora") if FAMILIES[kind][3] or method == "lora"
]
ENCODERS = ("modernbert", "albert", "mpnet", "vit")
TRAINED_BY_TRAINER = [kind for kind in FAMILIES if kind not in ("mixtral",)]


def build(kind):
    model_class, config_class, fields, *_ = FAMILIES[kind]
    torch.manual_seed(1)
    config = config_class(**fields)
    for name in list(config.to_dict()):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    return model_class(config).eval()


def batch_for(kind, rows=4):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny.VOCAB, (rows, 8), generator=generator)
    if kind == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator), "labels": torch.arange(rows) % 2}
    if kind == "whisper":
        return {"input_features": torch.randn(rows, 8, 16, generator=generator), "labels": ids}
    labels = torch.arange(rows) % 2 if kind in ("modernbert", "albert", "mpnet") else ids.clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def adapted(kind, method="adapter", **options):
    config = AdaMixConfig(**{**dict(method=method, bottleneck=4, num_experts=2, r=2, alpha=4.0), **options})
    return adapt(build(kind), config)


def spread(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def logits(model, kind):
    batch = batch_for(kind)
    if kind == "whisper":
        batch["decoder_input_ids"] = batch.pop("labels")
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_a_step_merging_and_a_checkpoint(kind, method, tmp_path):
    model = adapted(kind, method)
    assert len(model.adamix.paths) == FAMILIES[kind][3 if method == "adapter" else 4]
    batch = batch_for(kind)
    labels = batch.pop("labels")
    if kind == "whisper":
        batch["decoder_input_ids"] = labels
    options = {} if kind in ENCODERS else {"use_cache": False}
    out = model.train()(**double_batch(batch), **options).logits
    adamix_loss(out, labels).loss.backward()
    banks = [
        p for n, p in model.named_parameters() if p.requires_grad and any(n.startswith(q) for q in model.adamix.paths)
    ]
    assert all(p.grad is not None for p in banks)
    assert sum(p.grad.abs().sum() for p in banks) > 0
    spread(model)
    want = logits(model, kind)
    assert not torch.allclose(want, logits(build(kind), kind), atol=1e-3)
    save_adamix(model, tmp_path)
    assert torch.equal(logits(load_adamix(build(kind), tmp_path).eval(), kind), want)
    torch.testing.assert_close(logits(merge(model), kind), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TRAINED_BY_TRAINER)
def test_the_trainer_takes_it(kind, tmp_path):
    model = adapted(kind)
    trainer = trainer_for(model, tmp_path, rows_of(batch_for(kind, 8)), per_device_train_batch_size=4)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "cross_entropy" in log]
    assert len(logs) == 2
    assert all(torch.isfinite(torch.tensor([log["loss"], log["consistency"]])).all() for log in logs)


def test_mixtral_has_no_default_for_adapters_and_says_what_it_has():
    with pytest.raises(ValueError, match=r"'mixtral', which has no default for method 'adapter'.*q_proj, k_proj, v_pr"):
        adapted("mixtral")


@pytest.mark.parametrize("kind", ["whisper", "vit"])
def test_peft_loads_what_reads_no_text(kind, tmp_path):
    """Its classes for tasks pass on input_ids alone: task_type must be None."""
    model = spread(adapted(kind, "lora", task_type="SEQ_2_SEQ_LM" if kind == "whisper" else None))
    want = logits(model, kind)
    export_peft(model, tmp_path)
    other = peft.PeftModel.from_pretrained(build(kind), tmp_path).eval()
    assert other.peft_config["default"].task_type is None
    torch.testing.assert_close(logits(other, kind), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_falcon_adds_in_place(method, routing):
    """mlp_output += attention_output, right behind the adapted layer."""
    model = adapted("falcon", method, routing=routing, target_modules=["mlp.dense_4h_to_h"]).train()
    batch = batch_for("falcon")
    batch["labels"] = double_batch(batch["labels"])
    model(**double_batch({k: v for k, v in batch.items() if k != "labels"}), labels=batch["labels"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_every_adapter_default_is_tried_somewhere():
    others = set(ADAPTER_TARGETS) - set(FAMILIES)
    assert others == {
        "bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "ernie", "distilbert",
        "gpt2", "t5", "mt5", "bart", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2",
        "olmo2", "smollm3",
    }  # fmt: skip
