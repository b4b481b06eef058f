"""What `adamix train` takes for the learning rate and the epochs where nobody says.

The rates for encoders narrower than 768 and the number of updates were searched (docs/evidence, "The defaults of adamix
train"); those of wider models lie between these and the published ones (BERT-base 4e-4, RoBERTa-large 3e-4 over 20 to
80 epochs; GPT-2 2e-4). LoRA's are lower: its scaling alpha / r is 8 by default.
"""

from __future__ import annotations

import math
from typing import Any

WARMUP, WEIGHT_DECAY, BATCH = 0.06, 0.1, 16
UPDATES, FEWEST_EPOCHS, MOST_EPOCHS = 600, 4, 60
_WIDTHS = (768, 1024)
# By kind of task and method: narrower than 768, narrower than 1024, wider.
_RATES = {
    ("labels", "adapter"): (3e-3, 1e-3, 5e-4),
    ("labels", "lora"): (1e-3, 5e-4, 2e-4),
    ("generation", "adapter"): (1e-3, 2e-4, 2e-4),
    ("generation", "lora"): (1e-3, 2e-4, 2e-4),
}


def learning_rate(config: Any, task: str, method: str) -> float:
    """By the width of a model's layers, the kind of task and the method. config: of a Transformers model."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None) or _WIDTHS[0]
    rates = _RATES["generation" if task == "generation" else "labels", method]
    return rates[sum(width >= limit for limit in _WIDTHS)]


def epochs(rows: int, rows_an_update: int) -> int:
    """About 600 updates, and 4 to 60 epochs: few texts need many epochs, as each label reaches one expert of M."""
    wanted = math.ceil(UPDATES / math.ceil(rows / rows_an_update))
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, wanted))
