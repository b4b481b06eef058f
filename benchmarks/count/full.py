"""What the losses' full gradient (detach_target=False) costs beside the detached one, by the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .table import Row

# Of the detached one's time, at most, on every GPU.
MOST = 1.4
_FULL, _DETACHED = "adamix_loss_full/", "adamix_loss/"


def pairs(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """(full, detached) of the same size, backend and target."""
    by_key = {row.key: row for row in rows}
    found = []
    for (op, *size), row in by_key.items():
        other = by_key.get((op.replace(_FULL, _DETACHED), *size))
        if op.startswith(_FULL) and other is not None:
            found.append((row, other))
    return found


def times(full: Row, detached: Row) -> dict[str, float]:
    """GPU -> the full gradient's time over the detached one's."""
    return {
        gpu: (full.floor / share) / (detached.floor / detached.shares[gpu])
        for gpu, share in full.shares.items()
        if gpu in detached.shares
    }


def problems(rows: Iterable[Row], wanted: Collection[object]) -> list[str]:
    """A line for each of the rows whose keys are wanted that takes longer than it may."""
    return [
        f"{full}: {ratio:.3f} of the detached gradient's time on {gpu}, at most {MOST}"
        for full, detached in pairs(rows)
        if full.key in wanted or detached.key in wanted
        for gpu, ratio in times(full, detached).items()
        if ratio > MOST
    ]


def sentence(rows: Iterable[Row]) -> str:
    """What it costs in instructions and in time; empty without rows of both."""
    both = pairs(rows)
    if not both:
        return ""
    instructions = [full.instructions / detached.instructions for full, detached in both]
    most, where = max((ratio, gpu) for full, detached in both for gpu, ratio in times(full, detached).items())
    return (
        f"The full gradient (detach_target=False) takes {min(instructions):.2f} to {max(instructions):.2f} of the "
        f"detached one's instructions, and at most {most:.2f} of its time (on a {where}); `make count` fails above "
        f"{MOST}."
    )
