"""Calls in plain values for host_calls.py: what may differ between two of them, their arguments, and the call."""

from typing import ClassVar

import torch

from adamix_kernels import adamix_loss, consistency_loss, routed_adapter, routed_lora
from adamix_kernels.ops.merge.api import merge_banks
from adamix_kernels.ops.routed_adapter.api import routed_by_pass as adapter_by_pass
from adamix_kernels.ops.routed_lora.api import routed_by_pass as lora_by_pass

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def adapter_tensors(p, down, up):
    """x, the four banks of so many experts down and up, and the residual."""
    width = p["width"] or p["hidden"]
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
    columns = width + 8 * (p["wrong"] == "residual")
    residual = made((p["batch"], p["tokens"], columns), p["dtype"]) if p["residual"] == "other" else None
    if p["residual"] == "x" and width == p["hidden"]:
        residual = x
    return x, banks, residual


class Adapter:
    """One call of routed_adapter in plain values; `changed` differs from it in one of them."""

    PROPERTIES: ClassVar = {
        "batch": (1, 2, 3), "tokens": (15, 16, 33, 256), "hidden": (16, 40, 64), "rank": (4, 16, 20), "width": (0, 48),
        "experts": (1, 3, 4, 40), "dtype": DTYPES, "down_bias": (True, False), "up_bias": (True, False),
        "down_index": (None, 1, 2), "up_index": (None, 1, 2), "index_dtype": (torch.int64, torch.int32),
        "one_index": (False, True), "residual": (None, "x", "other"),
        "contiguous": (True, False), "offset": (0, 1, 8), "needs": ("xdu", "x", "d", "u", "du", "xu", ""),
        "tf32": (False, True), "gradient": ("contiguous", "expanded"), "autocast": (False, True),
        "activation": ("gelu", "relu", "silu", "gelu_tanh", None), "wrong": (None, "index", "residual"),
        "passes": (0, 1, 2),
    }  # fmt: skip

    def arguments(self, p):
        experts = p["experts"]
        down, up = (experts if p[side] else 1 for side in ("down_index", "up_index"))

        passes = passes_of(p)

        def index(dim):
            shape = (passes or p["batch"]) + (p["wrong"] == "index"), p["tokens"]
            return None if dim is None else torch.zeros(shape[: 1 if passes else dim], dtype=p["index_dtype"])

        x, banks, residual = adapter_tensors(p, down, up)
        chosen = [index(p["down_index"]), index(p["up_index"])]
        if p["one_index"] and None not in chosen:
            chosen[1] = chosen[0]
        return [x, *banks, *chosen], {
            "residual": residual, "activation": p["activation"], "passes": passes,
        }  # fmt: skip

    def run(self, arguments, options):
        passes, rest = options["passes"], (options["residual"], options["activation"])
        if passes:
            return adapter_by_pass(*arguments, passes, *rest, "triton")
        return routed_adapter(*arguments, residual=rest[0], activation=rest[1], backend="triton")


