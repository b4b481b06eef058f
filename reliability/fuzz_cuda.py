"""Random calls that reach every kernel of csrc/, compiled for the CPU: `python -m adamix_kernels._build --host plain`,
then `ADAMIX_CUDA_HOST=build/csrc/adamix_host_plain.so python -m reliability run fuzz_cuda`."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from unittest import mock

import torch

from adamix_kernels import _extension, backends

from .fuzz import adapters, gated, loras, losses, merges, mixtures, routers
from .fuzz.draws import HALVES_AND_FLOAT, Sizes
from .fuzz.kernels import Group, run_groups
from .record import Figure

TITLE = "Fuzz: every C++/CUDA kernel, compiled for the CPU"
COUNTS = {"full": 500, "small": 2}
# The name of a launch -> the kernel. One kernel serves several launches where its parameters differ.
KERNELS = {
    "routed_adapter_forward": "routed_adapter_forward_kernel",
    "routed_adapter_input_grad": "routed_adapter_input_grad_kernel",
    "routed_adapter_weight_grad": "routed_adapter_weight_grad_kernel",
    "routed_adapter_plane_sum": "plane_sum_kernel",
    "routed_adapter_one_pass": "routed_adapter_one_pass_kernel",
    "routed_adapter_pass_sum": "routed_adapter_pass_sum_kernel",
    "routed_adapter_held_forward": "routed_adapter_forward_kernel",  # for which it stands
    "held_one_pass": "held_one_pass_kernel",
    "routed_lora_forward": "routed_lora_forward_kernel",
    "routed_lora_input_grad": "routed_lora_input_grad_kernel",
    "routed_lora_weight_grad": "routed_lora_weight_grad_kernel",
    "routed_lora_forward_mma": "routed_lora_forward_mma_kernel",
    "routed_lora_input_grad_mma": "routed_lora_input_grad_mma_kernel",
    "routed_lora_weight_grad_mma": "routed_lora_weight_grad_mma_kernel",
    "routed_lora_plane_sum": "plane_sum_kernel",
    "routed_lora_one_pass": "routed_lora_one_pass_kernel",
    "routed_lora_pass_sum": "routed_lora_pass_sum_kernel",
    "sample_grads": "sample_grads_kernel",
    "sample_sum": "sample_sum_kernel",
    "merge_banks": "merge_banks_kernel",
    "merge_grad": "merge_grad_kernel",
    "merge_scores_grad": "merge_scores_grad_kernel",
    "merge_lora": "merge_lora_kernel",
    "merge_lora_product": "merge_lora_product_kernel",
    "consistency": "pair_loss_kernel",
    "consistency_cluster": "pair_loss_kernel",
    "consistency_tail": "pair_loss_kernel",
    "consistency_grad": "pair_grad_kernel",
    "consistency_rescale": "pair_scale_kernel",
    "consistency_finish": "pair_finish_kernel",
    "router_forward": "router_forward_kernel",
    "mixture_forward_mma": "mixture_forward_mma_kernel",
}
_GATED = {
    f"gated_{name}": f"gated_{name}_kernel"
    for name in ("forward", "input_grad", "weight_grad", "forward_mma", "input_grad_mma", "weight_grad_mma")
}
_SORTED = {
    f"gated_{name}": f"gated_{name}_kernel"
    for name in ("sort", "sorted_forward_mma", "sorted_input_grad_mma", "sorted_weight_grad_mma", "pair_sum")
}
if "gated_lora" in backends()["cuda"].ops:
    KERNELS |= _GATED | _SORTED | {"gated_plane_sum": "plane_sum_kernel"}
    KERNELS["gated_resident_forward"] = "gated_resident_forward_kernel"


def run(size: str) -> Iterator[Figure]:
    """Figures of the ops, then of every kernel. Raises RuntimeError where the CPU cannot run them."""
    reason = _extension.problem() if _extension.on_host() else "ADAMIX_CUDA_HOST is not set"
    if reason is not None:
        raise RuntimeError(
            f"fuzz_cuda: {reason}; build the kernels for the CPU (python -m adamix_kernels._build --host plain), and "
            "set ADAMIX_CUDA_HOST=build/csrc/adamix_host_plain.so in the environment from the start"
        )
    names = tuple(sorted(set(KERNELS.values())))
    yield from run_groups(groups(), "cuda", launches, names, COUNTS[size], size == "small")


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the kernels launched within."""
    names: list[str] = []
    with launch_names() as made:
        yield names
    names += [KERNELS[name] for name in made]


@contextlib.contextmanager
def launch_names() -> Iterator[list[str]]:
    """Names of the launches made within, from the library's own record; none on a GPU, whose library keeps none."""
    if not _extension.on_host():
        yield []
        return
    library = ctypes.CDLL(str(_extension.library_path()))
    library.adamix_host_launches.restype = ctypes.c_char_p
    library.adamix_host_launches()
    names: list[str] = []
    yield names
    names += library.adamix_host_launches().decode().splitlines()


