"""Arguments that routed_lora's ops share: checks, the tensor to overwrite, the dropout seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._checks import autocast, check_bank, check_device, check_dims, check_index, check_shape, check_tensor, fail
from ._gates import Side, check_gates, check_scales
from ._groups import check_groups, check_scaling


def autocast_lora(
    x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, base: torch.Tensor | None
) -> tuple[Any, ...]:
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        check_tensor(name, value)
    if base is not None:
        check_tensor("base", base)
    return autocast(x, lora_a, lora_b, base)


def check_lora(
    tensors: tuple[Any, ...],
    scaling: float | torch.Tensor,
    groups: int,
    output_offsets: Sequence[int],
    gates: torch.Tensor | None = None,
) -> list[int]:
    """tensors: x to base, in the dtype of the call; the offsets as a list."""
    x, lora_a, lora_b, a_index, b_index, base = tensors
    check_factors(x, lora_a, lora_b)
    first, second = lora_a.shape[0], lora_b.shape[0]
    if gates is None:
        check_index("a_index", a_index, first, x)
        check_index("b_index", b_index, second, x)
    else:
        check_gates(gates, x, Side("a_index", a_index, "lora_a", first), Side("b_index", b_index, "lora_b", second))
    width = base_width(x, base)
    if isinstance(scaling, torch.Tensor):
        check_scales(scaling, x, first if second == 1 else second)
    else:
        check_scaling(scaling)
    return check_groups(lora_a, lora_b, groups, output_offsets, width)


def check_factors(x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
    """x and both banks: dtypes, devices, dimensions."""
    check_dims("x", x, "[B, S, K]")
    check_tensor("lora_a", lora_a, x)
    check_bank("lora_a", lora_a, "[Ma, groups * r, K]")
    check_shape("lora_a", lora_a, "[Ma, groups * r, K]", lora_a.shape[0], lora_a.shape[1], x.shape[2])
    check_tensor("lora_b", lora_b, x)
    check_bank("lora_b", lora_b, "[Mb, groups * Ng, r]")


def base_width(x: torch.Tensor, base: torch.Tensor | None) -> int | None:
    """The output's columns as base, which is checked, has them; None without one."""
    if base is None:
        return None
    check_tensor("base", base, x)
    check_dims("base", base, "[B, S, N]")
    check_shape("base", base, "[B, S, N]", x.shape[0], x.shape[1], base.shape[2])
    return base.shape[2]


def check_inplace(
    base: torch.Tensor | None,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gates: torch.Tensor | None = None,
    router: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tensor to write: base or, while autograd records, the tensor [..., N] that all of base is a view of.

    base: as the caller gave it; what else: in the dtype of the call.
    """
    wanted = "to be overwritten"
    if base is None:
        fail("base", "None", f"a tensor [B, S, N] {wanted}", TypeError)
    if base.dtype != x.dtype:
        fail("base", base.dtype, f"{x.dtype}, autocast's dtype, {wanted}", TypeError)
    if torch.compiler.is_compiling():
        return base
    if not base.is_contiguous():
        fail("base", f"strides {base.stride()}", f"a contiguous tensor {wanted}")
    for name, other in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b), ("gates", gates), ("router", router)):
        if other is not None and torch._C._is_alias_of(base, other):  # type: ignore[attr-defined]  # absent from torch's stubs
            fail("base", f"a tensor in {name}'s memory", f"memory of its own {wanted}")
    if not torch.is_grad_enabled():
        return base
    owner = base if base._base is None else base._base
    if owner.is_leaf and owner.requires_grad:
        fail("base", "a leaf that requires grad", f"the output of an operation {wanted}")
    whole = (owner.numel(), owner.dtype) == (base.numel(), base.dtype) and owner.is_contiguous()
    if not whole or owner.shape[-1:] != base.shape[-1:]:
        fail("base", f"a view of a tensor {tuple(owner.shape)}", f"all of a tensor [..., N] {wanted} under autograd")
    return owner


def seed_tensor(seed: int | torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=x.device)
    if isinstance(seed, torch.Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            fail("seed", f"a {seed.dtype} tensor of shape {tuple(seed.shape)}", "a 0-dimensional torch.int64 tensor")
        check_device("seed", seed, x)
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        fail("seed", repr(seed), "an int, a 0-dimensional torch.int64 tensor or None", TypeError)
    if not -(2**63) <= seed < 2**63:
        fail("seed", seed, "a 64-bit signed integer")
    return torch.full((), seed, dtype=torch.int64, device=x.device)