class Lora:
    PROPERTIES: ClassVar = {
        "batch": (1, 2, 3), "tokens": (15, 16, 33, 256), "hidden": (16, 40, 64), "rank": (4, 16), "groups": (1, 2),
        "per_group": (16, 24), "gap": (0, 16), "experts": (1, 3, 4, 40), "dtype": DTYPES, "a_index": (None, 1, 2),
        "b_index": (None, 1, 2), "one_index": (False, True), "index_dtype": (torch.int64, torch.int32),
        "base": (True, False), "scaling": (1, 1.0, 2.0, 0.0, -0.0), "dropout_p": (0, 0.0, 0.1, 0.5),
        "seed": (1, 2, "tensor"), "contiguous": (True, False), "offset": (0, 1, 8),
        "needs": ("xab", "x", "a", "b", "ab", ""), "tf32": (False, True), "inplace": (False, True),
        "gradient": ("contiguous", "expanded"),
        "owner": ("base", "flat", "turned"), "autocast": (False, True), "wrong": (None, "index", "lora_b"),
        "passes": (0, 1, 2),
    }  # fmt: skip

    def arguments(self, p):
        groups, per_group = p["groups"], p["per_group"]
        offsets = tuple(g * (per_group + p["gap"]) for g in range(groups))
        width = offsets[-1] + per_group + p["gap"]
        a, b = (p["experts"] if p[side] else 1 for side in ("a_index", "b_index"))

        passes = passes_of(p)

        def index(dim):
            shape = (passes or p["batch"]) + (p["wrong"] == "index"), p["tokens"]
            return None if dim is None else torch.zeros(shape[: 1 if passes else dim], dtype=p["index_dtype"])

        x = made((p["batch"], p["tokens"], p["hidden"]), p["dtype"], p["offset"], p["contiguous"])
        lora_a = made((a, groups * p["rank"], p["hidden"]), p["dtype"])
        lora_b = made((b, groups * per_group + (p["wrong"] == "lora_b"), p["rank"]), p["dtype"])
        for needed, t in (("x", x), ("a", lora_a), ("b", lora_b)):
            if needed in p["needs"]:
                t.requires_grad_()
        with_base = p["base"] or p["inplace"]
        seed = torch.zeros((), dtype=torch.int64) if p["seed"] == "tensor" else p["seed"]
        chosen = [index(p["a_index"]), index(p["b_index"])]
        if p["one_index"] and None not in chosen:
            chosen[1] = chosen[0]
        return [x, lora_a, lora_b, *chosen], {
            "base": made((p["batch"], p["tokens"], width), p["dtype"]) if with_base else None,
            "scaling": p["scaling"], "groups": groups, "output_offsets": offsets, "dropout_p": p["dropout_p"],
            "seed": seed, "inplace": p["inplace"], "owner": p["owner"], "passes": passes,
        }  # fmt: skip

    def run(self, arguments, options):
        options = dict(options)
        owner, passes = options.pop("owner"), options.pop("passes")
        if options["inplace"]:
            # What base is a view of, as a layer's output is.
            batch, tokens, width = options["base"].shape
            whole = (
                options["base"].view(*{"base": (batch,), "flat": (), "turned": (tokens,)}[owner], -1, width).detach()
            )
            options["base"] = whole if owner == "base" else whole.view(batch, tokens, width)
        if passes:
            names = "base", "scaling", "groups", "output_offsets", "dropout_p", "seed", "inplace"
            return lora_by_pass(*arguments, passes, *(options[name] for name in names), "triton")
        return routed_lora(*arguments, **options, backend="triton")


class AdaMix:
    PROPERTIES: ClassVar = {
        "batch": (1, 2, 33), "inner": ((), (3,), (2, 2)), "classes": (1, 2, 3, 40, 5000, 5008), "dtype": DTYPES,
        "label_dtype": (torch.int64, torch.int32), "mask": (None, torch.bool, torch.int64),
        "num_items": (None, 5, torch.int64, torch.float32), "weight": (1, 1.0, 0.5, 0.0, -0.0),
        "ignore_index": (-100, 0), "label_smoothing": (0.0, 0, 0.1), "detach_target": (True, False),
        "expected_grad": (None, 1.0, 2, 0.5), "inplace": (False, True), "contiguous": (True, False),
        "offset": (0, 1, 8), "needs": ("x", ""), "tf32": (False, True), "gradient": ("contiguous", "expanded"),
        "autocast": (False, True), "wrong": (None, "labels", "mask"), "shifted": (False, True),
    }  # fmt: skip

    def arguments(self, p):
        rows = p["batch"], *p["inner"]
        logits = made((2 * rows[0], *rows[1:], p["classes"]), p["dtype"], p["offset"], p["contiguous"])
        num_items = p["num_items"]
        if isinstance(num_items, torch.dtype):
            num_items = torch.ones((), dtype=num_items)
        of_labels, of_mask = ((p["batch"] + (p["wrong"] == name), *p["inner"]) for name in ("labels", "mask"))
        mask = None if p["mask"] is None else torch.zeros(of_mask, dtype=p["mask"])
        options = ("weight", "ignore_index", "label_smoothing", "detach_target", "expected_grad", "inplace")
        labels = torch.zeros(of_labels, dtype=p["label_dtype"])
        if p["shifted"] and len(rows) > 1 and p["wrong"] is None:
            # A causal model's: parts of larger tensors.
            logits, labels, mask = logits[:, :-1], labels[:, 1:], None if mask is None else mask[:, 1:]
        return [logits.detach().requires_grad_("x" in p["needs"]), labels], {
            "mask": mask, "num_items": num_items, **{name: p[name] for name in options},
        }  # fmt: skip

    def run(self, arguments, options):
        logits, labels = arguments
        return adamix_loss(logits.clone() if options["inplace"] else logits, labels, **options, backend="triton")[0]


