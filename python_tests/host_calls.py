"""A child of test_direct_calls.py: calls that differ in one property, planned before and not, by what they launch.

`python host_calls.py SEED COUNT [PROPERTY TRAIT]`: pairs that differ in that property alone, with plans made not to see
a trait of tensors, which must show. The driver launches nothing (benchmarks/host_driver.py), so results are compared by
their launches: kernel, grid, stream and every argument, addresses by the tensor that they belong to.
"""

import random
import sys
from typing import ClassVar
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import host_driver

NOTED = []
# Tensors that were launched on: were they freed, another could have their address.
HELD = []


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
    if not isinstance(value, torch.Tensor):
        return value
    HELD.append(value)
    return value.data_ptr()


host_driver.install(lambda _: Noting)

from adamix_kernels import routed_adapter, routed_lora  # noqa: E402
from adamix_kernels.ops import _direct, _triton_plans  # noqa: E402
from adamix_kernels.ops.routed_adapter import api  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Adapter:
    """One call of routed_adapter in plain values; `changed` differs from it in one of them."""

    PROPERTIES: ClassVar = {
        "batch": (1, 2, 3), "tokens": (15, 16, 33, 256), "hidden": (16, 40, 64), "rank": (4, 16, 20), "width": (0, 48),
        "experts": (1, 3, 4, 40), "dtype": DTYPES, "down_bias": (True, False), "up_bias": (True, False),
        "down_index": (None, 1, 2), "up_index": (None, 1, 2), "index_dtype": (torch.int64, torch.int32),
        "residual": (None, "x", "other"), "activation": ("gelu", "relu", "silu", "gelu_tanh", None),
        "contiguous": (True, False), "offset": (0, 1, 8), "needs": ("xdu", "x", "d", "u", "du", "xu", ""),
        "tf32": (False, True), "gradient": ("contiguous", "expanded"),
    }  # fmt: skip

    def arguments(self, p):
        experts = p["experts"]
        width = p["width"] or p["hidden"]
        down, up = (experts if p[side] else 1 for side in ("down_index", "up_index"))

        def index(dim, m):
            shape = (p["batch"], p["tokens"])[:dim]
            return None if dim is None else torch.zeros(shape, dtype=p["index_dtype"])

        x = made((p["batch"], p["tokens"], p["hidden"]), p["dtype"], p["offset"], p["contiguous"])
        banks = (
            made((down, p["rank"], p["hidden"]), p["dtype"]),
            made((down, p["rank"]), p["dtype"]) if p["down_bias"] else None,
            made((up, width, p["rank"]), p["dtype"]),
            made((up, width), p["dtype"]) if p["up_bias"] else None,
        )
        for needed, tensors in (("x", (x,)), ("d", banks[:2]), ("u", banks[2:])):
            for t in tensors:
                if t is not None and needed in p["needs"]:
                    t.requires_grad_()
        residual = made((p["batch"], p["tokens"], width), p["dtype"]) if p["residual"] == "other" else None
        if p["residual"] == "x" and width == p["hidden"]:
            residual = x
        return [x, *banks, index(p["down_index"], down), index(p["up_index"], up)], {
            "residual": residual, "activation": p["activation"],
        }  # fmt: skip

    def run(self, arguments, options):
        return routed_adapter(*arguments, **options, backend="triton")


