"""What a name brings into a pack, and how it is read from a folder of save_adamix."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from ..models.centroid import Centroid
from ..models.config import AdaMixConfig
from ..models.factors import NAMES, Factors
from ..models.header import CHECKPOINT_NAME, read_header, read_tensors
from ..modules._banks import lora_scaling, merged_bank
from ..routing import LEARNED

_TASKS = ("SequenceClassification", "TokenClassification")


@dataclass
class AdapterPart:
    """out = x + act(x Wd^T + bd) Wu^T + bu. down_weight [r, H], down_bias [r], up_weight [H, r], up_bias [H]."""

    down_weight: torch.Tensor
    down_bias: torch.Tensor
    up_weight: torch.Tensor
    up_bias: torch.Tensor
    activation: str | None

    @property
    def rank(self) -> int:
        return self.down_weight.shape[0]

    def tensors(self) -> list[torch.Tensor]:
        return [self.down_weight, self.down_bias, self.up_weight, self.up_bias]


@dataclass
class LoraPart:
    """out = base + (x A_g^T) B_g^T on the columns of each group g: the scaling is in B.

    lora_a [G*r, K], lora_b [G*Ng, r]; offsets: first column of each of the G groups; out_features: N.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    offsets: tuple[int, ...]
    out_features: int

    @property
    def rank(self) -> int:
        return self.lora_b.shape[1]

    @property
    def width(self) -> int:
        """Ng, the columns of a group."""
        return self.lora_b.shape[0] // len(self.offsets)

    def tensors(self) -> list[torch.Tensor]:
        return [self.lora_a, self.lora_b]

    def whole(self) -> LoraPart:
        """The same update as one group over all columns: rank G*r, B block diagonal."""
        if self.offsets == (0,) and self.width == self.out_features:
            return self
        lora_b = self.lora_b.new_zeros(self.out_features, len(self.offsets) * self.rank)
        for group, (block, offset) in enumerate(zip(self.lora_b.chunk(len(self.offsets)), self.offsets, strict=True)):
            lora_b[offset : offset + self.width, group * self.rank : (group + 1) * self.rank] = block
        return LoraPart(self.lora_a, lora_b, (0,), self.out_features)


Part = AdapterPart | LoraPart


@dataclass
class Source:
    """One adaptation, ready to be put into a slot.

    Attributes:
        name: in the pack. folder: where it was read.
        layers: by path. heads: by path of the module that is trained whole, its tensors by name.
        sizes: (in_features, out_features, fan_in_fan_out) of each layer, where the folder tells.
        labels: names in id order, where the folder tells and the task has any.
        problem: the configuration's problem_type. pooling: what the head reads, None: not told.
        header: of a checkpoint of save_adamix, whose base model is held against the pack's.
        centroid: of the training texts. run: the values of its run file.
    """

    name: str
    folder: Path
    layers: dict[str, Part]
    heads: dict[str, dict[str, torch.Tensor]]
    sizes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    labels: list[str] | None = None
    problem: str | None = None
    pooling: str | None = None
    header: dict[str, Any] | None = None
    centroid: Centroid | None = None
    run: dict[str, Any] | None = None


@torch.no_grad()
def read_adamix(name: str, folder: Path, header: dict[str, Any] | None = None) -> Source:
    """A folder of save_adamix, or a `header` whose tensors lie in `folder`.

    Experts that are not merged are averaged here, each side by itself with its merge scores, as they are in
    evaluation: the name computes in a pack what its model computes alone.

    Raises ValueError: a file is missing or damaged; the gates are learned; a LoRA was merged by a release that kept no
        factors.
    """
    header = read_header(folder / CHECKPOINT_NAME) if header is None else header
    if AdaMixConfig.from_dict(header["config"]).routing == LEARNED and not header["merged"]:
        raise ValueError(
            f"{folder}: got experts with learned gates, which are no single adaptation, expected one that merge(model, "
            "gates='mean') made and save_adamix wrote"
        )
    tensors = read_tensors(folder, header["tensors"])
    heads = {path: _below(tensors, path) for path in header["saved_modules"]}
    layers: dict[str, Part] = {}
    sizes = {}
    for path, facts in header["layers"].items():
        layers[path] = _layer(path, facts, tensors)
        sizes[path] = tuple(facts[key] for key in ("in_features", "out_features", "fan_in_fan_out"))
    base = header["base_model"]
    config = base.get("config") or {}
    return Source(
        name,
        folder,
        layers,
        heads,
        sizes,
        _labels(str(base.get("class")), config) if heads else None,
        config.get("problem_type"),
        base.get("pooling"),
        header,
        Centroid.read(folder / CHECKPOINT_NAME, header.get("centroid")),
    )


def _below(tensors: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    return {key[len(path) + 1 :]: value for key, value in tensors.items() if key.startswith(path + ".")}


def _layer(path: str, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
    try:
        if "bottleneck" in facts:
            return _adapter(path, facts, tensors)
        if "factors" in facts:
            values = {key: tensors[f"{path}.{key}"] for key in NAMES}
            found = Factors.read(path, facts["factors"], facts, values)
            return _scaled(*found.merged_factors(), found.scaling, found.output_offsets, found.out_features)
        if "share" in facts:
            rows, scores = (
                (tensors[f"{path}.lora_{side}"] for side in "ab"),
                (tensors[f"{path}.{s}_score"] for s in "ab"),
            )
            lora_a, lora_b = (merged_bank(bank, score, "reference") for bank, score in zip(rows, scores, strict=True))
            scaling = lora_scaling(facts["alpha"], facts["r"], facts.get("use_rslora", False))
            return _scaled(lora_a[0], lora_b[0], scaling, tuple(facts["output_offsets"]), facts["out_features"])
    except KeyError as error:
        raise ValueError(f"checkpoint: missing keys {error.args[0]!r}") from error
    raise ValueError(
        f"{path}: got a LoRA that a release before version 3 of the format merged, without its factors, expected the "
        "unmerged checkpoint, or one merged and saved anew"
    )


def _adapter(path: str, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AdapterPart:
    def bank(name: str) -> torch.Tensor:
        score = tensors[f"{path}.adapter.{name.partition('_')[0]}_score"]
        return merged_bank(tensors[f"{path}.adapter.{name}"], score, "reference")[0]

    return AdapterPart(bank("down_weight"), bank("down_bias"), bank("up_weight"), bank("up_bias"), facts["activation"])


def _scaled(
    lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, offsets: tuple[int, ...], columns: int
) -> LoraPart:
    return LoraPart(lora_a, lora_b * scaling, offsets, columns)


def classifies(kind: str) -> bool:
    """Whether a class of transformers labels samples or tokens, by its name."""
    return any(task in kind for task in _TASKS)


def _labels(kind: str, config: dict[str, Any]) -> list[str] | None:
    """The label names of a classifier's configuration, which leaves out those of two unnamed ones."""
    if not classifies(kind):
        return None
    names = config.get("id2label")
    if not names:
        count = config.get("num_labels", 2)
        return [f"LABEL_{number}" for number in range(count)]
    return [cast("str", names[key]) for key in sorted(names, key=int)]