class Consistency:
    PROPERTIES: ClassVar = {
        "rows": ((1,), (33,), (2, 3), ()), "classes": (1, 2, 3, 40, 5000, 5008), "dtype": DTYPES, "same": (False, True),
        "mask": (None, torch.bool, torch.int64), "detach_target": (True, False),
        "reduction": ("batchmean", "sum", "none"), "expected_grad": (None, 1.0, 2, 0.5), "inplace": (False, True),
        "contiguous": (True, False), "offset": (0, 1, 8), "needs": ("ab", "a", "b", ""), "tf32": (False, True),
        "gradient": ("contiguous", "expanded"), "autocast": (False, True),
        "wrong": (None, "mask", "logits_b"),
    }  # fmt: skip

    def arguments(self, p):
        shape = *p["rows"], p["classes"]
        needs = p["needs"]
        if needs and p["dtype"] is torch.float16 and p["expected_grad"] is None:
            needs = "ab"  # the op's backward writes both
        a = made(shape, p["dtype"], p["offset"], p["contiguous"]).requires_grad_("a" in needs)
        other = *p["rows"], p["classes"] + (p["wrong"] == "logits_b")
        b = a if p["same"] else made(other, p["dtype"]).requires_grad_("b" in needs)
        of_mask = (*p["rows"], 1) if p["wrong"] == "mask" else p["rows"]
        mask = None if p["mask"] is None else torch.zeros(of_mask, dtype=p["mask"])
        inplace = p["inplace"] and p["reduction"] != "none" and not p["same"]
        return [a, b], {
            "mask": mask, "inplace": inplace, **{n: p[n] for n in ("detach_target", "reduction", "expected_grad")},
        }  # fmt: skip

    def run(self, arguments, options):
        a, b = (t.clone() for t in arguments) if options["inplace"] else arguments
        return consistency_loss(a, b, **options, backend="triton")


class Merge:
    """merge_banks, whose plan is a table on the device."""

    PROPERTIES: ClassVar = {
        "shapes": (((4, 16),), ((4, 16), (4,)), ((4, 16), (4, 16), (3,)), ((8,), ())), "experts": (1, 3, 40),
        "dtype": DTYPES, "scores": (None, torch.float32, torch.float64), "scored": (0, 1), "offset": (0, 1, 8),
        "again": (False, True), "needs": ("", "x"), "tf32": (False,),
    }  # fmt: skip

    def arguments(self, p):
        banks = [made((p["experts"], *s), p["dtype"], p["offset"]) for s in p["shapes"]]
        scores = [torch.zeros(p["experts"], dtype=p["scores"]) if p["scores"] else None for _ in banks]
        scores[: p["scored"]] = [None] * p["scored"]
        if p["again"]:
            banks[-1] = banks[0]
        return [*(bank.requires_grad_("x" in p["needs"]) for bank in banks), *scores], {}

    def run(self, arguments, options):
        half = len(arguments) // 2
        return merge_banks(arguments[:half], arguments[half:], backend="triton")


KINDS = Adapter, Lora, AdaMix, Consistency, Merge


def passes_of(p):
    """0 unless they divide the batch."""
    return p["passes"] if p["passes"] and p["batch"] % p["passes"] == 0 else 0


def made(shape, dtype, offset=0, contiguous=True):
    """A tensor whose first number lies `offset` numbers after a multiple of 64 bytes."""
    t = torch.zeros(offset + torch.Size(shape).numel(), dtype=dtype)[offset:]
    if contiguous or len(shape) < 2:
        return t.view(shape)
    *leading, rows, columns = shape
    return t.view(*leading, columns, rows).transpose(-2, -1)
