"""The methods that are compared: AdaMix and its ablations, and the baselines of the paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..models.config import AdaMixConfig
from ..models.gating import gates_of_layers, is_learned
from ..models.inject import adapt
from ..models.state import adamix_state
from ..models.targets import model_type, saved_modules
from . import libraries
from .config import Recipe

METHODS = {
    "full": "every weight is trained",
    "head": "the task head alone (a masked model's own output head)",
    "bitfit": "every bias, and the head",
    "pfeiffer": "one adapter a layer, after the feed-forward block: AdaMix's placement with one expert, one pass",
    "soup": "the mean of `models` such adapters, or LoRAs where the recipe's AdaMix is of LoRA (the recipe's number of "
    "experts), trained apart on the same rows in other orders, from the same first weights",
    "houlsby": "two adapters a layer, after attention and feed-forward, each of half the width",
    "prefix": "PEFT's prefix tuning",
    "lora": "LoRA on query and value: PEFT's; on GPT-2, where PEFT adapts the keys too, AdaMix's of one expert",
    "adamix": "the recipe's AdaMix; any field of AdaMixConfig as an option",
    "equal": "the recipe's experts, each with the gate 1 / M whatever the token; one pass",
    "unipelt": "gated adapter, prefixes and LoRA, by AdapterHub's adapters 1.3, which needs transformers 4.57; "
    "parts=ap goes without LoRA",
}
BASELINES = ("full", "head", "bitfit", "pfeiffer", "houlsby", "prefix", "lora", "unipelt", "adamix")
_OPTIONS = {
    "pfeiffer": ("bottleneck",),
    "soup": ("bottleneck", "models"),
    "houlsby": ("bottleneck",),
    "prefix": ("tokens",),
    "lora": ("r", "alpha", "dropout"),
    "equal": ("num_experts",),
    "unipelt": ("parts",),
}
PASSES = 1.8  # time of a step with both passes, in steps of one adapter
# Of every method: its learning rate, how many times the recipe's epochs it trains, the part of its steps in which the
# rate rises. Of AdaMix: the part of its steps in which all experts are one.
_TRAINING = ("learning_rate", "times_epochs", "together", "warmup_ratio")
_UNIPELT_PARTS = ("ap", "apl")
_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie")
_HOULSBY = {
    **dict.fromkeys(_ENCODERS, r"(.*\.)?layer\.\d+\.(attention\.)?output\.dense"),
    "gpt2": r"(.*\.)?h\.\d+\.(attn|mlp)\.c_proj",
}
_LM_HEADS = ("cls", "lm_head")


@dataclass(frozen=True)
class Method:
    """name: a key of METHODS. options: as written, sorted by name."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        written = ",".join(f"{key}={_written(value)}" for key, value in self.options)
        return f"{self.name}:{written}" if written else self.name

    @property
    def own(self) -> dict[str, Any]:
        """The options that are not of the training, which every method has."""
        return {key: value for key, value in self.options if key not in _TRAINING}

    @property
    def members(self) -> int | None:
        """Models that a soup trains, where it says so."""
        return dict(self.options).get("models")


@dataclass
class Built:
    """A model ready to train. adapted: by adapt(). experts: whether it has several, to be evaluated in several ways.
    gates: whether these have learned gates. members: after training, what each model of a soup has learnt."""

    model: nn.Module
    adapted: bool
    experts: bool
    gates: bool = False
    members: list[dict[str, torch.Tensor]] = field(default_factory=list)


def parse_method(text: str) -> Method:
    """ "adamix:num_experts=8,routing=sample" -> Method. Values are JSON where they can be ("null", 0.5), else words.

    Raises ValueError for an unknown method or option, or a wrong value of one that every method has.
    """
    name, _, written = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, expected one of {', '.join(METHODS)}")
    options = {}
    for part in filter(None, written.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"method: got {part!r} in {text!r}, expected option=value")
        options[key] = as_value(value)
    for key in options.keys() & set(_TRAINING):
        given, fraction = options[key], key == "warmup_ratio"
        number = not isinstance(given, bool) and isinstance(given, (int, float))
        if not (number and (0 <= given < 1 if fraction else given > 0)):
            wanted = "from 0 to below 1" if fraction else "above 0"
            raise ValueError(f"method: got {key}={given!r}, expected a number {wanted}")
    own = {key: value for key, value in options.items() if key not in _TRAINING}
    together = options.get("together")
    if together is not None and (name != "adamix" or together >= 1 or own.get("routing") == "learned"):
        raise ValueError(f"method: got together={together!r} in {text!r}, expected a part below 1, of drawn experts")
    if name == "adamix":
        AdaMixConfig.from_dict(own)
    elif unknown := sorted(set(own) - set(_OPTIONS.get(name, ()))):
        known = [*_OPTIONS.get(name, ()), *_TRAINING]
        raise ValueError(f"method: got the options {unknown} for {name}, expected some of {known}")
    models = options.get("models", 2)
    if isinstance(models, bool) or not isinstance(models, int) or models < 2:
        raise ValueError(f"method: got models={models!r}, expected a whole number of 2 or more")
    if options.get("parts", "apl") not in _UNIPELT_PARTS:
        raise ValueError(f"method: got parts={options['parts']!r}, expected one of {', '.join(_UNIPELT_PARTS)}")
    return Method(name, tuple(sorted(options.items())))