def groups() -> list[Group]:
    dtypes, sizes = HALVES_AND_FLOAT, Sizes()
    # Rows are shared out from 256 on, and where the planes are small beside what they sum.
    shared_out = Sizes(batch=2, tokens=4, features=9, rank=1, more_rows=300)
    adapter = "routed_adapter_forward_kernel", "routed_adapter_input_grad_kernel", "routed_adapter_weight_grad_kernel"
    lora = "routed_lora_forward_kernel", "routed_lora_input_grad_kernel", "routed_lora_weight_grad_kernel"
    lora_pieces = tuple(name.replace("_kernel", "_mma_kernel") for name in lora)
    pieces = Sizes(features=9, rank=6)
    return [
        Group("routed_adapter", adapters.routed_adapter_cases(dtypes, sizes), adapter),
        Group(
            "routed_adapter, rows on the chip",
            adapters.routed_adapter_cases(dtypes[1:], Sizes(batch=2, tokens=9), whole=True),
            ("routed_adapter_one_pass_kernel", "routed_adapter_pass_sum_kernel"),
        ),
        Group(
            "routed_adapter, one pass on a V100",
            adapters.routed_adapter_cases((torch.float16,), Sizes(batch=2, tokens=9), whole=True),
            ("held_one_pass_kernel", "routed_adapter_pass_sum_kernel"), _volta,
        ),
        Group(
            "routed_adapter, many ranks",
            adapters.routed_adapter_cases(dtypes[1:], Sizes(batch=3, tokens=40), many=True),
            ("sample_grads_kernel", "sample_sum_kernel"),
        ),
        Group("routed_lora", loras.routed_lora_cases(dtypes, sizes), lora),
        Group("routed_lora, pieces", loras.routed_lora_cases(dtypes[1:], pieces, whole=True), lora_pieces),
        Group(
            "routed_lora, one pass",
            loras.routed_lora_cases(dtypes[1:], Sizes(batch=2, tokens=9, more_rows=8), square=True),
            ("routed_lora_one_pass_kernel", "routed_lora_pass_sum_kernel"),
        ),
        Group(
            "routed_adapter, rows shared out", adapters.routed_adapter_cases(dtypes, shared_out), ("plane_sum_kernel",),
        ),
        Group(
            "merge_experts", merges.merge_experts_cases(dtypes, sizes),
            ("merge_banks_kernel", "merge_grad_kernel", "merge_scores_grad_kernel"),
        ),
        Group("merge of many banks", merges.merge_banks_cases(dtypes, sizes), ("merge_banks_kernel",)),
        Group("merge_lora", merges.merge_lora_cases(dtypes, sizes), ("merge_lora_kernel",)),
        Group(
            "merge_lora, matrix units", merges.merge_lora_cases(dtypes[1:], sizes, whole=True),
            ("merge_lora_product_kernel",),
        ),
        Group("consistency_loss", losses.consistency_cases(dtypes, sizes), ("pair_loss_kernel", "pair_grad_kernel")),
        Group("adamix_loss", losses.adamix_cases(dtypes, sizes), ("pair_loss_kernel",)),
        Group(
            "adamix_loss, no row in shared memory", losses.adamix_cases(dtypes, sizes),
            ("pair_loss_kernel",), _small_gpu,
        ),
        Group("linear_adamix_loss", losses.linear_cases(dtypes, sizes), ("pair_loss_kernel",)),
        Group(
            "consistency_loss, several blocks",
            losses.consistency_cases(dtypes, Sizes(tokens=4, classes=2, more_rows=1100)),
            ("pair_finish_kernel",), twice=4,
        ),
        Group("router", routers.router_cases(dtypes, sizes), ("router_forward_kernel",)),
        Group(
            "mixture_lora, pieces", mixtures.mixture_lora_cases(dtypes[1:], pieces, whole=True),
            ("mixture_forward_mma_kernel",),
        ),
        Group(
            "mixture_lora, many experts", mixtures.mixture_lora_cases(dtypes, sizes, many=True),
            ("router_forward_kernel",),
        ),
        *_gated_groups(),
    ]  # fmt: skip


def _gated_groups() -> list[Group]:
    if "gated_lora" not in backends()["cuda"].ops:
        return []
    plain, pieces = (tuple(k for k in _GATED.values() if ("mma" in k) is mma) for mma in (False, True))
    made = []
    for op, cases in (("gated_adapter", gated.gated_adapter_cases), ("gated_lora", gated.gated_lora_cases)):
        one_up = ("gated_resident_forward_kernel",) if op == "gated_adapter" else ()
        whole = cases(HALVES_AND_FLOAT[1:], Sizes(features=9, rank=6), whole=True)
        made += [
            Group(op, cases(HALVES_AND_FLOAT, Sizes()), plain),
            Group(f"{op}, pieces", whole, pieces + one_up),
            Group(f"{op}, many experts", cases(HALVES_AND_FLOAT, Sizes(), many=True), plain[:1]),
        ]
        slots = cases(HALVES_AND_FLOAT[1:], Sizes(features=9), whole=True, many=True)
        made.append(Group(f"{op}, sorted slots", slots, tuple(_SORTED.values())))
    return made


def _volta():
    return mock.patch.dict(os.environ, ADAMIX_HOST_CAPABILITY="70", ADAMIX_HOST_SHARED="98304")


def _small_gpu():
    """A device whose shared memory holds no pair of rows."""
    return mock.patch.dict(os.environ, ADAMIX_HOST_CAPABILITY="80", ADAMIX_HOST_SHARED="3000")
