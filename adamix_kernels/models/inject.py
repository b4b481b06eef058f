"""adapt(): puts routed layers into a model, and freezes everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._backends import check_request
from ..modules import AdaptedLayer, RoutedAdapter, RoutedLoRALinear
from ..modules.lora import linear_sizes
from ..routing import Router
from .config import AdaMixConfig
from .gating import check_model_for_gates, layer_options, place
from .guards import install_guards
from .proving import settle_backends
from .quantised import dynamic_linear, let_gradients_through, plain_weight
from .state import AdaMixState, check_model, replace_module
from .targets import layer_number, model_type, saved_modules, target_layers, warn_of_unmatched

_TANH_GELU_MODELS = ("gpt2",)


def adapt(model: nn.Module, config: AdaMixConfig | None = None, *, backend: str = "auto") -> nn.Module:
    """Replaces the target layers of `model` by routed ones, freezes the rest, and returns `model`.

    After it only the banks of experts and the task head (config.modules_to_save) require gradients. In
    training every forward draws experts as config.routing says; in evaluation the merged experts serve. With "learned"
    the gates of each layer weigh its experts in both.
    `model.adamix` holds the configuration and the router. The base may be quantised, but not the head.

    Args:
        model: a Hugging Face model, or any nn.Module when config.target_modules is given. Quantised layers of
            bitsandbytes and torch.ao (dynamic) are taken like any other linear layer.
        config: what to adapt; AdaMixConfig() when None.
        backend: "auto", "reference", "triton" or "cuda", for every layer. Where it is "auto" and the model is on a GPU,
            the kernels that it needs are verified there, once on each machine (adamix_kernels.verify).

    Raises:
        TypeError, ValueError: the model is adapted already, or holds an adapter of PEFT's; an argument is no such
            thing, or config does not fit the model. Nothing is changed then.

    Source: AdaMix section 3; placement as in the reference project's BERT, RoBERTa and GPT-2.

    Example:
        >>> adapt(model, AdaMixConfig(num_experts=4, bottleneck=16)).adamix.config.num_experts
        4
        >>> sorted({name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad})
        ['bert', 'classifier']
    """
    check_model(model)
    check_request(backend)
    config = AdaMixConfig() if config is None else config
    if not isinstance(config, AdaMixConfig):
        raise TypeError(
            f"config: got {type(config).__name__}, expected an AdaMixConfig or None (of PEFT's LoraConfig "
            "AdaMixConfig.from_peft makes one)"
        )
    check_bare(model)
    saved = saved_modules(model, config.modules_to_save, config.task_type)
    for path, module in saved:
        _check_trainable(path, module)
    router = Router(config.routing, config.passes)
    routed = build_layers(model, config, router, backend)

    let_gradients_through(model)
    model.requires_grad_(False)
    for path, layer in routed.items():
        _freeze_all_but_banks(layer)
        replace_module(model, path, layer.train(model.training))
    for _, module in saved:
        module.requires_grad_(True)
    # torch types every attribute as a tensor or a module.
    owner: Any = model
    owner.adamix = AdaMixState(config, router, list(routed), [path for path, _ in saved])
    install_guards(model)
    settle_backends(model)
    return model


def build_layers(
    model: nn.Module, config: AdaMixConfig, router: Router, backend: str = "auto"
) -> dict[str, AdaptedLayer | RoutedLoRALinear]:
    """path -> the layer that adapt() puts there, built beside `model`, which stays as it is."""
    build = _adapted_layer if config.method == "adapter" else _lora_layer
    flags = [(p, p.requires_grad) for p in model.parameters()]
    targets = check_targets(model, config)
    warn_of_unmatched(model, config)
    depths = sorted({n for n in (layer_number(path, config.layers_pattern) for path in targets) if n is not None})
    built: dict[str, AdaptedLayer | RoutedLoRALinear] = {}
    try:
        for path, layer in targets.items():
            banks = bank_options(layer)
            options = layer_options(config, path, linear_sizes(layer)[build is _adapted_layer], depths, **banks)
            built[path] = build(model, layer, config, {**options, **banks, "router": router, "backend": backend})
            place(model, path, built[path])
        return built
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def check_targets(model: nn.Module, config: AdaMixConfig) -> dict[str, nn.Module]:
    """target_layers(), which gates may weigh. Raises ValueError where adapt() would because of names or gates."""
    targets = target_layers(model, config)
    check_model_for_gates(model, config, list(targets))
    return targets


def _adapted_layer(model: nn.Module, layer: nn.Module, config: AdaMixConfig, options: dict[str, Any]) -> AdaptedLayer:
    _, hidden, _ = linear_sizes(layer)
    activation = config.activation
    if activation == "auto":
        activation = "gelu_tanh" if model_type(model) in _TANH_GELU_MODELS else "gelu"
    width = options.pop("r")
    return AdaptedLayer(layer, RoutedAdapter(hidden, width, share=config.share, activation=activation, **options))


def _lora_layer(model: nn.Module, layer: nn.Module, config: AdaMixConfig, options: dict[str, Any]) -> RoutedLoRALinear:
    inputs, outputs, transposed = linear_sizes(layer)
    fused = transposed and outputs == 3 * inputs
    return RoutedLoRALinear.from_linear(
        layer,
        share=config.share,
        dropout=config.dropout,
        targets=config.qkv if fused else None,
        use_rslora=config.use_rslora,
        **options,
    )


def bank_options(layer: nn.Module) -> dict[str, Any]:
    """Banks train in at least float32, on the layer's device; a 16-bit model casts them per call."""
    weight = getattr(layer, "weight", None)
    plain = plain_weight(layer)
    return {
        "dtype": torch.float32 if plain is None else torch.promote_types(plain.dtype, torch.float32),
        "device": weight.device if isinstance(weight, torch.Tensor) else None,
    }


def check_bare(model: nn.Module) -> None:
    """Raises ValueError for a model that is adapted, or holds an adapter of PEFT's, which would be frozen in the midst
    of the model, or adapted itself."""
    if getattr(model, "adamix", None) is not None:
        raise ValueError(f"model: got a {type(model).__name__} that is adapted already, expected a bare one")
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            where = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
            raise ValueError(
                f"model: got {where}, PEFT's, expected the model without it: merge_and_unload() of the PeftModel keeps "
                "what its LoRA has learned, unload() drops it, and where it has neither, load the base model anew; "
                "AdaMixConfig.from_peft(config) adapts a bare model as a LoraConfig says"
            )


def _check_trainable(path: str, module: nn.Module) -> None:
    for name, part in module.named_modules(prefix=path):
        if dynamic_linear(part) or any(not p.is_floating_point() for p in part.parameters(recurse=False)):
            raise ValueError(
                f"modules_to_save: got {name!r}, a quantised {type(part).__name__}, which cannot be trained, expected "
                f"floating weights: leave it out of the quantisation (BitsAndBytesConfig: llm_int8_skip_modules="
                f"[{path!r}]), or give modules_to_save=[] to keep it frozen"
            )


def _freeze_all_but_banks(layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.startswith("base.") and not name.endswith("_score"))