def expand_methods(names: Sequence[str], recipe: Recipe) -> list[Method]:
    """Methods by name, and the groups "default" (the recipe's), "baselines", "ablations" and "controls"; each once, in
    order."""
    found: dict[str, Method] = {}
    groups = {
        "default": recipe.default_methods, "baselines": BASELINES, "ablations": ablations(recipe),
        "controls": controls(recipe),
    }  # fmt: skip
    for name in names:
        for text in groups.get(name, (name,)):
            method = parse_method(text)
            found.setdefault(str(method), method)
    return list(found.values())


def ablations(recipe: Recipe) -> list[str]:
    """AdaMix with one thing changed at a time: consistency, sharing, routing, number of experts, width.

    Without merging is no run of its own: every AdaMix run is evaluated merged, routed at random and with each fixed
    expert (see Recipe.evaluations).
    """
    config = AdaMixConfig.from_dict(dict(recipe.adamix))
    width = "bottleneck" if config.method == "adapter" else "r"
    size = getattr(config, width)
    changes = ["consistency_weight=0", "share=null"]
    changes += [f"routing={level}" for level in ("batch", "sample", "token") if level != config.routing]
    changes += [f"num_experts={n}" for n in (1, 2, 4, 8) if n != config.num_experts]
    changes += [f"{width}={r}" for r in (max(1, size // 2), 2 * size) if r != size]
    return ["adamix", *(f"adamix:{change}" for change in changes)]


def controls(recipe: Recipe) -> list[str]:
    """What AdaMix must beat for the mixture to be worth something: one adapter (LoRA where the recipe's AdaMix is of
    LoRA), the same at about AdaMix's compute and at its number of trained parameters, the mean of adapters trained
    apart, one expert with both passes and the consistency loss, two experts and the recipe's experts without it.
    """
    config = AdaMixConfig.from_dict(dict(recipe.adamix))
    one, width = ("pfeiffer", "bottleneck") if config.method == "adapter" else ("lora", "r")
    # A shared side is trained once, the other M times.
    sides = config.num_experts + (1 if config.share else config.num_experts)
    wide = round(getattr(config, width) * sides / 2)
    return [
        one, f"{one}:times_epochs={PASSES}", f"{one}:{width}={wide}", "soup", "adamix:num_experts=1",
        "adamix:num_experts=2,consistency_weight=0", "adamix:consistency_weight=0", "adamix",
    ]  # fmt: skip


def check_available(method: Method, recipe: Recipe) -> None:
    """Raises NotImplementedError where the method cannot run, whatever the model: build()'s reasons, before a load."""
    if method.name == "prefix" and recipe.kind == "prompt":
        raise NotImplementedError("prefix: PEFT's prefix tuning has no task type for masked language models")
    if method.name == "unipelt":
        libraries.adapterhub()


def build(method: Method, model: nn.Module, recipe: Recipe) -> Built:
    """Makes `model` what the method trains: weights frozen or free, adapters or prefixes put in.

    Raises:
        ValueError: the method has no place in this model (no head, no bias, no known layers).
        ModuleNotFoundError: PEFT is needed and not installed.
        NotImplementedError: PEFT has no such method for this kind of task, or adapters cannot be imported here.
    """
    check_available(method, recipe)
    options = {**_settings(method, recipe), **method.own}
    options.pop("models", None)
    if method.name == "full":
        model.requires_grad_(True)
        return Built(model, False, False)
    if method.name in ("head", "bitfit"):
        return Built(_partly(model, biases=method.name == "bitfit"), False, False)
    if method.name == "prefix":
        return Built(libraries.prefix(model, recipe, options), False, False)
    if method.name == "unipelt":
        return Built(libraries.unipelt(model, options.get("parts", "apl")), False, False)
    if method.name == "lora" and model_type(model) != "gpt2":
        encoder = model_type(model) in _ENCODERS
        return Built(libraries.lora(model, recipe, options, ["query", "value"] if encoder else None), False, False)
    config = adapter_config(method, model, recipe, options)
    adapted = adapt(model, config)
    if method.name == "equal":
        return Built(_with_equal_gates(adapted), True, False)
    return Built(adapted, True, config.num_experts > 1, is_learned(adapted))


def adapter_config(method: Method, model: nn.Module, recipe: Recipe, options: dict[str, Any]) -> AdaMixConfig:
    """What adapt() is given for an AdaMix or single-expert method."""
    base = dict(recipe.adamix)
    if method.name == "adamix":
        return AdaMixConfig.from_dict({**base, **options})
    if method.name == "equal":
        dense = {"routing": "learned", "consistency_weight": 0.0, "balance_weight": 0.0}
        return AdaMixConfig.from_dict({**base, **dense, **options})
    single = {"num_experts": 1, "share": None, "consistency_weight": 0.0}
    if method.name == "lora":
        return AdaMixConfig.from_dict({"method": "lora", "qkv": ["q", "v"], **single, **options})
    if method.name == "soup" and base.get("method") == "lora":
        return AdaMixConfig.from_dict({**base, **single, **options})
    width = AdaMixConfig.from_dict(base).bottleneck
    if method.name in ("pfeiffer", "soup"):
        return AdaMixConfig.from_dict({"bottleneck": width, **single, **options})
    kind = model_type(model)
    if kind not in _HOULSBY:
        raise ValueError(f"houlsby: got a model of type {kind!r}, expected one of {', '.join(_HOULSBY)}")
    return AdaMixConfig.from_dict(
        {"bottleneck": max(1, width // 2), "target_modules": _HOULSBY[kind], **single, **options}
    )


def learning_rate(method: Method, recipe: Recipe) -> float:
    """The method's own where it or the recipe has one, else that of AdaMix."""
    found = recipe.methods.get(method.name, {}).get("learning_rate", recipe.training["learning_rate"])
    rate: float = dict(method.options).get("learning_rate", found)
    return rate


def epochs(method: Method, recipe: Recipe) -> float:
    """The recipe's, as many times as the method asks."""
    number: float = recipe.training["num_train_epochs"] * dict(method.options).get("times_epochs", 1)
    return number


def warmup(method: Method) -> dict[str, Any]:
    """The field of the training that the method changes: warmup_ratio, in place of the recipe's, or none."""
    return {key: value for key, value in method.options if key == "warmup_ratio"}


def heads(model: nn.Module) -> list[nn.Parameter]:
    """The task head's parameters: the classifier, or a language model's head without what its embeddings own."""
    found = [module for _, module in saved_modules(model, None)]
    found = found or [m for name, m in model.named_children() if name in _LM_HEADS]
    encoder: Any = model.base_model
    embedded = {id(p) for p in encoder.parameters()}
    return [p for module in found for p in module.parameters() if id(p) not in embedded]


def kept_parameters(built: Built) -> int:
    """Parameters kept to serve, beside the frozen model: what is trained, of M experts without gates one."""
    model = built.model
    if not built.adapted or is_learned(model):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = adamix_state(model)
    banks = [
        p
        for path in state.paths
        for name, p in model.get_submodule(path).named_parameters()
        if not name.startswith("base.") and not name.endswith("_score")
    ]
    whole = [p for path in state.saved for p in model.get_submodule(path).parameters()]
    return sum(p[0].numel() for p in banks) + sum(p.numel() for p in whole)


def _settings(method: Method, recipe: Recipe) -> dict[str, Any]:
    return {k: v for k, v in recipe.methods.get(method.name, {}).items() if k != "learning_rate"}


def _with_equal_gates(model: nn.Module) -> nn.Module:
    """The softmax of zeros, frozen: 1 / M."""
    for gate in gates_of_layers(model).values():
        for parameter in gate.parameters():
            nn.init.zeros_(parameter).requires_grad_(False)
    return model


def _partly(model: nn.Module, biases: bool) -> nn.Module:
    model.requires_grad_(False)
    trained = heads(model)
    if biases:
        trained += [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not trained:
        raise ValueError(
            f"head: got {type(model).__name__}, which has no head of its own: its output is its embeddings"
        )
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


def as_value(text: str) -> Any:
    """JSON where it can be, else the word itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
