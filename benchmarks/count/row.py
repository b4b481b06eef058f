"""A row of the table from one call's launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from . import model
from .cases import Work, fingerprint
from .launch import Counted
from .table import Row


def made(work: Work, backend: str, target: int, launches: Sequence[Counted]) -> Row:
    """The counts of all launches, the shape of the one that takes longest, and the predictions."""
    each, floor = [one.launch for one in launches], work.floor
    gpus = [gpu for gpu in model.GPUS if gpu.target == target]
    times = model.times(each, gpus[0])
    at = max(range(len(each)), key=lambda n: times[n].seconds)
    longest, main = each[at], launches[at]
    together = model.together(longest, gpus[0])
    an_sm = -(-together // gpus[0].multiprocessors)
    instructions, ptx = (sum(values) for values in zip(*((one.launch.instructions, one.ptx) for one in launches)))
    waves, least = (sum(values) for values in zip(*((one.launch.bank_waves, one.least_waves) for one in launches)))
    shares = {gpu.name.lower(): model.share(each, gpu, floor) for gpu in model.GPUS if gpu.target == target}
    return Row(
        work.op, backend, work.case.shape, work.dtype, target,
        kernels="+".join(f"{name} x{n}" if n > 1 else name for name, n in Counter(o.kernel for o in each).items()),
        launches=len(each),
        floor=round(floor),
        instructions=round(instructions),
        a_byte=instructions / floor,
        ptx=round(ptx),
        sass_ratio=instructions / max(1, ptx),
        loaded=sum(one.loaded for one in each) / floor,
        distinct=sum(one.distinct for one in each) / floor,
        device=sum(one.device for one in times) / floor,
        in_flight=round(longest.in_flight * together / min(together, gpus[0].multiprocessors)),
        registers=main.registers,
        shared_bytes=main.shared,
        blocks_an_sm=an_sm,
        warps_an_sm=an_sm * longest.warps,
        waves=longest.blocks / together,
        barriers=main.barriers,
        bank_waves=waves / least if least else 1.0,
        limit=times[at].limit,
        **{name: shares.get(name) for name in ("v100", "a100", "h100", "h200", "b200")},
        sampled=min(one.sampled for one in launches),
        source=fingerprint(work.folder, backend),
    )  # fmt: skip


def details(target: int, launches: Sequence[Counted]) -> list[str]:
    """A line for each launch: its counts, and every limit of the target's first GPU in microseconds."""
    gpu = next(gpu for gpu in model.GPUS if gpu.target == target)
    made = []
    for one, spent in zip(launches, model.times([one.launch for one in launches], gpu)):
        limits = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in spent.limits.items())
        launch = one.launch
        made.append(
            f"  {launch.kernel}: {launch.blocks} blocks of {launch.warps} warps, {launch.resident} resident, "
            f"{one.registers} registers, {one.shared} B; {launch.instructions / 1e6:.2f} M instructions (PTX x "
            f"{one.ratio:.2f}); loaded {launch.loaded / 1e6:.2f}, stored {launch.stored / 1e6:.2f}, distinct "
            f"{launch.distinct / 1e6:.2f}, device {spent.device / 1e6:.2f} MB; {launch.in_flight:.0f} B in flight; "
            f"{one.barriers:g} barriers a step; {gpu.name}: {spent.seconds * 1e6:.1f} us ({limits}); "
            f"{one.sampled} blocks ran"
        )
    return made
