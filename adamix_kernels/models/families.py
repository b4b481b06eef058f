"""The layers that AdaMix adapts by default, by model_type."""

from __future__ import annotations

Rule = str | tuple[str, ...]

# The output of the feed-forward block, before its residual connection and LayerNorm. BERT's pattern is a
# full path because attention.output.dense ends in the same words.
_BERT_FFN = r"(.*\.)?layer\.\d+\.output\.dense"
_LLAMA_FFN = r"(.*\.)?layers\.\d+\.mlp\.down_proj"
_LLAMAS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3",
)  # fmt: skip
ADAPTER_TARGETS: dict[str, Rule] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "ernie", "mpnet"), _BERT_FFN
    ),
    "distilbert": ("ffn.lin2",),
    "albert": ("ffn_output",),
    "modernbert": ("mlp.Wo",),
    "gpt2": ("mlp.c_proj",),
    "gpt_neo": ("mlp.c_proj",),
    "gptj": ("mlp.fc_out",),
    **dict.fromkeys(("t5", "mt5"), ("DenseReluDense.wo",)),
    **dict.fromkeys(("bart", "opt", "whisper"), ("fc2",)),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon"), ("mlp.dense_4h_to_h",)),
    # transformers 5 and 4.57.
    "vit": r"(.*\.)?(layers\.\d+\.mlp\.fc2|layer\.\d+\.output\.dense)",
    **dict.fromkeys(_LLAMAS, _LLAMA_FFN),
}
LORA_TARGETS: dict[str, Rule] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "albert"), ("query", "value")),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("attn.q", "attn.v"),
    "modernbert": ("attn.Wqkv",),
    "gpt2": ("c_attn",),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon"), ("query_key_value",)),
    "phi3": ("qkv_proj",),
    "vit": r"(.*\.)?attention\.(q_proj|v_proj|attention\.(query|value))",
    **dict.fromkeys(
        (*(kind for kind in _LLAMAS if kind != "phi3"), "mixtral", "bart", "opt", "gpt_neo", "gptj", "whisper"),
        ("q_proj", "v_proj"),
    ),
}
# Layers that are given [S, B, H], tokens before samples; what stands behind them (heads) is not.
_LONGFORMER = r"(.*\.)?(query|key|value)(_global)?"
TOKENS_FIRST: dict[str, str] = {
    "xlnet": r"(.*\.)?ff\.layer_[12]",
    "fsmt": r"(.*\.)?layers\.\d+\..*",
    "longformer": _LONGFORMER,
    "led": _LONGFORMER,
}
# A mixture's own expert, which is given the tokens that chose it, of all samples.
GATHERED = r"(.*\.)?experts\.\w*\d+\..*"
