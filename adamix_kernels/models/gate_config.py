"""The part of AdaMixConfig that is about gates: its presets, its checks, what a pattern gives a layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..modules._banks import check_finite
from ..ops._checks import check_choice, check_positive
from ..ops._gates import check_mix
from ..routing import LEARNED, ROUTERS
from ..routing.gates import check_top_k

if TYPE_CHECKING:
    from .config import AdaMixConfig

Config = TypeVar("Config", bound="Presets")
# Fields that mean something with routing="learned" alone, and their defaults.
OF_GATES = {
    "router": "linear",
    "top_k": None,
    "mix": "outputs",
    "balance_weight": 0.01,
    "z_weight": 0.0,
    "num_tasks": None,
    "experts_pattern": None,
}
PATTERNS = ("rank_pattern", "alpha_pattern")


class Presets:
    """Configurations by the names of the methods. Every field can be given otherwise."""

    @classmethod
    def hydra_lora(cls: type[Config], **options: Any) -> Config:
        """y = W0 x + s sum_e g_e B_e (A x), g = softmax(Wg x): one A, three B, every token weighs them all.

        Source: HydraLoRA (arXiv 2404.19245).

        Example:
            >>> AdaMixConfig.hydra_lora(r=4).share
            'down'
        """
        return cls(**_with(options, method="lora", num_experts=3, r=8, share="down", balance_weight=0.0))

    @classmethod
    def lora_moe(cls: type[Config], **options: Any) -> Config:
        """y = W0 x + s sum_e g_e B_e A_e x, g = softmax(Wg x): eight LoRAs, every token weighs them all.

        The balance is the usual one over tokens; the paper's localized constraint needs the kind of each text.

        Source: LoRAMoE (arXiv 2312.09979).

        Example:
            >>> AdaMixConfig.lora_moe().top_k is None
            True
        """
        return cls(**_with(options, method="lora", num_experts=8, r=8, share=None))

    @classmethod
    def mola(cls: type[Config], **options: Any) -> Config:
        """y = W0 x + s sum over the top 2 of g_e B_e A_e x; 2, 4, 6 and 8 LoRAs in the quarters of the depth.

        Source: MoLA (arXiv 2402.08562).

        Example:
            >>> AdaMixConfig.mola().experts_pattern
            [2, 4, 6, 8]
        """
        scale = {} if "lora_alpha" in options else {"alpha": 16.0}
        fields = {"method": "lora", "num_experts": 8, "r": 8, "share": None, "top_k": 2, **scale}
        return cls(**_with(options, **fields, experts_pattern=[2, 4, 6, 8]))

    @classmethod
    def smear(cls: type[Config], **options: Any) -> Config:
        """One adapter a sample, W = sum_e g_e W_e, g = softmax(Wg mean of its tokens): eight adapters averaged.

        Source: SMEAR (arXiv 2306.03745).

        Example:
            >>> AdaMixConfig.smear().mix
            'weights'
        """
        fields = {"method": "adapter", "num_experts": 8, "share": None, "router": "sentence", "mix": "weights"}
        return cls(**_with(options, **fields, balance_weight=0.0))


def _with(options: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"routing": LEARNED, **fields, **options}


def check_gates(config: AdaMixConfig) -> None:
    """Raises ValueError, naming the field, for what no gates can be made of."""
    _check_patterns(config)
    if config.routing != LEARNED:
        given = [name for name, usual in OF_GATES.items() if getattr(config, name) != usual]
        if given:
            raise ValueError(
                f"{given[0]}: got {getattr(config, given[0])!r} with routing={config.routing!r}, expected it with "
                "routing='learned' alone"
            )
        return
    check_choice("router", config.router, ROUTERS)
    check_mix(config.mix)
    if config.num_experts < 2:
        raise ValueError(f"num_experts: got {config.num_experts}, expected at least 2 with routing='learned'")
    for name in ("balance_weight", "z_weight"):
        value = getattr(config, name)
        check_finite(name, value)
        if value < 0:
            raise ValueError(f"{name}: got {value!r}, expected a number of at least 0")
    if config.router == "arrow" and config.method != "lora":
        raise ValueError(f"router: got 'arrow' with method={config.method!r}, expected 'lora': it reads B A")
    if config.top_k is not None:
        if config.router in ("task", "threshold"):
            raise ValueError(f"top_k: got {config.top_k!r} for router={config.router!r}, expected None: it weighs all")
        check_top_k(config.top_k, min(experts_of(config)))
    tasks = config.num_tasks
    if (tasks is None) == (config.router == "task"):
        raise ValueError(f"num_tasks: got {tasks!r} for router={config.router!r}, expected it for 'task' alone")
    if tasks is not None:
        check_positive(num_tasks=tasks)


def _check_patterns(config: AdaMixConfig) -> None:
    for name, least in (("rank_pattern", 1), ("alpha_pattern", 0), ("experts_pattern", 2)):
        value: Any = getattr(config, name)
        if value is None:
            continue
        by_depth = name == "experts_pattern" and isinstance(value, (list, tuple)) and len(value) > 0
        numbers = value.values() if isinstance(value, dict) else value if by_depth else [None]
        kinds = (int, float) if name == "alpha_pattern" else int
        if not all(isinstance(n, kinds) and not isinstance(n, bool) and n >= least and n > 0 for n in numbers):
            also = ", or a list by depth," if name == "experts_pattern" else ""
            wanted = f"of at least {least}" if least else "above 0"
            raise ValueError(f"{name}: got {value!r}, expected a dict by path{also} of numbers {wanted}")
        for key in value if isinstance(value, dict) else ():
            try:
                re.compile(key)
            except (re.error, TypeError) as error:
                raise ValueError(f"{name}: got {key!r}, expected a regular expression ({error})") from error
        if by_depth:
            config.experts_pattern = list(value)
    if config.alpha_pattern and config.method != "lora":
        raise ValueError(f"alpha_pattern: got {config.alpha_pattern!r} with method={config.method!r}, expected 'lora'")


def experts_of(config: AdaMixConfig) -> list[int]:
    """Every number of experts that a layer may get."""
    pattern = config.experts_pattern
    if isinstance(pattern, dict):
        return [config.num_experts, *pattern.values()]
    return list(pattern) if pattern else [config.num_experts]


def by_path(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the value of the first key, a regular expression, that is the path or its end behind a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def experts_at(config: AdaMixConfig, path: str, number: int | None, depths: Sequence[int]) -> int:
    """M of the layer at `path`. number: of its block; depths: of all blocks that are adapted, in order.

    A list cuts the depth into parts as equal as can be, MoLA's 2-4-6-8 into quarters.

    Raises ValueError: a list, for a layer that stands in no numbered block.
    """
    pattern = config.experts_pattern
    if pattern is None or isinstance(pattern, dict):
        return int(by_path(pattern, path, config.num_experts))
    if number is None:
        raise ValueError(
            f"experts_pattern: got {pattern!r} for {path!r}, which stands in no numbered layer, expected a dict by path"
        )
    return pattern[depths.index(number) * len(pattern) // len(depths)]