class Lora:
    PROPERTIES: ClassVar = {
        "batch": (1, 2, 3), "tokens": (15, 16, 33, 256), "hidden": (16, 40, 64), "rank": (4, 16), "groups": (1, 2),
        "per_group": (16, 24), "gap": (0, 16), "experts": (1, 3, 4, 40), "dtype": DTYPES, "a_index": (None, 1, 2),
        "b_index": (None, 1, 2), "index_dtype": (torch.int64, torch.int32), "base": (True, False),
        "scaling": (1, 1.0, 2.0, 0.0, -0.0), "dropout_p": (0, 0.0, 0.1, 0.5), "seed": (1, 2, "tensor"),
        "contiguous": (True, False), "offset": (0, 1, 8), "needs": ("xab", "x", "a", "b", "ab", ""),
        "tf32": (False, True), "inplace": (False, True), "gradient": ("contiguous", "expanded"),
        "owner": ("base", "flat", "turned"),
    }  # fmt: skip

    def arguments(self, p):
        groups, per_group = p["groups"], p["per_group"]
        offsets = tuple(g * (per_group + p["gap"]) for g in range(groups))
        width = offsets[-1] + per_group + p["gap"]
        a, b = (p["experts"] if p[side] else 1 for side in ("a_index", "b_index"))

        def index(dim):
            return None if dim is None else torch.zeros((p["batch"], p["tokens"])[:dim], dtype=p["index_dtype"])

        x = made((p["batch"], p["tokens"], p["hidden"]), p["dtype"], p["offset"], p["contiguous"])
        lora_a = made((a, groups * p["rank"], p["hidden"]), p["dtype"])
        lora_b = made((b, groups * per_group, p["rank"]), p["dtype"])
        for needed, t in (("x", x), ("a", lora_a), ("b", lora_b)):
            if needed in p["needs"]:
                t.requires_grad_()
        with_base = p["base"] or p["inplace"]
        seed = torch.zeros((), dtype=torch.int64) if p["seed"] == "tensor" else p["seed"]
        return [x, lora_a, lora_b, index(p["a_index"]), index(p["b_index"])], {
            "base": made((p["batch"], p["tokens"], width), p["dtype"]) if with_base else None,
            "scaling": p["scaling"], "groups": groups, "output_offsets": offsets, "dropout_p": p["dropout_p"],
            "seed": seed, "inplace": p["inplace"], "owner": p["owner"],
        }  # fmt: skip

    def run(self, arguments, options):
        options = dict(options)
        owner = options.pop("owner")
        if options["inplace"]:
            # What base is a view of, as a layer's output is.
            batch, tokens, width = options["base"].shape
            whole = (
                options["base"].view(*{"base": (batch,), "flat": (), "turned": (tokens,)}[owner], -1, width).detach()
            )
            options["base"] = whole if owner == "base" else whole.view(batch, tokens, width)
        return routed_lora(*arguments, **options, backend="triton")


def made(shape, dtype, offset=0, contiguous=True):
    """A tensor whose first number lies `offset` numbers after a multiple of 64 bytes."""
    t = torch.zeros(offset + torch.Size(shape).numel(), dtype=dtype)[offset:]
    if contiguous or len(shape) < 3:
        return t.view(shape)
    return t.view(shape[0], shape[2], shape[1]).transpose(1, 2)


def launched(op, p, arguments, options):
    """What a forward and a backward launch: addresses as the tensor they belong to, others by their order."""
    NOTED.clear()
    HELD.clear()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = p["tf32"]
    try:
        out = op.run(arguments, options)
        grads = ()
        if out.requires_grad:
            gradient = torch.zeros_like(out) if p["gradient"] == "contiguous" else out.new_zeros(()).expand_as(out)
            leaves = [t for t in arguments if t is not None and t.requires_grad]
            grads = torch.autograd.grad(out, leaves, gradient)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    tensors = [*arguments, *options.values(), out, *grads]
    given = {t.data_ptr(): n for n, t in enumerate(tensors) if isinstance(t, torch.Tensor) and t.numel()}
    results = [(tuple(t.shape), t.dtype, t.is_contiguous(), t.requires_grad) for t in (out, *grads)]
    return results, [
        (kernel, kinds, start, [named(v, kind, given) for v, kind in zip(values, real(kinds), strict=True)])
        for kernel, kinds, start, values in NOTED
    ]


def real(kinds):
    return [kind for kind in kinds if kind != "constexpr"]


def named(value, kind, given):
    if not kind.startswith("*"):
        return repr(float(value)) if kind.startswith("fp") else value
    return given.get(value, value % 16)


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


def blinded(trait):
    """_direct.traits without one of them, by its place."""
    real = _triton_plans.traits
    _triton_plans.traits = lambda t: t if t is None else tuple(v for n, v in enumerate(real(t)) if n != trait)


def main(seed, count, changed=None, blind=None):
    draw = random.Random(seed)
    past_the_dispatcher()
    if blind is not None:
        blinded(blind)
    for _ in range(count):
        op = draw.choice((Adapter(), Lora()))
        first = {name: draw.choice(values) for name, values in op.PROPERTIES.items()}
        name = changed or draw.choice(list(op.PROPERTIES))
        second = {**first, name: draw.choice(op.PROPERTIES[name])}
        calls = [(p, *op.arguments(p)) for p in (first, second)]
        with _direct.switched_off():
            expected = [launched(op, *call) for call in calls]
        for call, wanted in [*zip(calls, expected, strict=True)] * 2:
            got = launched(op, *call)
            if got != wanted:
                print(f"{type(op).__name__}: {name}: {first[name]} and {second[name]} of {first}:\n{got}\n{wanted}")
                return 1
    hits = sum(plan is not None for table in _direct.Kept.tables for plan in table.values())
    print(f"{count} pairs, {hits} plans")
    return 0 if hits > count // 4 else 2


if __name__ == "__main__":
    numbers = [int(word) if word.isdigit() else word for word in sys.argv[1:]]
    sys.exit(main(*numbers))
