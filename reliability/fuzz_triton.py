"""Random calls that reach every Triton kernel: `TRITON_INTERPRET=1 python -m reliability run fuzz_triton`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import pkgutil
import warnings
from collections.abc import Iterator
from unittest import mock

import torch

from adamix_kernels import backends

from .fuzz import adapters, gated, loras, losses, merges, mixtures, routers
from .fuzz.draws import HALVES_AND_FLOAT, Sizes
from .fuzz.kernels import Group, all_of, run_groups
from .record import Figure

TITLE = "Fuzz: every Triton kernel, interpreted on the CPU"
COUNTS = {"full": 500, "small": 2}
_HALVES = HALVES_AND_FLOAT[1:]
_OPS = backends()["triton"].ops


def run(size: str) -> Iterator[Figure]:
    """Figures of the ops, then of every kernel. Raises RuntimeError where no kernel can be interpreted."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "fuzz_triton: got no interpreter, expected TRITON_INTERPRET=1 in the environment from the start, and the "
            'packages triton and numpy<2.4 ("make test" installs both)'
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of the infinities that are drawn
        yield from run_groups(groups(), "triton", launches, kernels(), COUNTS[size], size == "small")


def kernels() -> tuple[str, ...]:
    """The names of all kernels in the ops' triton_impl, found there."""
    return tuple(sorted({name for module in _modules() for name in vars(module) if _is_kernel(module, name)}))


def _is_kernel(module, name: str) -> bool:
    return name.endswith("_kernel") and hasattr(getattr(module, name), "fn")


