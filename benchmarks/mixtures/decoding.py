"""One token through a 24-layer model with gates, and through its base."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from adamix_kernels import AdaMixConfig, adapt
from adamix_kernels.modules import _mixture
from adamix_kernels.routing import linear

from ..measure import record
from ..measure.harness import time_paired
from .counted import calls_of

LAYERS, PROMPT, VOCABULARY = 24, 16, 128
# Shapes by which the bytes of a decoded token are counted: BERT-large's, Llama-2-7B's.
DEPTHS = {"24 x 1024": (24, 1024, 4096), "32 x 4096": (32, 4096, 11008)}


def shape_of(width: int) -> str:
    return f"{LAYERS} layers, width {width}, 1 token"


def decoder(
    gated: AdaMixConfig | None, width: int, *, device: torch.device | str = "cpu", backend: str = "auto",
) -> nn.Module:  # fmt: skip
    """A 24-layer Llama of that width in float32, bare or with gates and experts that do something."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=LAYERS,
        num_attention_heads=width // 32, num_key_value_heads=width // 32,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    if gated is not None:
        model = adapt(model, gated, backend=backend)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() == 3:
                nn.init.normal_(parameter.data, std=0.02)
    return model.eval()


def configurations() -> dict[str, AdaMixConfig]:
    return {
        "LoRAMoE": AdaMixConfig.lora_moe(),
        "MoLA top-2": AdaMixConfig.mola(experts_pattern=None),
        "HydraLoRA": AdaMixConfig.hydra_lora(num_experts=8),
    }


def prompt(device: torch.device | str = "cpu") -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (1, PROMPT), generator=draw).to(device)


def step_of(model: nn.Module, ids: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """A call that decodes one token behind ids, again and again: its logits."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    def step(_k: int) -> torch.Tensor:
        with torch.no_grad():
            out = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            cache.crop(-1)
        logits: torch.Tensor = out.logits
        return logits

    return step


def _steps(width: int) -> dict[str, Callable[[int], Any]]:
    models = {"base": decoder(None, width), **{name: decoder(c, width) for name, c in configurations().items()}}
    ids = prompt()
    return {name: step_of(model, ids) for name, model in models.items()}


def count_decoding(width: int) -> list[record.Row]:
    """The rows of measure_decoding that hold calls: nothing is timed."""
    return [row for rows in _counts(_steps(width), shape_of(width)).values() for row in rows]


def _counts(steps: dict[str, Callable[[int], Any]], shape: str) -> dict[str, list[record.Row]]:
    made = {}
    for name, step in steps.items():
        with as_where_kernels_serve():
            fused = calls_of(lambda step=step: step(0))
        plain = calls_of(lambda step=step: step(0))
        made[name] = [
            record.row("decode", name, shape, "float32", "calls", "", plain),
            record.row("decode", name, shape, "float32", "calls, kernels", "", fused),
        ]
    return made


@contextlib.contextmanager
def as_where_kernels_serve() -> Iterator[None]:
    """Routers are ops, and one with their LoRAs where they can be, as on a GPU; the reference computes them."""
    with (
        mock.patch.object(linear, "by_kernel", return_value=True),
        mock.patch.object(_mixture, "by_kernel", return_value=True),
    ):
        yield


def measure_decoding(width: int, rounds: int | None, seconds: float) -> list[record.Row]:
    """One token behind a prompt of 16: calls, time against the base; bytes at the sizes of DEPTHS."""
    steps = _steps(width)
    timing = time_paired(steps, [], rounds=rounds, seconds=seconds)
    shape, made = shape_of(width), []
    counts = _counts(steps, shape)
    for name in steps:
        made += counts[name]
        made.append(
            record.row("decode", name, shape, "float32", "ratio_p50 to base", "", timing.ratio(name, "base").p50)
        )
    for size, (layers, hidden, inner) in DEPTHS.items():
        base = layers * (4 * hidden * hidden + 3 * hidden * inner)
        for name, config in configurations().items():
            m, r, downs = config.num_experts, config.r, 1 if config.share == "down" else config.num_experts
            banks = downs * r * hidden + m * r * hidden + m * hidden  # A, B and the router, of q and of v
            ratio = (base + 2 * layers * banks) / base
            made.append(record.row("decode", name, size, "bfloat16", "weight bytes to base", "", ratio))
    return made
