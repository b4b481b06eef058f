"""The baselines that other libraries build: prefix tuning and LoRA by PEFT, UniPELT by AdapterHub's adapters."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .._extras import needed
from .config import Recipe


def prefix(model: nn.Module, recipe: Recipe, options: dict[str, Any]) -> nn.Module:
    """PEFT's prefix tuning, of a classifier or a causal language model."""
    with needed("prefix tuning"):
        from peft import PrefixTuningConfig, get_peft_model

    generates = recipe.kind == "generation"
    if not generates:
        _take_prefixes(model.base_model)
    task = "CAUSAL_LM" if generates else "SEQ_CLS"
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=options.get("tokens", 20))
    prefixed: Any = get_peft_model(model, config)
    if generates:
        _generate_with_prefixes(prefixed)
    built: nn.Module = prefixed
    return built


def _generate_with_prefixes(model: Any) -> None:
    """Makes PEFT's generate() see the cache by its old name; beside the new one of transformers 5.24 the prefixes,
    which PEFT adds under the old one, are dropped."""
    prepare = model.base_model_prepare_inputs_for_generation

    def renamed(*args: Any, **kwargs: Any) -> Any:
        inputs = prepare(*args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    model.base_model_prepare_inputs_for_generation = renamed


def _take_prefixes(encoder: Any) -> None:
    """Makes an encoder take prefixes as PEFT's classifiers hand them over, and return none of them.

    transformers 5.24 calls the argument cache. Encoders without a pooler return the prefixes where PEFT looks for
    what the head classifies.
    """
    forward = encoder.forward
    name = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"

    def with_prefixes(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        output = forward(*args, **{name: past_key_values}, **kwargs)
        return type(output)(**{key: value for key, value in output.items() if key != name})

    encoder.forward = with_prefixes


def lora(model: nn.Module, recipe: Recipe, options: dict[str, Any], targets: list[str] | None) -> nn.Module:
    """PEFT's LoRA. targets: names of layers; None leaves them to PEFT."""
    with needed("PEFT's LoRA"):
        from peft import LoraConfig, get_peft_model

    r = options.get("r", 8)
    config = LoraConfig(
        task_type={"classification": "SEQ_CLS", "generation": "CAUSAL_LM"}.get(recipe.kind),
        r=r,
        lora_alpha=options.get("alpha", 2 * r),
        lora_dropout=options.get("dropout", 0.0),
        target_modules=targets,
    )
    return get_peft_model(model, config)


def unipelt(model: nn.Module, parts: str) -> nn.Module:
    """UniPELT with the widths that adapters has for it: prefixes of 10, adapters of H / 16, LoRA of rank 8, alpha 2."""
    adapters = adapterhub()
    union = adapters.UniPELTConfig()
    if parts == "ap":
        union = adapters.ConfigUnion(*(part for part in union.configs if not isinstance(part, adapters.LoRAConfig)))
    adapters.init(model)
    owner: Any = model
    owner.add_adapter("unipelt", config=union)
    owner.train_adapter("unipelt")
    return model


def adapterhub() -> Any:
    """The package adapters. Raises NotImplementedError where it cannot be imported."""
    try:
        import adapters
    except ImportError as error:
        raise NotImplementedError(
            f"unipelt: needs AdapterHub's adapters 1.3 with transformers 4.57, which cannot be imported here: {error}"
        ) from error
    return adapters
