"""What docs/evidence compares: for each of its files of rows the recipe, the methods and the amounts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adamix_kernels.recipes import Limits, expand_methods, load_recipe, run_recipe

from . import data, dialects, sentences

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "evidence"
MACHINE = {
    "training.train_sampling_strategy": "group_by_length", "training.bf16": True, "training.use_cpu": True,
}  # fmt: skip
ROUTED = ["merged", "random"]
CONTROLS = (
    "pfeiffer", "pfeiffer:times_epochs=1.8", "pfeiffer:bottleneck=40", "soup", "adamix:num_experts=1",
    "adamix:num_experts=2,consistency_weight=0", "adamix:consistency_weight=0", "adamix",
)  # fmt: skip
# Without those that the recipe's default methods hold too.
NEW_CONTROLS = tuple(m for m in CONTROLS if m not in ("pfeiffer", "adamix", "adamix:consistency_weight=0"))
RATES = (0.003, 0.01, 0.001)
SEARCHED = ("pfeiffer", "adamix:num_experts=1", "adamix:consistency_weight=0", "adamix")


@dataclass(frozen=True)
class Study:
    """One file of rows, NAME.jsonl.

    Attributes:
        needs: the folder of the data, as it is called in the rows; `make`, where given, writes it from the others.
        changes: of the recipe evidence/minilm.
    """

    name: str
    needs: str
    methods: Sequence[str]
    changes: dict[str, Any]
    limits: Limits = field(default_factory=Limits)
    seeds: int = 5
    make: Callable[[Path, Path], None] | None = None

    @property
    def rows(self) -> Path:
        return FOLDER / f"{self.name}.jsonl"

    def run(self) -> None:
        """Trains what the rows lack, in the current folder, which holds the data. Finished rows are left alone."""
        recipe = load_recipe("evidence/minilm").changed({**MACHINE, "data": self.needs, **self.changes})
        methods = expand_methods(self.methods, recipe)
        run_recipe(recipe, methods, range(self.seeds), self.rows, limits=self.limits, progress=True)


def _epochs(number: float, evaluations: Sequence[str], batch: int = 16, **more: Any) -> dict[str, Any]:
    return {
        "training.num_train_epochs": float(number), "training.per_device_train_batch_size": batch,
        "evaluations": list(evaluations), **more,
    }  # fmt: skip


def _at(method: str, rate: float) -> str:
    return f"{method}{',' if ':' in method else ':'}learning_rate={rate}"


# Sections on half of the encoder, for want of a machine: the first three of its six layers.
HALF = {"model_config.num_hidden_layers": 3}
LORAS = {
    "method": "lora", "num_experts": 4, "r": 4, "alpha": 8.0, "share": None, "routing": "batch",
    "consistency_weight": 1.0,
}  # fmt: skip
_LEARNED = "adamix:consistency_weight=0,routing=learned"
GATED = (
    "lora:alpha=8,r=4", "lora:alpha=8,r=4,times_epochs=1.8", "lora:alpha=32,r=16", "equal", "adamix",
    f"{_LEARNED},top_k=2", _LEARNED,
)  # fmt: skip
# With these the controls of AdaMix are whole; the others are rows of the studies of gates.
LORA_CONTROLS = (
    "soup", "adamix:num_experts=1", "adamix:consistency_weight=0,num_experts=2", "adamix:consistency_weight=0",
)  # fmt: skip
# What might help AdaMix where it learns nothing: see the page on gates.
REMEDIES = (
    "learning_rate=0.006", "routing=token", "share=down", "consistency_weight=0", "times_epochs=4", "num_experts=2",
    "routing=sample",
)  # fmt: skip
TOGETHER = ("adamix:together=0.5",)
# What does: B shared, as published, or a lower rate and more epochs.
SHARED = "adamix:share=up"
LONG_RATES = {
    GATED[0]: (0.003, 0.001), "adamix": (0.003, 0.001, 0.0005), SHARED: (0.003, 0.001),
}  # fmt: skip
LONG = (GATED[0], SHARED, _at(SHARED, 0.001), _at("adamix", 0.001), _at("adamix:consistency_weight=0", 0.001))
SEARCHED_GATES = (GATED[0], *GATED[2:3], *GATED[4:])
WARM_UPS = tuple(f"adamix:warmup_ratio={ratio}" for ratio in (0, 0.06, 0.2))
SHOTS = Limits(shots=30)
STUDIES = (
    Study("sst2", "sst2", ["default"], _epochs(1, ROUTED)),
    # The plain adapter, AdaMix and weight 0 of the comparisons of controls are rows of sst2 and sst2_30_shots.
    Study("sst2_controls", "sst2", NEW_CONTROLS, _epochs(1, ["merged"])),
    # Whether AdaMix trails after one epoch because of its warm-up.
    Study("sst2_warm_up", "sst2_held_back", WARM_UPS, _epochs(1, ["merged"]), Limits(train_rows=3500), seeds=3,
          make=data.hold_back),
    Study("sst2_4_epochs", "sst2", ["pfeiffer", "adamix:routing=batch"], _epochs(4, ROUTED)),
    Study("sst2_30_shots", "sst2", ["default"], _epochs(60, ROUTED, 8), SHOTS),
    # One expert with both passes also at the rate that the search below finds for it.
    Study("sst2_30_controls", "sst2", (*NEW_CONTROLS, _at("adamix:num_experts=1", 0.01)),
          _epochs(60, ["merged"], 8), SHOTS),
    Study("sst2_30_search", "sst2_held_back", [_at(m, r) for m in SEARCHED for r in RATES],
          _epochs(60, ["merged"], 8), SHOTS, seeds=1, make=data.hold_back),
    Study("sst2_first_1000", "sst2_first_1000", CONTROLS, _epochs(20, ROUTED), Limits(train_rows=data.FIRST),
          make=data.first_rows),
    Study("acceptable_search", "acceptable_held_back", [_at(m, r) for m in SEARCHED for r in RATES],
          _epochs(10, ["merged"], 8, **HALF), Limits(train_rows=200), seeds=1,
          make=sentences.write_acceptable_held_back),
    Study("acceptable", "acceptable", CONTROLS, _epochs(20, ["merged"], 8, **HALF),
          Limits(train_rows=240, dev_rows=436), make=sentences.write_acceptable),
    Study("gates_search", "sst2_held_back", [_at(m, r) for m in SEARCHED_GATES for r in (0.003, 0.01)],
          _epochs(5, ["merged"], 8, adamix=LORAS, **HALF), Limits(train_rows=400, dev_rows=436), seeds=1,
          make=data.hold_back),
    Study("gates_dialects_search", "dialects_held_back", [_at(m, r) for m in SEARCHED_GATES for r in (0.003, 0.01)],
          _epochs(5, ["merged"], 8, adamix=LORAS, **HALF), Limits(train_rows=800, dev_rows=300), seeds=1,
          make=dialects.write_dialects_held_back),
    Study("gates_dialects_remedies", "dialects_held_back", [f"adamix:{change}" for change in REMEDIES],
          _epochs(5, ["merged"], 8, adamix=LORAS, **HALF), Limits(train_rows=800, dev_rows=300), seeds=1,
          make=dialects.write_dialects_held_back),
    Study("long_dialects_search", "dialects_held_back", [_at(m, r) for m, rates in LONG_RATES.items() for r in rates],
          _epochs(20, ["merged", "fixed"], 8, adamix=LORAS, **HALF), Limits(train_rows=800, dev_rows=300), seeds=1,
          make=dialects.write_dialects_held_back),
    Study("long_dialects", "dialects", LONG, _epochs(20, ["merged", "fixed"], 8, adamix=LORAS, **HALF),
          Limits(train_rows=800), make=dialects.write_dialects),
    Study("questions", "e2e_questions", [m for m in (*GATED, *LORA_CONTROLS, *TOGETHER) if m != "equal"],
          _epochs(8, ["merged"], 8, adamix=LORAS, **HALF), Limits(train_rows=200, dev_rows=436),
          make=data.write_questions),
    *(Study(f"{name}_{set_}", set_, methods, _epochs(epochs, ["merged"], 8, adamix=LORAS, **HALF), limits, make=make)
      for name, methods in (("gates", GATED), ("lora_controls", LORA_CONTROLS), ("together", TOGETHER),
                              ("shared", (SHARED, _at(SHARED, 0.001))))
      for set_, epochs, limits, make in (
          ("sst2", 8, Limits(train_rows=200, dev_rows=436), None),
          ("dialects", 5, Limits(train_rows=800), dialects.write_dialects))),
)  # fmt: skip
