"""Bad input of the losses."""

from __future__ import annotations

import torch

from adamix_kernels.functional import adamix_loss, consistency_loss, linear_adamix_loss

from .kinds import Kind, choice, floating, instead, longer, of, one_axis_less, one_axis_more, wrong_arguments
from .op_kinds import BACKENDS

_NAN, _INF = float("nan"), float("inf")


def kinds() -> list[Kind]:
    return [*_consistency(), *_adamix(), *_regression(), *_linear()]


def _mask(name: str = "mask") -> list[tuple]:
    return [
        (name, "a list", instead(name, [True, False])),
        (name, "a flag", instead(name, True)),
        (name, "floating numbers", of(name, lambda t: t.float())),
        (name, "another device", of(name, lambda t: t.to("meta"))),
        one_axis_more(name), one_axis_less(name), longer(name, 0), longer(name, 1),
    ]  # fmt: skip


def _labels() -> list[tuple]:
    return [
        ("labels", "a list", instead("labels", [0, 1])),
        ("labels", "None", instead("labels", None)),
        ("labels", "8-bit numbers", of("labels", lambda t: t.to(torch.uint8))),
        ("labels", "booleans", of("labels", lambda t: t.bool())),
        ("labels", "another device", of("labels", lambda t: t.to("meta"))),
        one_axis_more("labels"), one_axis_less("labels"), longer("labels", 0), longer("labels", 1),
        ("labels", "both passes'", of("labels", lambda t: torch.cat([t, t]))),
        ("labels", "no class", of("labels", lambda t: torch.full_like(t, 5))),
        ("labels", "a negative class", of("labels", lambda t: torch.full_like(t, -1))),
        ("labels", "a class beyond 32 bits", of("labels", lambda t: torch.full_like(t, 2**40))),
    ]  # fmt: skip


_OPTIONS = [
    *choice("weight", -1.0, _NAN, _INF, "1", None, True),
    *choice("ignore_index", 1.5, "x", None, True),
    *choice("label_smoothing", -0.1, 1.1, _NAN, "0", None, True),
    *choice("num_items", -1, 1.5, "4", True),
    ("num_items", "a vector", instead("num_items", torch.ones(1))),
    ("num_items", "complex", instead("num_items", torch.tensor(1j))),
    *choice("detach_target", "no", None, 2),
]


_EXPECTED = choice("expected_grad", 0, -1.0, _NAN, _INF, "1", True)


def _consistency():
    yield from wrong_arguments(
        consistency_loss,
        lambda: dict(
            logits_a=torch.randn(2, 3, 5), logits_b=torch.randn(2, 3, 5), mask=torch.ones(2, 3, dtype=torch.bool)
        ),
        [
            *floating("logits_a", alone=True), ("logits_a", "no axis", instead("logits_a", torch.randn(()))),
            ("logits_a", "no classes", lambda given: {n: given[n][..., :0] for n in ("logits_a", "logits_b")}),
            *floating("logits_b"), one_axis_more("logits_b"), one_axis_less("logits_b"),
            *(longer("logits_b", axis) for axis in range(3)),
            *_mask(), *choice("reduction", "mean", "", None, 1, True), *choice("detach_target", "no", None, 2),
            *choice("inplace", "yes", None, 2), *_EXPECTED,
            ("inplace", 'True with reduction "none"', lambda _given: {"inplace": True, "reduction": "none"}),
            ("logits_a", "a leaf that requires grad, in place", lambda given: {
                "logits_a": given["logits_a"].requires_grad_(), "inplace": True}),
            ("logits_b", "a view of a leaf, in place", lambda given: {
                "logits_b": given["logits_b"].requires_grad_()[:], "inplace": True}),
            ("logits_b", "memory of both logits, in place", _one_memory),
            ("logits_a", "elements that share memory, in place", lambda given: {
                "logits_a": (given["logits_a"][:, :1].requires_grad_() * 1).expand(2, 3, 5), "inplace": True}),
            *BACKENDS,
        ],
    )  # fmt: skip


def _one_memory(given: dict) -> dict:
    both = given["logits_a"].requires_grad_() * 1
    return {"logits_a": both, "logits_b": both, "inplace": True}


def _adamix():
    yield from wrong_arguments(
        adamix_loss,
        lambda: dict(
            logits=torch.randn(4, 3, 5),
            labels=torch.zeros(2, 3, dtype=torch.int64),
            mask=torch.ones(2, 3, dtype=torch.bool),
        ),
        [
            *floating("logits", alone=True), one_axis_less("logits"),
            ("logits", "one axis", instead("logits", torch.randn(4))),
            ("logits", "an odd number of rows", of("logits", lambda t: t[:3])),
            ("logits", "no classes", of("logits", lambda t: t[..., :0])),
            ("logits", "a leaf that requires grad, in place", lambda given: {
                "logits": given["logits"].requires_grad_(), "inplace": True}),
            *_labels(), *_mask(), *_OPTIONS, *choice("inplace", "yes", None, 2), *_EXPECTED, *BACKENDS,
        ],
    )  # fmt: skip


def _regression():
    yield from wrong_arguments(
        adamix_loss,
        lambda: dict(logits=torch.randn(4, 3, 1), labels=torch.randn(2, 3), mask=torch.ones(2, 3, dtype=torch.bool)),
        [
            ("logits", "two outputs for regression", instead("logits", torch.randn(4, 3, 2))),
            ("logits", "an odd number of rows for regression", of("logits", lambda t: t[:3])),
            ("logits", "no axis for regression", instead("logits", torch.randn(()))),
            ("labels", "regression, of another device", of("labels", lambda t: t.to("meta"))),
            ("labels", "regression, a row too many", of("labels", lambda t: torch.cat([t, t[:1]]))),
            ("mask", "regression, a row too many", of("mask", lambda t: torch.cat([t, t[:1]]))),
            ("label_smoothing", "0.1 for regression", instead("label_smoothing", 0.1)),
        ],
    )  # fmt: skip


def _linear():
    yield from wrong_arguments(
        linear_adamix_loss,
        lambda: dict(
            hidden=torch.randn(4, 3, 6), lm_head_weight=torch.randn(5, 6), bias=torch.randn(5),
            labels=torch.zeros(2, 3, dtype=torch.int64), mask=torch.ones(2, 3, dtype=torch.bool),
        ),
        [
            *floating("hidden", alone=True), ("hidden", "one axis", instead("hidden", torch.randn(6))),
            ("hidden", "an odd number of rows", of("hidden", lambda t: t[:3])),
            *floating("lm_head_weight"), one_axis_more("lm_head_weight"), one_axis_less("lm_head_weight"),
            longer("lm_head_weight", 1), ("lm_head_weight", "no classes", of("lm_head_weight", lambda t: t[:0])),
            *floating("bias", optional=True), one_axis_more("bias"), one_axis_less("bias"), longer("bias", 0),
            *_labels(), ("labels", "floating numbers", of("labels", lambda t: t.float())),
            *_mask(), *_OPTIONS, *choice("chunk_rows", 0, -1, 1.5, "8", True), *BACKENDS,
        ],
    )  # fmt: skip
