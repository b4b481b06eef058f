"""A child of test_direct_calls.py: calls that differ in one property, planned before and not, by what they launch.

`python host_calls.py FOLDER '[[SEED, COUNT], [SEED, COUNT, PROPERTY, TRAIT]]'`: pairs that differ in that property
alone, with plans made not to see a trait of tensors, which must show. Each list runs in a fork, so that all is imported
once, and leaves what it printed in FOLDER/<its number>.<exit status>. The driver launches nothing
(benchmarks/host/driver.py), so results are compared by their launches: kernel, grid, stream and every argument,
addresses by the tensor that they belong to.
"""

import contextlib
import json
import os
import random
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.host import driver as host_driver

NOTED = []
# Tensors that were launched on: were they freed, another could have their address.
HELD = []
# Every table of merge_banks, by its address.
TABLES = {}


class Noting:
    """Triton's launcher without its C function: what would reach that is noted."""

    launch_cooperative_grid = launch_pdl = False

    def __init__(self, src, metadata):
        self.kinds = tuple(src.signature.values())
        self.kernel = src.fn.__name__, tuple(map(str, src.constants.items())), str(metadata)

    def __call__(self, grid_x, grid_y, grid_z, stream, function, *arguments):
        self.launch(grid_x, grid_y, grid_z, stream, function, False, False, None, None, *arguments)

    def launch(self, *arguments):
        values = arguments[-len(self.kinds) :]
        given = [addressed(v) for v, kind in zip(values, self.kinds, strict=True) if kind != "constexpr"]
        NOTED.append((self.kernel, self.kinds, arguments[:10], given))


def addressed(value):
    if isinstance(value, torch.Tensor):
        HELD.append(value)
        value = value.data_ptr()
    # merge_banks' table is what its plan is.
    return tuple(TABLES[value].flatten().tolist()) if value in TABLES else value


host_driver.install(lambda _: Noting)

from host_kinds import KINDS, Adapter, Merge  # noqa: E402

from adamix_kernels.ops import _direct, _triton_plans  # noqa: E402
from adamix_kernels.ops.merge import op as merge_op  # noqa: E402
from adamix_kernels.ops.merge import triton_impl as merge_impl  # noqa: E402
from adamix_kernels.ops.routed_adapter import api  # noqa: E402


def held(run):
    def holding(*arguments, **options):
        HELD.extend(arguments)
        HELD.append(run(*arguments, **options))
        return HELD[-1]

    return holding


def noted(make):
    def noting(*arguments):
        table = make(*arguments)
        return TABLES.setdefault(table.data_ptr(), table)

    return noting


merge_impl._table = noted(merge_impl._table)
# A plan's memory too.
torch.Tensor.new_empty, torch.empty_like = held(torch.Tensor.new_empty), held(torch.empty_like)
_triton_plans.Plan.__call__ = held(_triton_plans.Plan.__call__)


def launched(op, p, arguments, options):
    """What a forward and a backward launch, addresses by the tensor that they lie in; or the error that a call is."""
    NOTED.clear()
    HELD.clear()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = p["tf32"]
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=p.get("autocast", False)):
            try:
                out = op.run(arguments, options)
            except (TypeError, ValueError) as error:
                return type(error), str(error)
        grads, outs = (), [out] if isinstance(out, torch.Tensor) else out
        if isinstance(out, torch.Tensor) and out.requires_grad:
            gradient = torch.zeros_like(out) if p["gradient"] == "contiguous" else out.new_zeros(()).expand_as(out)
            leaves = [t for t in arguments if t is not None and t.requires_grad]
            grads = torch.autograd.grad(out, leaves, gradient)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    # merge_banks' own results lie in one memory or not.
    given = [*arguments, *options.values(), *(() if isinstance(op, Merge) else outs), *grads]
    given = [t for t in given if isinstance(t, torch.Tensor) and t.numel()]
    results = [(tuple(t.shape), t.dtype, t.is_contiguous(), t.requires_grad) for t in (*outs, *grads)]
    return results, [
        (kernel, kinds, start, [named(v, kind, given) for v, kind in zip(values, real(kinds), strict=True)])
        for kernel, kinds, start, values in NOTED
    ]


