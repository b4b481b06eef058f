"""Bad input of the routed ops and of merging."""

from __future__ import annotations

import torch

from adamix_kernels.functional import merge_experts, merge_lora, routed_adapter, routed_lora

from .kinds import (
    Kind,
    choice,
    floating,
    index,
    instead,
    longer,
    of,
    one_axis_less,
    one_axis_more,
    wrong_arguments,
)

_NAN, _INF = float("nan"), float("inf")
BACKENDS = choice("backend", "cpu", "", None, 3, ["auto"])


def _adapter() -> dict:
    return dict(
        x=torch.randn(2, 3, 4), down_weight=torch.randn(3, 5, 4), down_bias=torch.randn(3, 5),
        up_weight=torch.randn(2, 4, 5), up_bias=torch.randn(2, 4), residual=torch.randn(2, 3, 4),
        down_index=torch.zeros(2, 3, dtype=torch.int64), up_index=torch.zeros(2, 3, dtype=torch.int32),
    )  # fmt: skip


def _lora() -> dict:
    return dict(
        x=torch.randn(2, 3, 4), lora_a=torch.randn(3, 4, 4), lora_b=torch.randn(2, 6, 2), base=torch.randn(2, 3, 9),
        a_index=torch.zeros(2, 3, dtype=torch.int64), b_index=torch.zeros(2, 3, dtype=torch.int32),
        groups=2, output_offsets=(0, 5),
    )  # fmt: skip


def _merged_lora() -> dict:
    return dict(
        weight=torch.randn(9, 4), lora_a=torch.randn(3, 4, 4), lora_b=torch.randn(2, 6, 2),
        scaling=2.0, groups=2, output_offsets=(0, 5),
    )  # fmt: skip


_GROUPS = [
    *choice("groups", 0, -1, 3, 1.0, "2", True, None),
    *choice("output_offsets", (0,), (0, 2), (-1, 5), (0, 9), (0, 7), None, 0, "05", (0, 5.0), (0, None), (0, 5, 9)),
]
_SCALING = choice("scaling", _NAN, _INF, -_INF, "1", None, True, 1j)


def kinds() -> list[Kind]:
    return [*_adapter_kinds(), *_lora_kinds(), *_merge_kinds()]


def _adapter_kinds():
    banks = ("down_weight", "up_weight")
    biases = ("down_bias", "up_bias")
    yield from wrong_arguments(
        routed_adapter,
        _adapter,
        [
            *floating("x", alone=True), one_axis_more("x"), one_axis_less("x"),
            *(kind for name in banks for kind in (*floating(name), one_axis_more(name), one_axis_less(name))),
            *(kind for name in biases for kind in (*floating(name, optional=True), one_axis_more(name),
                                                   one_axis_less(name), longer(name, 0), longer(name, 1))),
            *((name, "a bank of no experts", of(name, lambda t: t[:0])) for name in banks),
            longer("down_weight", 2), longer("up_weight", 2),
            *index("down_index", 3), *index("up_index", 2),
            *floating("residual", optional=True), one_axis_more("residual"), one_axis_less("residual"),
            *(longer("residual", axis) for axis in range(3)),
            ("residual", "x itself, of another width", lambda given: {
                "residual": given["x"], "up_weight": torch.randn(2, 7, 5), "up_bias": torch.randn(2, 7)}),
            *choice("activation", "GELU", "tanh", "", 1, True, ["gelu"], torch.relu),
            *BACKENDS,
        ],
    )  # fmt: skip


def _lora_kinds():
    banks = ("lora_a", "lora_b")
    yield from wrong_arguments(
        routed_lora,
        _lora,
        [
            *floating("x", alone=True), one_axis_more("x"), one_axis_less("x"),
            *(kind for name in banks for kind in (*floating(name), one_axis_more(name), one_axis_less(name),
                                                  (name, "a bank of no experts", of(name, lambda t: t[:0])))),
            longer("lora_a", 2), longer("lora_b", 2),
            *index("a_index", 3), *index("b_index", 2),
            *floating("base", optional=True), one_axis_more("base"), one_axis_less("base"),
            longer("base", 0), longer("base", 1),
            *_GROUPS, *_SCALING,
            *choice("dropout_p", -0.1, 1, 1.0, 2, _NAN, "0.1", None, True),
            ("seed", "a string", lambda _given: {"seed": "1", "dropout_p": 0.5}),
            ("seed", "a float", lambda _given: {"seed": 1.0, "dropout_p": 0.5}),
            ("seed", "a flag", lambda _given: {"seed": True, "dropout_p": 0.5}),
            ("seed", "more than 64 bits", lambda _given: {"seed": 2**63, "dropout_p": 0.5}),
            ("seed", "a vector", lambda _given: {"seed": torch.zeros(1, dtype=torch.int64), "dropout_p": 0.5}),
            ("seed", "32 bits", lambda _given: {"seed": torch.tensor(1, dtype=torch.int32), "dropout_p": 0.5}),
            ("seed", "another device", lambda _given: {
                "seed": torch.zeros((), dtype=torch.int64, device="meta"), "dropout_p": 0.5}),
            *choice("inplace", "yes", 2, None),
            ("base", "None, to be overwritten", lambda _given: {"base": None, "inplace": True}),
            ("base", "not contiguous, to be overwritten", lambda given: {
                "base": given["base"].transpose(0, 1).contiguous().transpose(0, 1), "inplace": True}),
            ("base", "a leaf that requires grad, to be overwritten", lambda given: {
                "base": given["base"].requires_grad_(), "inplace": True}),
            ("base", "a part of another tensor, to be overwritten", lambda given: {
                "base": torch.cat([given["base"]] * 2)[:2], "inplace": True}),
            ("base", "in x's memory, to be overwritten", lambda given: {
                "base": given["x"], "inplace": True, "groups": 1, "output_offsets": (0,),
                "lora_a": torch.randn(3, 2, 4), "lora_b": torch.randn(2, 3, 2)}),
            *BACKENDS,
        ],
    )  # fmt: skip


def _merge_kinds():
    yield from wrong_arguments(
        merge_experts,
        lambda: dict(bank=torch.randn(3, 4, 5), scores=torch.randn(3)),
        [
            *floating("bank", alone=True), ("bank", "no axis", instead("bank", torch.randn(()))),
            ("bank", "no experts", of("bank", lambda t: t[:0])),
            *(kind for kind in floating("scores", optional=True) if kind[1] != "another dtype"),
            one_axis_more("scores"), one_axis_less("scores"), longer("scores", 0),
            *BACKENDS,
        ],
    )  # fmt: skip
    yield from wrong_arguments(
        merge_lora,
        _merged_lora,
        [
            *floating("weight", alone=True), one_axis_more("weight"), one_axis_less("weight"), longer("weight", 1),
            *floating("lora_a"), one_axis_more("lora_a"), longer("lora_a", 2),
            ("lora_a", "no experts", of("lora_a", lambda t: t[:0])),
            *floating("lora_b"), one_axis_more("lora_b"), longer("lora_b", 2),
            ("lora_b", "no experts", of("lora_b", lambda t: t[:0])),
            *_GROUPS, *_SCALING, *choice("fan_in_fan_out", "yes", None, 2),
            *BACKENDS,
        ],
    )  # fmt: skip
