"""What a PEFT LoraConfig means as fields of AdaMixConfig. PEFT itself is not imported."""

from __future__ import annotations

import dataclasses
from typing import Any

from .config import HEAD_TASKS

_SAME = (
    "r", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "task_type",
)  # fmt: skip
_CARRIED = {**{name: name for name in _SAME}, "lora_alpha": "alpha", "lora_dropout": "dropout"}
# Where the adapter came from and how it is run; and fan_in_fan_out, which each layer tells (PEFT corrects it, too).
_WITHOUT_EFFECT = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
    )
)
_PEFTS_HEADS = ("classifier", "score", "qa_outputs")


def carried_over(config: Any) -> dict[str, Any]:
    """Fields of AdaMixConfig that make the same LoRA. See AdaMixConfig.from_peft for what is raised."""
    kind = getattr(config, "peft_type", None)
    if not dataclasses.is_dataclass(config) or isinstance(config, type) or getattr(kind, "value", kind) != "LORA":
        raise TypeError(f"config: got {type(config).__name__}, expected a peft.LoraConfig")
    default: Any = type(config)()
    fields = [field.name for field in dataclasses.fields(config)]
    foreign = {
        name: getattr(config, name)
        for name in fields
        if name not in _CARRIED and name not in _WITHOUT_EFFECT and not _same(config, default, name)
    }
    if foreign:
        given = ", ".join(f"{name}={value!r}" for name, value in foreign.items())
        expected = ", ".join(f"{name}={getattr(default, name)!r}" for name in foreign)
        raise ValueError(
            f"config: got {given}, which AdaMix has no counterpart for, expected PEFT's defaults ({expected}); "
            "give a LoraConfig without them, or train this adapter with PEFT"
        )
    values = {own: getattr(config, name) for name, own in _CARRIED.items() if name in fields}
    for name, value in values.items():
        if isinstance(value, (list, set, tuple)):  # copies: PEFT adds to its own later
            values[name] = sorted(value) if isinstance(value, set) else list(value)
        elif isinstance(value, dict):
            values[name] = dict(value) or None
    task = values["task_type"] = getattr(values["task_type"], "value", values["task_type"])
    if task in HEAD_TASKS:
        # task_type asks for the head here too, whatever its name; PEFT tries all of these.
        values["modules_to_save"] = [n for n in values["modules_to_save"] or () if n not in _PEFTS_HEADS] or None
    else:
        values["modules_to_save"] = values["modules_to_save"] or []
    return {"method": "lora", "qkv": None, **values}


def _same(config: Any, default: Any, name: str) -> bool:
    """None and an empty value ask for nothing, and say so in either way."""
    value, usual = getattr(config, name), getattr(default, name)
    return bool(value == usual) or (value in (None, {}, [], ()) and usual in (None, {}, [], ()))
