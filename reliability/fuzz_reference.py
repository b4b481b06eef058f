"""Random calls of every public function on the reference backend: `python -m reliability run fuzz_reference`."""

from __future__ import annotations

from collections.abc import Iterator

from .fuzz import adapters, gated, loras, losses, merges, mixtures, models, modules, routing
from .fuzz.case import check
from .fuzz.draws import ALL_FLOATS, Sizes
from .fuzz.run import SEED, figure, run_cases
from .record import Figure

TITLE = "Fuzz: every public function on the reference"
COUNTS = {"full": 5000, "small": 12}
OPS = {
    "routed_adapter": adapters.routed_adapter_cases,
    "routed_lora": loras.routed_lora_cases,
    "routed_adapter with gates": gated.gated_adapter_cases,
    "routed_lora with gates": gated.gated_lora_cases,
    "mixture_lora": mixtures.mixture_lora_cases,
    "merge_experts": merges.merge_experts_cases,
    "merge_lora": merges.merge_lora_cases,
    "consistency_loss": losses.consistency_cases,
    "adamix_loss": losses.adamix_cases,
    "linear_adamix_loss": losses.linear_cases,
}
PLAIN = {
    "Router.draw": (routing.draws, routing.check_draw),
    "double_batch": (routing.batches, routing.check_doubling),
    "RoutedAdapter, RoutedLoRALinear, ExpertSoup, AdamixMergedLinear": (modules.layers, modules.check_layer),
    "adapt, summary, disable, use_experts, eval_routing, save_adamix, load_adamix, merge, unmerge": (
        models.adaptations,
        models.check_adaptation,
    ),
}


def run(size: str, backend: str = "reference") -> Iterator[Figure]:
    """A figure for every public function, in cases that ran to their end. The full size's seed is `run.SEED`."""
    count, small = COUNTS[size], size == "small"
    about = "drawn cases" if small else f"drawn cases, seed {SEED}"
    for name, strategy in OPS.items():
        cases = strategy(ALL_FLOATS, Sizes())
        yield figure(run_cases(f"{name}: {about}", cases, lambda case: check(case, backend), count, small), count)
    for name, (strategy, held) in PLAIN.items():
        yield figure(run_cases(f"{name}: {about}", strategy(), held, count, small), count)
