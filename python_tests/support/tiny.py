"""Tiny random Hugging Face models and batches for the tests."""

import torch
import transformers

HIDDEN, LAYERS, HEADS, VOCAB = 32, 2, 4, 64


def _build(model_class, config):
    torch.manual_seed(1)
    return model_class(config).eval()


def _encoder(config_class, model_class, num_labels, options):
    dropout = options.pop("dropout", 0.0)
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=num_labels,
        pad_token_id=0,
        **options,
    )
    return _build(model_class, config)


def tiny_bert(num_labels=2, model_class=None, **options):
    model_class = model_class or transformers.BertForSequenceClassification
    return _encoder(transformers.BertConfig, model_class, num_labels, options)


def tiny_roberta(num_labels=2, model_class=None, **options):
    model_class = model_class or transformers.RobertaForSequenceClassification
    return _encoder(transformers.RobertaConfig, model_class, num_labels, options)


def _gpt2_config(options):
    dropout = options.pop("dropout", 0.0)
    return transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=40,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )


def tiny_gpt2(**options):
    return _build(transformers.GPT2LMHeadModel, _gpt2_config(options))


def tiny_gpt2_classifier(num_labels=2, **options):
    return _build(transformers.GPT2ForSequenceClassification, _gpt2_config({"num_labels": num_labels, **options}))


def tiny_t5(**options):
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=2 * HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        dropout_rate=options.pop("dropout", 0.0),
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        **options,
    )
    return _build(transformers.T5ForConditionalGeneration, config)


def tiny_llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=options.pop("num_hidden_layers", LAYERS),
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=40,
        pad_token_id=0,
        attention_dropout=options.pop("dropout", 0.0),
        **options,
    )
    return _build(transformers.LlamaForCausalLM, config)


def batch_for(model, batch=4, tokens=8, seed=0):
    """Inputs with labels: classes [B], regression targets [B], or token ids [B, S] for language models."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    name = type(model).__name__
    if "SequenceClassification" in name:
        classes = model.config.num_labels
        if classes == 1:
            inputs["labels"] = torch.rand(batch, generator=generator)
        else:
            inputs["labels"] = torch.randint(classes, (batch,), generator=generator)
    elif "TokenClassification" in name:
        inputs["labels"] = torch.randint(model.config.num_labels, (batch, tokens), generator=generator)
    else:
        inputs["labels"] = ids.clone()
    return inputs