@functools.cache
def _modules():
    found = [importlib.import_module(f"adamix_kernels.ops.{shared}") for shared in ("_adapter_planes", "_gated_sum")]
    for op in _OPS:
        package = importlib.import_module(f"adamix_kernels.ops.{op}.triton_impl")
        found.append(package)
        for info in pkgutil.iter_modules(package.__path__):
            found.append(importlib.import_module(f"{package.__name__}.{info.name}"))
    return tuple(found)


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the kernels launched within, by any module."""
    names: list[str] = []

    def spied(real):
        def launch(kernel, grid, *args, **meta):
            if 0 not in grid:
                names.append(kernel.fn.__name__)
            real(kernel, grid, *args, **meta)

        return launch

    with contextlib.ExitStack() as stack:
        for module in _modules():
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", spied(module.launch)))
        yield names


def groups() -> list[Group]:
    # The interpreter's programs run one after another in Python, and take most of a case.
    return [dataclasses.replace(group, twice=4) for group in _groups()]


def _groups() -> list[Group]:
    dtypes, sizes = HALVES_AND_FLOAT, Sizes()
    many_tokens = Sizes(tokens=16)
    adapter = "adapter_forward_kernel", "adapter_input_grad_kernel", "adapter_weight_grad_kernel"
    lora = "lora_forward_kernel", "lora_dx_kernel", "lora_grads_kernel"
    return [
        Group("routed_adapter", adapters.routed_adapter_cases(dtypes, sizes), adapter),
        Group(
            "routed_adapter, rows split", adapters.routed_adapter_cases(dtypes, sizes),
            ("adapter_plane_sum_kernel",), _adapter_planes,
        ),
        Group(
            "routed_adapter, one read", adapters.routed_adapter_cases(_HALVES, sizes, whole=True, one_up=True),
            ("adapter_grad_out_pass_kernel",), one_read,
        ),
        Group("routed_lora", loras.routed_lora_cases(dtypes, sizes), lora),
        Group(
            "routed_lora, one read", loras.routed_lora_cases(_HALVES, sizes, whole=True, one_up=True),
            ("lora_grad_out_pass_kernel",), one_read,
        ),
        Group(
            "routed_lora, rows split", loras.routed_lora_cases(dtypes, many_tokens),
            ("lora_sum_kernel",), _lora_planes,
        ),
        Group(
            "merge_experts", merges.merge_experts_cases(dtypes, sizes),
            ("merge_experts_kernel", "merge_experts_grad_kernel", "merge_scores_grad_kernel"),
        ),
        Group("merge of many banks", merges.merge_banks_cases(dtypes, sizes), ("merge_banks_kernel",)),
        Group("merge_lora", merges.merge_lora_cases(dtypes, sizes), ("merge_lora_kernel",)),
        Group("consistency_loss", losses.consistency_cases(dtypes, sizes), ("pair_rows_kernel", "pair_grad_kernel")),
        Group("adamix_loss", losses.adamix_cases(dtypes, sizes), ("pair_rows_kernel",)),
        Group(
            "adamix_loss, many classes", losses.adamix_cases(dtypes, sizes),
            ("pair_wide_kernel", "pair_wide_grad_kernel"), _wide,
        ),
        Group("adamix_loss, rows counted first", losses.adamix_cases(dtypes, sizes), ("pair_count_kernel",), _counted),
        Group("linear_adamix_loss", losses.linear_cases(dtypes, sizes), ("pair_rows_kernel",)),
        Group("router", routers.router_cases(dtypes, sizes), ("router_kernel",)),
        Group("mixture_lora", mixtures.mixture_lora_cases(dtypes, sizes), ("mixture_lora_forward_kernel",)),
        Group(
            "mixture_lora, many experts", mixtures.mixture_lora_cases(dtypes, sizes, many=True),
            ("router_kernel", "gated_rows_forward_kernel"),
        ),
        *_gated("gated_adapter", gated.gated_adapter_cases), *_gated("gated_lora", gated.gated_lora_cases),
    ]  # fmt: skip


def _gated(op: str, cases) -> list[Group]:
    """Experts of one tile, and more of them, whose rows are grouped: kernels of the latter are named so."""
    package = f"adamix_kernels.ops.{op}.triton_impl"
    own = sorted(
        name
        for module in _modules()
        if module.__name__.startswith(package)
        for name in vars(module)
        if _is_kernel(module, name) and getattr(module, name).fn.__module__.startswith(package)
    )
    by_rows = (*dict.fromkeys(name for name in own if "rows" in name), "gated_rows_sum_kernel")
    one_tile = tuple(dict.fromkeys(name for name in own if "rows" not in name))
    made = ((op, False, one_tile), (f"{op}, many experts", True, by_rows))
    return [Group(about, cases(HALVES_AND_FLOAT, Sizes(), many=many), kernels) for about, many, kernels in made]


def _plan(op: str, module: str = "plan"):
    return importlib.import_module(f"adamix_kernels.ops.{op}.triton_impl.{module}")


def _adapter_planes():
    return mock.patch.object(_plan("routed_adapter", "weights"), "count_splits", return_value=12)


def _lora_planes():
    """Tiles of 16 rows, and a split for each."""
    weights = _plan("routed_lora", "weights")
    real = weights.config
    config = lambda *args: real(*args)._replace(rows=16)  # noqa: E731
    return all_of(mock.patch.object(weights, "config", config), mock.patch.object(weights, "MIN_TILES", 1))


def one_read(device: str = "cpu"):
    """Backwards of few rows, too, read dy once, by three programs."""
    planner = importlib.import_module("adamix_kernels.ops._one_read")
    few = {planner.capability(torch.device(device)): 3}
    return all_of(mock.patch.object(planner, "MIN_ROWS", 1), mock.patch.dict(planner.PROGRAMS, few))


def _wide():
    """More than 8 classes are many."""
    plan, package = _plan("consistency"), importlib.import_module("adamix_kernels.ops.consistency.triton_impl")
    return all_of(*(mock.patch.object(module, "FEW", 8) for module in (plan, package)))


def _counted():
    plan = _plan("consistency")
    return all_of(mock.patch.object(plan, "ALONE", 0), mock.patch.object(plan, "TILE", 2))
