"""AdaMixConfig: what to adapt and how, as a dataclass and as versioned JSON."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

from ..modules._banks import SHARES, check_bool, check_finite, check_fraction, lora_scaling
from ..ops._checks import check_choice, check_positive
from ..routing import LEARNED, check_level
from ._config_checks import check_expression, check_names, several
from ._files import read_json, write_json
from .gate_config import OF_GATES, PATTERNS, Presets, check_gates

CONFIG_VERSION = 1
CONFIG_NAME = "adamix_config.json"
METHODS = ("adapter", "lora")
ACTIVATIONS = ("auto", "gelu", "gelu_tanh", "relu", "silu", None)
# PEFT's TaskType.
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None)
# The tasks whose head PEFT trains without being told.
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# PEFT's names for two fields: taken at construction, readable, and not written.
_ALIASES = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
# Very objects: a 32.0 that a caller gives is another one, so that a given value is told from the default.
_ALPHA, _DROPOUT, _WEIGHT = float("32"), float("0"), float("1")
# Left out of the JSON at these values, so that an older release reads a file that does not need them.
_SINCE_0_1 = {
    "use_rslora": False,
    "task_type": None,
    "shared_prefix": "auto",
    **dict.fromkeys(PATTERNS),
    **OF_GATES,
}


@dataclass
class AdaMixConfig(Presets):
    """Configuration of a whole model's adaptation.

    Attributes:
        method: "adapter" (bottleneck after the feed-forward block) or "lora" (update of attention projections).
        num_experts: M; 4 in the paper's NLU runs, 8 for NLG.
        bottleneck: adapter width (48 for BERT-base, 16 for RoBERTa-large, 8 for GPT-2 in the paper).
        activation: adapter activation; "auto" is erf GELU, tanh GELU for GPT-2.
        r, alpha, dropout: LoRA rank, numerator of the scaling, probability on the input.
        use_rslora: the scaling is alpha / sqrt(r) instead of alpha / r.
        qkv: which of "q", "k", "v" to adapt where one layer computes all three (GPT-2's c_attn), each with a LoRA of
            its own; None: one LoRA of rank r for the whole layer, as PEFT does.
        share: the side with one bank for all experts, "up" (B), "down" (A) or None.
        routing: training draw per "batch" (each pass one expert), "sample" or "token" (OPT's adapters, which are given
            tokens as rows, take "sample" for "token"); or "learned": gates weigh the experts, in training and in
            evaluation (see docs/gates.md; presets: hydra_lora(), lora_moe(), mola(), smear()).
        consistency_weight: weight of the symmetric KL between the two passes (paper: 1; 100 for GPT-2).
            0 trains with a single pass; with "learned", whose passes differ by dropout alone, it is the default.
        target_modules: PEFT's rules: a list matches whole names or dotted suffixes, a string is a regular
            expression for the whole path, "all-linear" every linear layer but the heads. None: by model_type.
        exclude_modules: what of these to leave out, by the same rules.
        layers_to_transform: indices of the transformer layers to adapt; None or empty for all. Unlike PEFT's it
            also narrows a string.
        layers_pattern: what may stand before the layer's index in a path ("h", "layers", ...); None: anything,
            and the first number of a path is its layer.
        modules_to_save: names or dotted suffixes of modules trained and saved whole; None: the task head.
        task_type: PEFT's name of the task ("SEQ_CLS", "CAUSAL_LM", ...), which exports write; None: read from the
            model. With "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" the head is trained besides modules_to_save, as in
            PEFT.
        shared_prefix: whether the layers below the first adapted one see a training batch once for both passes
            (see both_passes). "auto": where they draw no random numbers, so that the results are the same; True: also
            where they do, and both passes then drop the same units there; False: never.
        rank_pattern, alpha_pattern: r (of adapters the bottleneck) and alpha of single layers, by PEFT's rule: keys are
            regular expressions for a path or its end.
        router: with "learned", what makes the gates: "linear" (of a token), "threshold" (AdaMoLE), "sentence" (of the
            text's mean, SMEAR), "task" (a table by task id, Polytropon) or "arrow" (from the LoRA's own directions).
        top_k: experts a token is sent to ("linear", "sentence", "arrow"); None: all.
        mix: what the gates weigh: the experts' "outputs", or their "weights", which are averaged first.
        balance_weight, z_weight: of balance_loss and z_loss in the training loss, each the mean over the layers.
        num_tasks: rows of the table of "task".
        experts_pattern: M of single layers: a dict as in rank_pattern, or a list by depth ([2, 4, 6, 8]: MoLA).
        lora_alpha, lora_dropout: PEFT's names for alpha and dropout.
        bias: "none"; biases are not trained.
        version: of this format.

    Example:
        >>> AdaMixConfig(method="lora", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]).alpha
        16

    Raises ValueError at construction for any value outside these, and for two different values under two names.
    """

    method: str = "adapter"
    num_experts: int = 4
    bottleneck: int = 16
    activation: str | None = "auto"
    r: int = 4
    alpha: float = _ALPHA
    dropout: float = _DROPOUT
    qkv: tuple[str, ...] | None = ("q", "v")
    share: str | None = "up"
    routing: str = "batch"
    consistency_weight: float = _WEIGHT
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    version: int = CONFIG_VERSION
    use_rslora: bool = False
    task_type: str | None = None
    shared_prefix: bool | str = "auto"
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    router: str = "linear"
    top_k: int | None = None
    mix: str = "outputs"
    balance_weight: float = 0.01
    z_weight: float = 0.0
    num_tasks: int | None = None
    experts_pattern: dict[str, int] | list[int] | None = None
    lora_alpha: InitVar[float | None] = None
    lora_dropout: InitVar[float | None] = None
    bias: InitVar[str] = "none"

    def __post_init__(self, lora_alpha: float | None, lora_dropout: float | None, bias: str) -> None:
        self._take("alpha", "lora_alpha", lora_alpha, _ALPHA)
        self._take("dropout", "lora_dropout", lora_dropout, _DROPOUT)
        if bias != "none":
            raise ValueError(
                f"bias: got {bias!r}, expected 'none': biases stay frozen; modules_to_save=[...] trains whole modules"
            )
        check_bool("use_rslora", self.use_rslora)
        # A member of PEFT's enum is a string whose value is its name.
        self.task_type = getattr(self.task_type, "value", self.task_type)
        check_choice("task_type", self.task_type, TASK_TYPES)
        if self.qkv is not None:
            check_names("qkv", self.qkv, optional=False)
            self.qkv = tuple(self.qkv)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (set, tuple)):
                setattr(self, name, sorted(getattr(self, name)))
        check_choice("method", self.method, METHODS)
        check_positive(num_experts=self.num_experts, bottleneck=self.bottleneck, r=self.r)
        check_fraction("dropout", self.dropout)
        for name in ("alpha", "consistency_weight"):
            check_finite(name, getattr(self, name))
        if not self.alpha > 0:
            raise ValueError(f"alpha: got {self.alpha!r}, expected a number above 0")
        if not self.consistency_weight >= 0:
            raise ValueError(f"consistency_weight: got {self.consistency_weight!r}, expected a number of at least 0")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_names(name, getattr(self, name))
        for name in ("target_modules", "exclude_modules"):
            check_expression(name, getattr(self, name))
        check_names("modules_to_save", self.modules_to_save, string=False)
        layers: Any = self.layers_to_transform
        if layers is not None and not all(isinstance(n, int) for n in (layers if several(layers) else [layers])):
            raise ValueError(f"layers_to_transform: got {layers!r}, expected ints, an int or None")
        if self.shared_prefix != "auto" and not isinstance(self.shared_prefix, bool):
            raise ValueError(f"shared_prefix: got {self.shared_prefix!r}, expected 'auto', True or False")
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("share", self.share, SHARES)
        check_level("routing", self.routing, LEARNED)
        if self.routing == LEARNED and self.consistency_weight is _WEIGHT:
            self.consistency_weight = 0.0
        check_gates(self)
        qkv = self.qkv
        if qkv is not None and (not qkv or set(qkv) - {"q", "k", "v"} or len(set(qkv)) != len(qkv)):
            raise ValueError(f"qkv: got {qkv!r}, expected distinct names out of 'q', 'k', 'v', or None")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern: got {self.layers_pattern!r}, expected layers_to_transform besides it")
        if self.version != CONFIG_VERSION:
            raise ValueError(f"version: got {self.version!r}, expected {CONFIG_VERSION}, the one this release reads")

    @property
    def passes(self) -> int:
        """Passes that ride in one training batch: two, or one without the consistency loss."""
        return 2 if self.consistency_weight > 0 else 1

    @property
    def scaling(self) -> float:
        """What the LoRA update is multiplied by: alpha / r, or alpha / sqrt(r) with use_rslora."""
        return lora_scaling(self.alpha, self.r, self.use_rslora)

    def _take(self, name: str, alias: str, given: float | None, default: float) -> None:
        if given is None:
            return
        own = getattr(self, name)
        if own is not default and own != given:
            raise ValueError(
                f"{alias}: got {given!r} beside {name}={own!r}, expected one of them: {alias} is PEFT's name for {name}"
            )
        setattr(self, name, given)

    @classmethod
    def from_peft(cls, config: Any, **options: Any) -> AdaMixConfig:
        """The same LoRA, as AdaMix: r, scaling, dropout, layers and modules_to_save of a PEFT LoraConfig.

        Carried over: r, lora_alpha, lora_dropout, use_rslora, rank_pattern, alpha_pattern, target_modules ("all-linear"
        too), exclude_modules, layers_to_transform, layers_pattern, modules_to_save and task_type. As in PEFT, a fused
        c_attn gets one LoRA (qkv=None), and without a task_type for classification no head is trained unless
        modules_to_save names it.
        fan_in_fan_out is read from each layer.

        Args:
            config: a peft.LoraConfig.
            options: fields of AdaMixConfig that PEFT has not (num_experts, share, routing, consistency_weight), or that
                replace what was carried over.

        Example:
            >>> from peft import LoraConfig
            >>> lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
            >>> AdaMixConfig.from_peft(lora, num_experts=4).scaling
            2.0

        Raises:
            TypeError: config is no LoraConfig.
            ValueError: a field of it has no counterpart here and is not at its default (use_dora, lora_bias, ...); the
                message names all such fields.
        """
        from .peft_config import carried_over

        return cls(**{**carried_over(config), **options})

    def to_dict(self) -> dict[str, Any]:
        """What save() writes and from_dict() takes. Fields newer than the first release only where they matter."""
        values = dataclasses.asdict(self)
        values["qkv"] = None if self.qkv is None else list(self.qkv)
        return {k: v for k, v in values.items() if k not in _SINCE_0_1 or v != _SINCE_0_1[k]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdaMixConfig:
        """Raises ValueError for a key that is not a field, and for an unknown version before all else."""
        if not isinstance(values, dict):
            raise ValueError(f"config: got {type(values).__name__}, expected a JSON object")
        if values.get("version", CONFIG_VERSION) != CONFIG_VERSION:
            raise ValueError(
                f"version: got {values['version']!r}, expected {CONFIG_VERSION}, the one this release reads"
            )
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)} - set(_ALIASES) - {"bias"})
        if unknown:
            raise ValueError(f"config: got unknown keys {unknown}, expected the fields of AdaMixConfig")
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; a folder receives adamix_config.json. Atomic: the old file or the new one."""
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdaMixConfig:
        """Reads what save wrote. Raises ValueError, naming the file, for JSON that is not such a config."""
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        return cls.from_dict(read_json(path, "an AdaMix config"))


def _readable(alias: str, name: str) -> None:
    """config.lora_alpha reads config.alpha. No longer a field, or dataclasses.replace(config, alpha=...) would hand on
    both the new value and the old one under its other name."""
    del AdaMixConfig.__dataclass_fields__[alias]
    setattr(AdaMixConfig, alias, property(lambda self: getattr(self, name), doc=f"PEFT's name for {name}."))


for _alias, _name in _ALIASES.items():
    _readable(_alias, _name)
