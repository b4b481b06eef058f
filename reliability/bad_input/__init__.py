"""Bad input of every public function, module, configuration, loader and command: what comes back, and what does not.

kinds: what must hold for one; the other modules: tables of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from ..record import Figure
from .kinds import Kind, problem

TITLE = "Bad input"
# The number, of all tables together.
WANTED = 200


def run(size: str) -> Iterator[Figure]:
    """Every size makes every mistake: all of them together take seconds."""
    from . import gate_kinds, loss_kinds, model_kinds, module_kinds, op_kinds, option_kinds

    total = 0
    for about, table in (
        ("routed ops and merging", op_kinds.kinds),
        ("losses", loss_kinds.kinds),
        ("gates: ops, routers, configuration, models", gate_kinds.kinds),
        ("modules, routing, configuration", module_kinds.kinds),
        ("whole models, checkpoints, converters, trainer", model_kinds.kinds),
        ("commands, recipes, data", option_kinds.kinds),
    ):
        start = time.perf_counter()
        made = table()
        names = Counter(kind.name for kind in made)
        wrong = [f"{kind.name}: {found}" for kind in made if (found := problem(kind))]
        wrong += [f"{name}: listed twice" for name, times in names.items() if times > 1]
        total += len(names)
        yield figure(about, made, wrong, time.perf_counter() - start)
    yield Figure("kinds of bad input in all", f"{total}", f"at least {WANTED}", total >= WANTED)


def figure(about: str, made: list[Kind], wrong: list[str], seconds: float = 0.0) -> Figure:
    value = f"{len(made) - len(wrong)} of {len(made)} kinds"
    if wrong:
        value += "; " + "; ".join(wrong[:5])
    expected = "each a ValueError or TypeError naming the argument, nothing computed, nothing changed"
    return Figure(about, value, expected, not wrong, seconds)