def real(kinds):
    return [kind for kind in kinds if kind != "constexpr"]


def named(value, kind, given):
    if not kind.startswith("*"):
        return repr(float(value)) if kind.startswith("fp") else value
    if isinstance(value, tuple):
        return value
    for n, t in enumerate(given):
        if 0 <= value - t.data_ptr() < t.untyped_storage().nbytes() - t.storage_offset() * t.element_size():
            return n, value - t.data_ptr()
    return value % 16


def past_the_dispatcher():
    """A planned call does without the op; one that somebody watches does not."""
    op = Adapter()
    p = {name: values[0] for name, values in op.PROPERTIES.items()}
    arguments, options = op.arguments({**p, "needs": ""})
    op.run(arguments, options)
    with mock.patch.object(api, "routed_adapter_op", mock.Mock(side_effect=LookupError)):
        op.run(arguments, options)
        watched = (
            lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
            lambda: mock.patch.dict("os.environ", ADAMIX_CHECK="1"),
            lambda: FlopCounterMode(display=False),
            lambda: torch.device("cpu"),
            _direct.switched_off,
        )
        for watcher in watched:
            with watcher():
                try:
                    op.run(arguments, options)
                except LookupError:
                    continue
            raise AssertionError(f"{watcher} watched, and the dispatcher was left out")


def differing(got, wanted):
    """Where the first difference lies, and both sides of it."""
    if isinstance(got, (list, tuple)) and isinstance(wanted, (list, tuple)) and len(got) == len(wanted):
        n = next(n for n, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
        return f"[{n}]{differing(got[n], wanted[n])}"
    return f": got {got}, expected {wanted}"


def blinded(trait):
    """_direct.traits without one of them, by its place; or plans made on tensors that share memory."""
    if trait == "apart":
        _triton_plans._apart = list
        return
    for name in ("traits", "_whereabouts"):
        setattr(_triton_plans, name, without(trait, getattr(_triton_plans, name)))


def without(trait, real):
    return lambda t: t if t is None else tuple(v for n, v in enumerate(real(t)) if n != trait)


def main(seed, count, changed=None, blind=None):
    draw = random.Random(seed)
    past_the_dispatcher()
    if blind is not None:
        blinded(blind)
    for _ in range(count):
        op = draw.choice([kind for kind in KINDS if changed is None or changed in kind.PROPERTIES])()
        first = {name: draw.choice(values) for name, values in op.PROPERTIES.items()}
        name = changed or draw.choice(list(op.PROPERTIES))
        values = op.PROPERTIES[name]
        second = {**first, name: draw.choice([v for v in values if v != first[name]] if changed else values)}
        calls = [(p, *op.arguments(p)) for p in (first, second)]
        with _direct.switched_off():
            expected = [launched(op, *call) for call in calls]
        for call, wanted in [*zip(calls, expected, strict=True)] * 2:
            got = launched(op, *call)
            if got != wanted:
                kind, where = type(op).__name__, differing(got, wanted)
                print(f"{kind}: {name}: {first[name]} and {second[name]} of {first}: {where}")
                return 1
    hits = sum(plan is not None for table in _direct.Kept.tables for plan in table.values())
    print(f"{count} pairs, {hits} plans")
    return 0 if hits > count // 8 and (changed or merge_op._KNOWN) else 2


def forked(arguments, path):
    child = os.fork()
    if not child:
        status = 1
        with open(path.with_suffix(".part"), "w") as file, contextlib.redirect_stdout(file):
            try:
                status = main(*arguments)
            except BaseException:
                traceback.print_exc(file=file)
        path.with_suffix(".part").rename(path.with_suffix(f".{status}"))
        os._exit(0)
    os.waitpid(child, 0)


if __name__ == "__main__":
    for number, arguments in enumerate(json.loads(sys.argv[2])):
        forked(arguments, Path(sys.argv[1]) / str(number))
