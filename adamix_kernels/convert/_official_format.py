"""The reference project's checkpoint files: reading them safely, and what their keys say."""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models._files import as_path
from ..modules import RoutedLoRALinear

logger = logging.getLogger(__name__)

_BERT = re.compile(r"(bert|roberta)\.encoder\.layer\.\d+\.output\.ExpertSoup\.")
_GPT2 = re.compile(r"transformer\.h\.\d+\.(mlp\.ExpertSoup|attn\.c_attn)\.")
_DOWN_EXPERT = re.compile(r".*\.(?:MoA_A\.deepspeed_experts|experts_lora_A)\.(\d+)(?:\.weight|\.bias)?")
_UP_EXPERT = re.compile(r".*\.(?:MoA_B\.deepspeed_experts|experts_lora_B)\.(\d+)(?:\.weight|\.bias)?")
# Causal masks and position numbers that old models kept in their state dict, and merged factors that the
# released LoRA layer registers by accident.
_IGNORED = re.compile(r".*\.(position_ids|masked_bias|attn\.bias|lora_A_w|lora_B_w)")
_ADDED = re.compile(r".*\.ExpertSoup\..*|.*\.(experts_lora_[AB]\.\d+|lora_expert_score_weight)")


@dataclass(frozen=True)
class OfficialFacts:
    """What the keys and shapes of a file say.

    family: "bert", "roberta" or "gpt2". method: "adapter" or "lora". down, up: experts of each side.
    width: bottleneck, or LoRA rank of each of q and v.
    """

    family: str
    method: str
    down: int
    up: int
    width: int

    @property
    def num_experts(self) -> int:
        return max(self.down, self.up)

    @property
    def share(self) -> str | None:
        if self.down == self.up:
            return None
        return "up" if self.up == 1 else "down"


def read_official(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """key -> tensor: unwrapped from "model_state_dict", without "module.", without what is ignored.

    Only tensors are unpickled (weights_only), and the file's own checksums are compared, which torch.load does
    not do. A file of the format before torch 1.6 has none, and a warning says so. Raises ValueError for anything else.
    """
    path = as_path("path", path)
    if not path.is_file():
        raise ValueError(f"path: got {str(path)!r}, which is no file, expected a checkpoint of microsoft/AdaMix")
    has_sums = _check_sums(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"path: got {str(path)!r}, which holds more than tensors and is refused, because unpickling it could "
            f"run code; expected a state dict ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # a damaged pickle may make the unpickler raise anything
        raise ValueError(f"path: got {str(path)!r}, which torch.load cannot read ({error})") from error
    if not has_sums:
        logger.warning("%s has no checksums (the format before torch 1.6): damage to it cannot be noticed", path)
    if isinstance(state, dict) and isinstance(state.get("model_state_dict"), dict):
        state = state["model_state_dict"]
    if not isinstance(state, dict):
        raise ValueError(f"path: got a {type(state).__name__} in {str(path)!r}, expected a dict of tensors")
    found = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{key}: got a {type(value).__name__}, expected a tensor under a name")
        found[key.removeprefix("module.")] = value
    return {key: value for key, value in found.items() if not _IGNORED.fullmatch(key)}


def _check_sums(path: Path) -> bool:
    """Whether there are any."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError, zlib.error) as error:
        raise ValueError(f"path: got {str(path)!r}, which is no whole zip archive ({error})") from error
    if damaged is not None:
        raise ValueError(f"path: got {str(path)!r}, whose {damaged} does not have its checksum; the file is corrupt")
    return True


def read_facts(state: dict[str, torch.Tensor]) -> OfficialFacts:
    """Raises ValueError when the keys are of neither family, or of more than one."""
    kinds = set()
    for key in filter(is_added, state):
        bert, gpt2 = _BERT.match(key), _GPT2.match(key)
        if bert:
            kinds.add((bert.group(1), "adapter"))
        elif gpt2:
            kinds.add(("gpt2", "lora" if gpt2.group(1) == "attn.c_attn" else "adapter"))
    if len(kinds) != 1:
        raise ValueError(
            f"path: got a checkpoint with AdaMix keys of {sorted(kinds) or 'no kind'}, expected one of "
            "{bert|roberta}.encoder.layer.N.output.ExpertSoup.*, transformer.h.N.mlp.ExpertSoup.*, "
            "transformer.h.N.attn.c_attn.experts_lora_*"
        )
    family, method = kinds.pop()
    down, up = _count(_DOWN_EXPERT, state), _count(_UP_EXPERT, state)
    if not down or not up or (down != up and 1 not in (down, up)):
        raise ValueError(f"path: got {down} experts on side A and {up} on side B, expected equal numbers or one shared")
    weight = next(
        (v for k, v in state.items() if _DOWN_EXPERT.fullmatch(k) and not k.endswith(".bias") and v.dim() == 2), None
    )
    if weight is None:
        raise ValueError("path: got no two-dimensional weight of an expert on side A, expected one")
    width = weight.shape[0] // (2 if method == "lora" else 1)
    return OfficialFacts(family, method, down, up, max(width, 1))


def is_added(key: str) -> bool:
    """Whether AdaMix put this key there, rather than the base model or its head."""
    return _ADDED.fullmatch(key) is not None


def _count(pattern: re.Pattern[str], state: dict[str, Any]) -> int:
    numbers = [int(found.group(1)) for key in state if (found := pattern.fullmatch(key))]
    return max(numbers, default=-1) + 1


@dataclass(frozen=True)
class Slot:
    """Where a value of the file goes: parameter `name` of an adapted layer, or one expert of that bank."""

    name: str
    expert: int | None
    shape: tuple[int, ...]


def adapter_slots(stem: str, adapter: torch.nn.Module) -> dict[str, list[Slot]]:
    """The keys below `stem` (".../ExpertSoup.") for a RoutedAdapter."""
    slots = {}
    for side, ours in (("MoA_A", "down"), ("MoA_B", "up")):
        weight = getattr(adapter, f"{ours}_weight")
        slots[f"{stem}{side}.expert_score_weight"] = [Slot(f"adapter.{ours}_score", None, (weight.shape[0],))]
        for m in range(weight.shape[0]):
            for kind in ("weight", "bias"):
                bank = getattr(adapter, f"{ours}_{kind}")
                slots[f"{stem}{side}.deepspeed_experts.{m}.{kind}"] = [
                    Slot(f"adapter.{ours}_{kind}", m, tuple(bank.shape[1:]))
                ]
    return slots


def lora_slots(stem: str, layer: RoutedLoRALinear) -> dict[str, list[Slot]]:
    """The keys below `stem` ("...c_attn.") for a RoutedLoRALinear; its one score vector serves both sides."""
    slots = {}
    sides = (("A", layer.lora_a, "a"), ("B", layer.lora_b, "b"))
    scored = [f"{ours}_score" for _, bank, ours in sides if bank.shape[0] == layer.num_experts]
    slots[f"{stem}lora_expert_score_weight"] = [Slot(name, None, (layer.num_experts,)) for name in scored]
    for side, bank, ours in sides:
        for m in range(bank.shape[0]):
            slots[f"{stem}experts_lora_{side}.{m}"] = [Slot(f"lora_{ours}", m, tuple(bank.shape[1:]))]
    return slots
