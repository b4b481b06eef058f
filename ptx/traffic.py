"""What memory access costs, counted in the compiled PTX: `python -m ptx.traffic --op merge adapter --arch 90`.

For every launch: 32-byte sectors that the warps' loads and stores touch, against the fewest that hold their bytes and
against the distinct bytes; passes over the banks of shared memory against the fewest; matrix products of 16x8; warp
instructions. For every op: distinct bytes of all launches against its floor, every argument once. With each launch the
instructions that waste most, by the line of Python that they come from.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import host as hosts
from .host import Launch
from .program import How

_GLOBAL, _SHARED = (
    ("ld.global", "st.global", "cp.async"),
    ("ld.shared", "st.shared", "ldmatrix", "stmatrix", "cp.async"),
)
# What an instruction takes more than this many times the least is named.
_WASTE = 1.3


@dataclass
class Ratio:
    have: int = 0
    least: int = 0

    def add(self, have: int, least: int) -> None:
        self.have += have
        self.least += least

    def __str__(self) -> str:
        return f"{self.have} = {self.have / max(1, self.least):.2f}x"


@dataclass
class Traffic:
    """Of one launch. loads, stores: sectors. shared: bank waves. read, written: distinct bytes. waste: (in words,
    sectors or waves too many), the most first."""

    launch: Launch
    loads: Ratio = field(default_factory=Ratio)
    stores: Ratio = field(default_factory=Ratio)
    shared: Ratio = field(default_factory=Ratio)
    waste: list[tuple[str, int]] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Bytes that came from outside: what the launch itself wrote before it read it does not count."""
        return int(self.launch.outcome.touched[:, 0].sum()) * 32

    @property
    def written(self) -> int:
        return int(self.launch.outcome.touched[:, 1].sum()) * 32


def traffic(launch: Launch) -> Traffic:
    """The figures of a launch that ran with How(statistics=True)."""
    found, waste = Traffic(launch), {}
    statements = launch.program.kernel.statements
    for statement, name, row in zip(statements, launch.program.names, launch.statistics.tolist(), strict=True):
        _, sectors, least_sectors, _, waves, least_waves, _ = row
        if name in _GLOBAL:
            (found.stores if name == "st.global" else found.loads).add(sectors, least_sectors)
            _note(waste, f"{name} at {statement.source.split(' ')[0]}", sectors, least_sectors)
        if name in _SHARED:
            found.shared.add(waves, least_waves)
            _note(waste, f"banks of {name} at {statement.source.split(' ')[0]}", waves, least_waves)
    found.waste = sorted(waste.items(), key=lambda pair: -pair[1])
    return found


def _note(waste: dict[str, int], what: str, have: int, least: int) -> None:
    if have > _WASTE * least:
        waste[what] = waste.get(what, 0) + have - least


def described(one: Traffic, most: int = 3) -> str:
    launch = one.launch
    grid, again = "x".join(map(str, launch.grid)), one.loads.have * 32 / max(1, one.read)
    lines = [
        f"  {launch.kernel.removesuffix('_kernel'):20s} grid {grid:12s} {launch.warps} warps; "
        f"load sectors {one.loads}, {again:.2f}x distinct; store sectors {one.stores}; "
        f"read {one.read / 1e3:.0f} kB, written {one.written / 1e3:.0f} kB; bank waves {one.shared}; "
        f"products {launch.outcome.products}; instructions {launch.outcome.instructions}"
    ]
    return "\n".join([*lines, *(f"      {count} too many: {what}" for what, count in one.waste[:most])])


def install(arch: int) -> hosts.Host:
    """A host whose launches run once, counted; races are not looked for."""
    host = hosts.install(arch)
    host.orders = (How(races=False, statistics=True),)
    return host


def main(arguments: Sequence[str] | None = None) -> int:
    from .traffic_ops import OPS, Size

    parser = argparse.ArgumentParser(prog="python -m ptx.traffic", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=tuple(OPS), default=list(OPS))
    parser.add_argument("--arch", type=int, default=80, help="10 * compute capability (default 80)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, default=512, help="rows N (default 512, a multiple of 64)")
    parser.add_argument("--hidden", type=int, default=1024, help="features H (default 1024)")
    parser.add_argument("--classes", type=int, default=50257, help="classes V of the losses (default 50257)")
    options = parser.parse_args(arguments)
    if options.rows < 64 or options.rows % 64:
        parser.error(f"--rows: got {options.rows}, expected a multiple of 64")
    host = install(options.arch)
    size = Size(options.rows, options.hidden, options.classes, options.dtype)
    for op in options.op:
        for title, floor, call in OPS[op](size):
            host.launches.clear()
            call()
            figures = [traffic(launch) for launch in host.launches]
            moved = sum(one.read + one.written for one in figures)
            of_floor = f"; {moved / floor:.2f}x its floor of {floor / 1e3:.0f} kB" if floor else ""
            print(f"{title}: {moved / 1e3:.0f} kB distinct{of_floor}")
            for one in figures:
                print(described(one), flush=True)
    for report in host.reports[:20]:
        print(report)
    return 1 if host.reports else 0


if __name__ == "__main__":
    raise SystemExit(main())
