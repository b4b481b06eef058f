"""What the ahead-of-time gate compiles of the kernels whose rows are grouped by expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...._triton_utils import DTYPES, precision
from ..._gated_sum import CHUNK
from ..._routed_plan import power_of_2
from ..._row_tiles import tile_options
from ..._triton_aot import AotCase, make_case
from .rows import gated_adapter_rows_forward_kernel, gated_adapter_rows_grad_kernel, gated_adapter_rows_shrink_kernel
from .rows_weight_grad import gated_adapter_rows_weight_grad_kernel
from .tables import config

_HIDDEN = 1024
# name -> (experts down, up, r, slots, chosen, weights): widths of every class of the tables, then every form.
_SHAPES = {
    "top2_m64_r16": (64, 64, 16, 2, True, False),
    "top2_m16_r32": (16, 16, 32, 2, True, False),
    "top2_m8_r64": (8, 8, 64, 2, True, False),
    "top2_m8_r128": (8, 8, 128, 2, True, False),
    "top2_m4_r256": (4, 4, 256, 2, True, False),
    "dense_weights_m64_r8": (64, 64, 8, 64, False, True),
    "shared_down_m64_r8": (1, 64, 8, 64, False, False),
    "shared_up_m64_r8": (64, 1, 8, 2, True, False),
}


def rows_cases(dtype: torch.dtype, pointer: str, capability: int) -> Iterator[AotCase]:
    """Every kernel of the first forms; of the rest, in bfloat16, those whose code differs."""
    for name, (md, mu, r, slots, chosen, weights) in _SHAPES.items():
        every = name.startswith("top2")
        if not every and dtype != torch.bfloat16:
            continue
        rp, ids = max(16, power_of_2(r)), "*i64" if chosen else None
        activation = "gelu_16" if dtype.itemsize == 2 else "gelu"
        common = dict(
            down_index=ids if md > 1 else None, up_index=ids if mu > 1 else None, gates="*fp32",
            span="i32", div="i32", H=_HIDDEN, O=_HIDDEN, C=_HIDDEN, R=r, RP=rp, K=slots, KP=power_of_2(slots), MD=md,
            MU=mu, WEIGHTS=weights, ACTIVATION=activation, DOT=DTYPES[dtype], PRECISION=precision(dtype), CHUNK=CHUNK,
            num_rows="i32", down_splits="i32", up_splits="i32",
        )  # fmt: skip
        names = ("z", "bank", "up_weight", "down_weight", "up_bias", "pre", "dpre", "h", "weights", "x", "grad_out")
        common |= dict.fromkeys((*names, "residual", "out", "dx"), pointer)
        planes = ("down_plane", "down_bias_plane", "up_plane", "up_bias_plane", "row_grads", "dgates")
        common |= dict.fromkeys(("u", "beside", *planes), "*fp32")
        for side, m in (("down", md), ("up", mu)):
            common |= dict.fromkeys((f"{side}_perm", f"{side}_edges"), "*i64" if m > 1 else None)
        of_down = dict(M=md, **_order(md, ids))
        of_up = dict(M=mu, **_order(mu, ids))
        forward, backward = dict(UP=False, bias=pointer, weighed=None, beside=None), dict(UP=True, bias=None)
        made = [
            (gated_adapter_rows_forward_kernel, name, of_up | dict(residual=pointer if mu == 1 else None)),
            (gated_adapter_rows_grad_kernel, name, of_down | dict(grad_out=pointer if md == 1 else None)),
        ]
        if every:
            made += [
                (gated_adapter_rows_shrink_kernel, name, of_down | forward),
                (gated_adapter_rows_shrink_kernel, f"{name}_up", of_up | backward | dict(weighed=pointer, out="*fp32")),
                (gated_adapter_rows_weight_grad_kernel, name, {}),
            ]
        for fn, label, own in made:
            yield _case(fn, label, dtype, common | own, rp, capability)


def _order(experts: int, ids: str | None) -> dict[str, str | None]:
    order = "*i64" if experts > 1 else None
    return dict(index=ids if experts > 1 else None, perm=order, tile_start=order, tile_stop=order)


def _case(fn, name: str, dtype: torch.dtype, arguments: dict, width: int, capability: int) -> AotCase:
    chosen = config(fn.__name__, capability, dtype.itemsize, width)
    options = tile_options(chosen, False, dtype.itemsize, width, False)
    limits = dict(warps=chosen.num_warps, stages=chosen.num_stages, maxnreg=options["maxnreg"])
    return make_case(fn, name, dtype, arguments | options, **limits)
