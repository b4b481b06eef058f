"""A case of the ahead-of-time gate, from a kernel and its arguments' types and constants."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_SCALARS = ("i32", "i64", "fp32")


class AotCase(NamedTuple):
    """Arguments of triton.compiler.ASTSource and the compile options of one kernel.

    resident: programs on a multiprocessor that the kernel's plan counts on; the gate holds the compiled code to it.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[Any]]
    num_warps: int
    num_stages: int
    maxnreg: int | None
    dtype: str
    resident: int = 1


def make_case(
    fn: Any,
    name: str,
    dtype: torch.dtype,
    arguments: dict[str, Any],
    divisible: tuple[str, ...] = (),
    warps: int = 4,
    maxnreg: int | None = None,
    stages: int = 2,
) -> AotCase:
    """Strings that open with * or name a scalar are types; everything else is a compile-time constant.

    divisible: scalars compiled as multiples of 16; pointers always are.
    """
    is_type = {a: isinstance(v, str) and (v in _SCALARS or v.startswith("*")) for a, v in arguments.items()}
    signature = {a: arguments[a] if is_type[a] else "constexpr" for a in fn.arg_names}
    constexprs = {a: arguments[a] for a in fn.arg_names if not is_type[a]}
    aligned = [n for n, a in enumerate(fn.arg_names) if signature[a].startswith("*") or a in divisible]
    attrs: dict[tuple[int, ...], list[Any]] = {(n,): [["tt.divisibility", 16]] for n in aligned}
    label = str(dtype).removeprefix("torch.")
    return AotCase(
        f"{fn.__name__.removesuffix('_kernel')}/{name}/{label}",
        fn,
        signature,
        constexprs,
        attrs,
        warps,
        stages,
        maxnreg,
        label,
    )
