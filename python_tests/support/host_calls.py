"""A child of test_direct_calls.py: calls that differ in one property, planned before and not, by what they launch.

`python host_calls.py FOLDER '[[SEED, COUNT], [SEED, COUNT, PROPERTY, TRAIT]]'`: pairs that differ in that property
alone, with plans made not to see a trait of tensors, which must show; a fifth, true: calls with gates. Each list runs
in a fork, so that all is imported once, and leaves what it printed in FOLDER/<its number>.<exit status>. The driver
launches nothing
(benchmarks/host/driver.py), so results are compared by their launches: kernel, grid, stream and every argument,
addresses by the tensor that they belong to.

With ADAMIX_CUDA_HOST, beside whose library the nodes in C++ lie, what reaches the driver is compared: with plans those
launch (csrc/autograd/plans.cpp), and without Triton's own launcher does.
"""

import contextlib
import ctypes
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


NODES = bool(os.environ.get("ADAMIX_CUDA_HOST"))
# Of the driver's functions, by number: a kernel and the kinds of its arguments.
FUNCTIONS = {}
_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
# Grid, block, shared memory; stream, attributes; how many of those.
_Config = type("_Config", (ctypes.Structure,), {"_fields_": [
    ("sizes", ctypes.c_uint * 7), ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)
]})  # fmt: skip
_TAKER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))


@_TAKER
def taken(config, function, parameters):
    """cuLaunchKernelEx: what the kernel would have been given, by its own argument types."""
    kernel, kinds = FUNCTIONS[function]
    real = [*(kind for kind in kinds if kind != "constexpr"), "*scratch", "*scratch"]
    values = [_TYPES.get(kind, ctypes.c_uint64).from_address(parameters[n]).value for n, kind in enumerate(real)]
    config = config.contents
    NOTED.append(((function, *kernel), (*kinds, "*", "*"), (*config.sizes, config.stream, config.count), values))


def numbered(launcher):
    """Triton's own launcher, whose kernel is told from others by the driver's number of it."""

    class Numbered(launcher):
        def __init__(self, src, metadata):
            super().__init__(src, metadata)
            kernel = src.fn.__name__, tuple(map(str, src.constants.items()))
            FUNCTIONS[len(FUNCTIONS) + 1] = kernel, tuple(src.signature.values())

    return Numbered


def install():
    if not NODES:
        host_driver.install(lambda _: Noting)
        return
    counted = "return ++launched, 0; }\nint cuCtxGetCurrent"
    assert counted in host_driver._LIBCUDA
    host_driver._LIBCUDA = host_driver._LIBCUDA.replace(
        "int cuLaunchKernelEx", "void (*stand_in_taker)(const void *, void *, void **);\nint cuLaunchKernelEx"
    ).replace(counted, f"stand_in_taker(config, function, arguments); {counted}")
    host_driver._Utils.load_binary = lambda *_: (1, len(FUNCTIONS), 0, 0, host_driver.THREADS)
    count = host_driver.install(numbered)
    ctypes.c_void_p.in_dll(count.library, "stand_in_taker").value = ctypes.cast(taken, ctypes.c_void_p).value


install()

from host_gated_kinds import GATED  # noqa: E402
from host_kinds import KINDS, Adapter, Merge  # noqa: E402

from adamix_kernels.ops import _direct, _node, _triton_plans  # noqa: E402
from adamix_kernels.ops.merge import op as merge_op  # noqa: E402
from adamix_kernels.ops.merge import triton_impl as merge_impl  # noqa: E402
from adamix_kernels.ops.routed_adapter import api  # noqa: E402

# Calls that the nodes in C++ took, and backwards that they asked Python for.
BY_NODE, ASKED = [], []
_ask = _node._backward


def asked(*arguments):
    ASKED.append(1)
    return _ask(*arguments)


_node._backward = asked


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
# A plan's memory too, and copies that a call lets go of before its gradients are made.
torch.empty_like = held(torch.empty_like)
for name in ("new_empty", "contiguous", "reshape", "to"):
    setattr(torch.Tensor, name, held(getattr(torch.Tensor, name)))
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
            if out.grad_fn.name() in ("RoutedAdapterBackward", "RoutedLoRABackward"):
                BY_NODE.append(1)
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


def main(seed, count, changed=None, blind=None, gated=False):
    draw = random.Random(seed)
    past_the_dispatcher()
    if blind is not None:
        blinded(blind)
    for _ in range(count):
        kinds = GATED if gated else KINDS[:2] if NODES else KINDS
        op = draw.choice([kind for kind in kinds if changed is None or changed in kind.PROPERTIES])()
        first = {name: draw.choice(values) for name, values in op.PROPERTIES.items()}
        name = changed or draw.choice(list(op.PROPERTIES))
        values = op.PROPERTIES[name]
        if NODES and draw.random() < 0.7:
            # Else few calls are such as nodes take.
            first.update(contiguous=True, offset=0, autocast=False, wrong=None, gradient="contiguous")
        second = {**first, name: draw.choice([v for v in values if v != first[name]] if changed else values)}
        calls = [(p, *op.arguments(p)) for p in (first, second)]
        with _direct.switched_off():
            expected = [launched(op, *call) for call in calls]
        for call, wanted in [*zip(calls, expected, strict=True)] * 2:
            taken_before = len(BY_NODE)
            got = launched(op, *call)
            # What goes through the dispatcher lets go of copies whose memory gradients may get.
            if got != wanted and (not NODES or len(BY_NODE) > taken_before or not call[0]["needs"]):
                kind, where = type(op).__name__, differing(got, wanted)
                print(f"{kind}: {name}: {first[name]} and {second[name]} of {first}: {where}")
                return 1
    hits = sum(plan is not None for table in _direct.Kept.tables for plan in table.values())
    print(f"{count} pairs, {hits} plans, {len(BY_NODE)} calls and {len(BY_NODE) - len(ASKED)} backwards by nodes")
    if NODES:
        return 0 if len(BY_NODE) - len(ASKED) > count // 8 else 2
    return 0 if hits > count // 8 and (changed or gated or merge_op._KNOWN) else 2


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
