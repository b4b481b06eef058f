"""One implementation's results of drawn calls: `python -m ptx.compare_child BACKEND ARCH COUNT OP ...`.

Which kernels a backend has is fixed when they are imported, so every implementation has a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence

import torch
from hypothesis.strategies import SearchStrategy

from reliability.fuzz import adapters, gated, loras, losses, merges, mixtures, routers
from reliability.fuzz.case import Case, bits, judge, results
from reliability.fuzz.draws import HALVES_AND_FLOAT, Sizes
from reliability.fuzz.run import run_cases

from .draws import steady
from .host import Host, install, summary

OPS: dict[str, SearchStrategy[Case]] = {
    "routed_adapter": adapters.routed_adapter_cases(HALVES_AND_FLOAT, Sizes()),
    "routed_lora": loras.routed_lora_cases(HALVES_AND_FLOAT, Sizes()),
    "gated_adapter": gated.gated_adapter_cases(HALVES_AND_FLOAT, Sizes()),
    "gated_lora": gated.gated_lora_cases(HALVES_AND_FLOAT, Sizes()),
    "router": routers.router_cases(HALVES_AND_FLOAT, Sizes()),
    "mixture_lora": mixtures.mixture_lora_cases(HALVES_AND_FLOAT, Sizes()),
    "merge_experts": merges.merge_experts_cases(HALVES_AND_FLOAT, Sizes()),
    "merge_banks": merges.merge_banks_cases(HALVES_AND_FLOAT, Sizes()),
    "merge_lora": merges.merge_lora_cases(HALVES_AND_FLOAT, Sizes()),
    "consistency_loss": losses.consistency_cases(HALVES_AND_FLOAT, Sizes()),
    "adamix_loss": losses.adamix_cases(HALVES_AND_FLOAT, Sizes()),
    "linear_adamix_loss": losses.linear_cases(HALVES_AND_FLOAT, Sizes()),
}
# Hypothesis draws the smallest case first, which often is an empty one: that many are left out.
_EMPTY = 2


def drawn(op: str, count: int) -> list[Case]:
    """The same cases in every process."""
    cases: list[Case] = []
    with steady():
        run_cases(op, OPS[op], cases.append, count + _EMPTY, False, first_turn=7)
    return cases[_EMPTY:]


def computed(case: Case, backend: str, host: Host | None) -> dict:
    """share: the largest of an error budget. error: what does not hold, or what the executor of PTX reports."""
    if host is not None:
        host.begin()
    share, error = 0.0, ""
    try:
        found = results(case, backend)
        share = judge(case, found, backend)
    except Exception as caught:
        error = str(caught) if isinstance(caught, AssertionError) else f"{case}: {type(caught).__name__}: {caught}"
    if host is not None and host.reports:
        error = f"{case}:\n{summary(host.reports)}"
    return {"share": share, "error": error}


def digest(case: Case) -> str:
    """Of all that was drawn."""
    given = [t for t in (*case.tensors, *case.integers, case.incoming) if t is not None]
    data = b"".join(bits(t).numpy().tobytes() for t in given)
    return hashlib.sha256(repr(case).encode() + data).hexdigest()


def main(arguments: Sequence[str]) -> None:
    backend, arch, count, *ops = arguments
    torch.set_num_threads(1)
    cases = {op: drawn(op, int(count)) for op in ops}
    host = install(int(arch)) if int(arch) else None
    found = {}
    for op in ops:
        calls = [computed(case, backend, host) for case in cases[op]]
        found[op] = {"drawn": [digest(case) for case in cases[op]], "calls": calls}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
