"""Tiny models of twelve families beyond the five of tiny.py, from their configurations with random weights."""

import tiny
import torch
import transformers as tr

from adamix_kernels import AdaMixConfig, adapt

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
ENCODERS = ("modernbert", "albert", "mpnet", "vit")


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
