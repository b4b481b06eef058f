"""What the compared training steps are called; apart from contenders.py, which needs transformers."""

from __future__ import annotations

ADAMIX = "adamix"
ONE_EXPERT = "one_expert"
PLAIN = "plain_adapter"
ORIGINAL = "original"
LORA = "peft_lora"
TITLES = {
    ADAMIX: "AdaMix, doubled batch",
    ONE_EXPERT: "AdaMix with M = 1, same tokens",
    PLAIN: "one plain adapter (nn.Linear), same tokens",
    ORIGINAL: "the published way: two passes, module list, .item()",
    LORA: "PEFT LoRA on query and value, same tokens",
}
