"""Calls with gates in plain values for host_calls.py, as host_kinds.py has those without."""

from typing import ClassVar

import torch
from host_kinds import DTYPES, adapter_tensors, made

from adamix_kernels import routed_adapter, routed_lora

# Which experts a row's gates weigh, and on which sides there are several.
_GATES = {
    "batch": (1, 2, 3), "tokens": (15, 16, 33), "hidden": (16, 40, 64), "rank": (4, 16), "experts": (2, 4, 40),
    "slots": (None, 1, 2, 3), "by_sample": (False, True), "sides": ("both", "both", "down", "up", "none"),
    "index_dtype": (torch.int64, torch.int32), "one_index": (True, False), "mix": ("outputs", "weights"),
    "gates_dtype": (torch.float32, None), "dtype": DTYPES, "contiguous": (True, False), "offset": (0, 1, 8),
    "tf32": (False, True), "gradient": ("contiguous", "expanded"), "autocast": (False, True),
}  # fmt: skip


def chosen(p):
    """(index of either side, gates, experts of either bank)."""
    banks = [p["experts"] if p["sides"] in ("both", side) else 1 for side in ("down", "up")]
    lead = (p["batch"],) if p["by_sample"] else (p["batch"], p["tokens"])
    slots = max(banks) if p["slots"] is None else p["slots"]
    shape = (*lead, slots + (p["wrong"] == "gates"))
    gates = torch.zeros(shape, dtype=p["gates_dtype"] or p["dtype"]).requires_grad_("g" in p["needs"])
    indices = [None, None]
    if p["slots"] is not None:
        indices = [torch.zeros(*lead, slots, dtype=p["index_dtype"]) if m > 1 else None for m in banks]
        if p["one_index"] and None not in indices:
            indices[1] = indices[0]
    return indices, gates, banks


class GatedAdapter:
    PROPERTIES: ClassVar = {
        **_GATES, "width": (0, 48), "down_bias": (True, False), "up_bias": (True, False),
        "residual": (None, "x", "other"), "needs": ("xdug", "x", "d", "u", "g", "du", ""),
        "activation": ("gelu", "relu", None), "wrong": (None, None, "gates", "residual"),
    }  # fmt: skip

    def arguments(self, p):
        (down_index, up_index), gates, (down, up) = chosen(p)
        x, banks, residual = adapter_tensors(p, down, up)
        options = {"residual": residual, "activation": p["activation"], "mix": p["mix"]}
        return [x, *banks, down_index, up_index, gates], options

    def run(self, arguments, options):
        *arguments, gates = arguments
        return routed_adapter(*arguments, gates=gates, **options, backend="triton")


class GatedLora:
    PROPERTIES: ClassVar = {
        **_GATES, "groups": (1, 2), "gap": (0, 16), "base": (True, False), "scaling": (1, 2.0, 0.0, "each"),
        "dropout_p": (0, 0.1, 0.5), "seed": (1, 2, "tensor"), "inplace": (False, True), "owner": ("base", "flat"),
        "needs": ("xabg", "x", "a", "b", "g", "ab", ""), "wrong": (None, None, "gates", "lora_b"),
    }  # fmt: skip

    def arguments(self, p):
        (a_index, b_index), gates, (a, b) = chosen(p)
        groups, per_group = p["groups"], 16
        offsets = tuple(g * (per_group + p["gap"]) for g in range(groups))
        width = offsets[-1] + per_group + p["gap"]
        x = made((p["batch"], p["tokens"], p["hidden"]), p["dtype"], p["offset"], p["contiguous"])
        lora_a = made((a, groups * p["rank"], p["hidden"]), p["dtype"])
        lora_b = made((b, groups * per_group + (p["wrong"] == "lora_b"), p["rank"]), p["dtype"])
        for needed, t in (("x", x), ("a", lora_a), ("b", lora_b)):
            if needed in p["needs"]:
                t.requires_grad_()
        seed = torch.zeros((), dtype=torch.int64) if p["seed"] == "tensor" else p["seed"]
        scaling = torch.ones(b if b > 1 else a) if p["scaling"] == "each" else p["scaling"]
        return [x, lora_a, lora_b, a_index, b_index, gates], {
            "base": made((p["batch"], p["tokens"], width), p["dtype"]) if p["base"] or p["inplace"] else None,
            "scaling": scaling, "groups": groups, "output_offsets": offsets, "dropout_p": p["dropout_p"], "seed": seed,
            "inplace": p["inplace"], "owner": p["owner"], "mix": p["mix"],
        }  # fmt: skip

    def run(self, arguments, options):
        *arguments, gates = arguments
        options = dict(options)
        owner = options.pop("owner")
        if options["inplace"]:
            # What base is a view of, as a layer's output is.
            batch, _, width = options["base"].shape
            whole = options["base"].view(*((batch,) if owner == "base" else ()), -1, width).detach()
            options["base"] = whole if owner == "base" else whole.view(batch, -1, width)
        return routed_lora(*arguments, gates=gates, **options, backend="triton")


GATED = GatedAdapter, GatedLora
