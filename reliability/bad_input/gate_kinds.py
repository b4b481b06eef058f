"""Bad input of what has gates: the router, the gated calls of the routed ops, routers, configuration, whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import adamix_kernels as ak
from adamix_kernels.functional import routed_adapter, routed_lora
from adamix_kernels.routing import (
    ArrowRouter,
    LinearRouter,
    SentenceRouter,
    TaskRouter,
    ThresholdRouter,
    balance_loss,
    gate_router,
    mixture_lora,
    router_gates,
    z_loss,
)

from .kinds import Kind, choice, floating, instead, longer, of, one_axis_less, one_axis_more, wrong_arguments
from .module_kinds import constructed
from .op_kinds import BACKENDS

_NAN, _INF = float("nan"), float("inf")
_NO_K = (0, -1, 5, 1.5, "2", True)
_EXPERTS = 4


def kinds() -> list[Kind]:
    return [*_router_op(), *_mixture(), *_calls(), *_losses(), *_routers(), *_configuration(), *_models()]


def _router_op() -> Iterator[Kind]:
    yield from wrong_arguments(
        router_gates,
        lambda: dict(x=torch.randn(2, 3, 8), weight=torch.randn(_EXPERTS, 8), bias=torch.randn(_EXPERTS), top_k=2),
        [
            *floating("x", alone=True), ("x", "no axis", instead("x", torch.randn(()))),
            *floating("weight"), one_axis_more("weight"), one_axis_less("weight"), longer("weight", 1),
            ("weight", "no experts", of("weight", lambda t: t[:0])),
            ("weight", "more experts than a kernel holds", instead("weight", torch.randn(257, 8))),
            *floating("bias", optional=True), one_axis_more("bias"), one_axis_less("bias"), longer("bias", 0),
            *choice("top_k", *_NO_K), *BACKENDS,
        ],
    )  # fmt: skip


def _mixture() -> Iterator[Kind]:
    yield from wrong_arguments(
        mixture_lora,
        lambda: dict(
            x=torch.randn(2, 3, 8), lora_a=torch.randn(_EXPERTS, 2, 8), lora_b=torch.randn(_EXPERTS, 6, 2),
            router=torch.randn(_EXPERTS, 8), base=torch.randn(2, 3, 6), top_k=2,
        ),
        [
            *floating("x", alone=True), one_axis_more("x"), one_axis_less("x"),
            *floating("lora_a"), one_axis_more("lora_a"), one_axis_less("lora_a"), longer("lora_a", 2),
            ("lora_a", "a bank of two", of("lora_a", lambda t: t[:2])),
            *floating("lora_b"), one_axis_more("lora_b"), one_axis_less("lora_b"),
            ("lora_b", "a bank of two", of("lora_b", lambda t: t[:2])),
            ("lora_b", "both banks of one", lambda g: {"lora_a": g["lora_a"][:1], "lora_b": g["lora_b"][:1]}),
            *floating("router"), one_axis_more("router"), one_axis_less("router"), longer("router", 1),
            ("router", "no experts", of("router", lambda t: t[:0])),
            *floating("base", optional=True), one_axis_more("base"), one_axis_less("base"), longer("base", 0),
            ("base", "None, to be overwritten", lambda _: {"base": None, "inplace": True}),
            *choice("top_k", *_NO_K), *choice("scaling", _NAN, _INF, "1", None, True),
            *choice("dropout_p", -0.1, 1.0, _NAN, "0"), *choice("inplace", "yes", 2, None), *BACKENDS,
        ],
    )  # fmt: skip


def _chosen() -> dict:
    return dict(gates=torch.rand(2, 3, 2), **{f"{side}_index": torch.zeros(2, 3, 2, dtype=torch.int64)
                                              for side in ("a", "b")})  # fmt: skip


def _lora() -> dict:
    return dict(x=torch.randn(2, 3, 8), lora_a=torch.randn(_EXPERTS, 2, 8), lora_b=torch.randn(_EXPERTS, 6, 2),
                base=torch.randn(2, 3, 6), scaling=torch.ones(_EXPERTS), **_chosen())  # fmt: skip


def _adapter() -> dict:
    chosen = _chosen()
    return dict(
        x=torch.randn(2, 3, 8), down_weight=torch.randn(_EXPERTS, 5, 8), down_bias=torch.randn(_EXPERTS, 5),
        up_weight=torch.randn(_EXPERTS, 8, 5), up_bias=torch.randn(_EXPERTS, 8), residual=torch.randn(2, 3, 8),
        down_index=chosen["a_index"], up_index=chosen["b_index"], gates=chosen["gates"],
    )  # fmt: skip


def _slots(name: str) -> list[tuple]:
    """What may be wrong with an index of slots [B, S, K]."""
    return [
        (name, "None for several experts", instead(name, None)),
        (name, "a list", instead(name, [0, 0])),
        (name, "floating ids", of(name, lambda t: t.float())),
        (name, "8-bit ids", of(name, lambda t: t.to(torch.uint8))),
        (name, "another device", of(name, lambda t: t.to("meta"))),
        (name, "no slots", of(name, lambda t: t[..., 0])),
        one_axis_more(name), longer(name, 0), longer(name, 1),
    ]  # fmt: skip


def _gates() -> list[tuple]:
    return [
        *(kind for kind in floating("gates", optional=True) if kind[1] != "None"),
        ("gates", "a sample too many", of("gates", lambda t: torch.cat([t, t[:1]]))),
        ("gates", "a slot too many", of("gates", lambda t: torch.cat([t, t[..., :1]], -1))),
        ("gates", "one axis less", of("gates", lambda t: t[:, 0])),
    ]


def _calls() -> Iterator[Kind]:
    dense_lora = {"a_index": None, "b_index": None, "gates": torch.rand(2, 3, _EXPERTS)}
    dense_adapter = {"down_index": None, "up_index": None, "gates": torch.rand(2, 3, _EXPERTS)}
    yield from wrong_arguments(
        routed_lora,
        _lora,
        [
            *_gates(), *_slots("a_index"), *_slots("b_index"), *choice("mix", "sum", "", None, 1, True, ["outputs"]),
            ("gates", "dense, of other experts", lambda _: {**dense_lora, "gates": torch.rand(2, 3, 5)}),
            ("lora_b", "dense, a bank of two", lambda g: {**dense_lora, "lora_b": g["lora_b"][:2]}),
            ("scaling", "a value too many", of("scaling", lambda t: torch.cat([t, t[:1]]))),
            ("scaling", "float64", of("scaling", lambda t: t.double())),
            ("scaling", "another device", of("scaling", lambda t: t.to("meta"))),
            ("scaling", "learned", of("scaling", lambda t: t.requires_grad_())),
            ("scaling", "an infinite one", instead("scaling", torch.tensor([_INF, 1.0, 1.0, 1.0]))),
            *choice("scaling", _NAN, "1", None, True),
            ("base", "None, to be overwritten", lambda _: {"base": None, "inplace": True}),
            ("base", "in x's memory, to be overwritten", lambda g: {
                "base": g["x"], "inplace": True, "lora_b": torch.randn(_EXPERTS, 8, 2)}),
            *choice("dropout_p", -0.1, 1.0, _NAN, None),
        ],
    )  # fmt: skip
    yield from wrong_arguments(
        routed_adapter,
        _adapter,
        [
            *_gates(), *_slots("down_index"), *_slots("up_index"), *choice("mix", "sum", "", None, 1, True),
            ("gates", "dense, of other experts", lambda _: {**dense_adapter, "gates": torch.rand(2, 3, 5)}),
            ("down_weight", "dense, a bank of two", lambda g: {
                **dense_adapter, "down_weight": g["down_weight"][:2], "down_bias": g["down_bias"][:2]}),
            *choice("activation", "tanh", "", 1, True), longer("residual", 2),
        ],
    )  # fmt: skip


def _losses() -> Iterator[Kind]:
    for words, value in (("a list", [0.5]), ("None", None), ("integers", torch.ones(2, 3, dtype=torch.int64))):
        yield Kind(f"balance_loss: probabilities: {words}", "probabilities", lambda value=value: balance_loss(value))
        yield Kind(f"z_loss: logits: {words}", "logits", lambda value=value: z_loss(value))
    rows = torch.rand(2, 3, 4)
    for words, value in (
        ("a list", [0]), ("floating", torch.rand(2, 3, 2)), ("of other rows", torch.zeros(2, 2, 2, dtype=torch.int64)),
        ("no slots", torch.zeros(2, 3, dtype=torch.int64)),
    ):  # fmt: skip
        yield Kind(f"balance_loss: index: {words}", "index", lambda value=value: balance_loss(rows, value), (rows,))
    for name, function in (("balance_loss", balance_loss), ("z_loss", z_loss)):
        for words, value in (("a list", [1, 1]), ("a flag", True)):
            yield Kind(f"{name}: mask: {words}", "mask",
                       lambda function=function, value=value: function(rows, mask=value), (rows,))  # fmt: skip


def _routers() -> Iterator[Kind]:
    sizes = (0, -1, 1.5, "4", None, True)
    for maker in (LinearRouter, SentenceRouter, ArrowRouter, ThresholdRouter):
        wrong: dict[str, tuple] = dict(num_experts=(*sizes, 1), features=sizes)
        if maker is ThresholdRouter:
            wrong["limit"] = (0, 1, -0.1, 1.5, _NAN, "1")
        else:
            wrong["top_k"] = _NO_K
        if maker is ArrowRouter:
            wrong["temperature"] = (0, -1.0, _NAN, _INF, "1", None)
        yield from constructed(maker, lambda: dict(features=8, num_experts=_EXPERTS), wrong)
    table = dict(num_tasks=sizes, num_experts=(*sizes, 1), splits=sizes)
    yield from constructed(TaskRouter, lambda: dict(num_tasks=3, num_experts=_EXPERTS), table)
    yield from constructed(
        gate_router,
        lambda: dict(kind="linear", features=8, num_experts=_EXPERTS),
        dict(kind=("", "topk", None, 1), num_tasks=(3,), top_k=_NO_K, num_experts=(*sizes, 1)),
    )
    x = torch.randn(2, 3, 8)
    for maker in (LinearRouter, SentenceRouter, ThresholdRouter):
        router = maker(8, _EXPERTS)
        for words, given in (("a list", [[1.0]]), ("None", None), ("another width", torch.randn(2, 3, 7)),
                             ("integers", torch.ones(2, 3, 8, dtype=torch.int64))):  # fmt: skip
            yield Kind(f"{maker.__name__}: x: {words}", "x", _call(router, given), (router,))
        for words, mask in (("a list", [1, 1]), ("another device", torch.ones(2, 3, device="meta"))):
            yield Kind(f"{maker.__name__}: mask: {words}", "mask", _call(router, x, mask), (router, x))
    tasks = TaskRouter(3, _EXPERTS)
    for words, ids in (("none", None), ("a list", [0, 1]), ("of another number", torch.zeros(3, dtype=torch.int64)),
                       ("floating", torch.zeros(2))):  # fmt: skip
        yield Kind(f"TaskRouter: tasks: {words}", "tasks", _call(tasks, x, None, ids), (tasks, x))


def _call(module: nn.Module, *given: object) -> Callable[[], object]:
    return lambda: module(*given)


def _configuration() -> Iterator[Kind]:
    learned = dict(routing="learned", num_experts=_EXPERTS)
    yield from constructed(
        ak.AdaMixConfig,
        lambda: dict(learned),
        dict(
            router=("", "topk", None, 1), top_k=_NO_K, mix=("sum", "", None, 1), num_tasks=(3,), num_experts=(1,),
            balance_weight=(-0.1, _NAN, _INF, "1", None, True), z_weight=(-0.1, _NAN, _INF, "1", None, True),
            experts_pattern=([], [1], [2.5], "2", 4, {"q": 1}, {"([": 2}), rank_pattern=([1], {"q": 0}, {"([": 2}),
            alpha_pattern=({"q": 4.0},),
        ),
    )  # fmt: skip
    one = dict(
        router="arrow", top_k=2, mix="weights", balance_weight=0.5, z_weight=0.1, num_tasks=3, experts_pattern=[2]
    )
    for name, value in one.items():
        yield Kind(f"AdaMixConfig: {name}: without gates", name, lambda given={name: value}: ak.AdaMixConfig(**given))
    for words, name, given in (
        ("of a table of tasks", "top_k", dict(router="task", num_tasks=3, top_k=2)),
        ("of a threshold", "top_k", dict(router="threshold", top_k=2)),
        ("larger than the fewest experts", "top_k", dict(top_k=3, experts_pattern=[2, 4])),
        ("a table without tasks", "num_tasks", dict(router="task")),
        ("arrow of adapters", "router", dict(router="arrow", method="adapter")),
    ):
        yield Kind(f"AdaMixConfig: {name}: {words}", name, lambda given=given: ak.AdaMixConfig(**learned, **given))
    for preset in ("hydra_lora", "lora_moe", "mola", "smear"):
        make = getattr(ak.AdaMixConfig, preset)
        for name, value in (("num_experts", 1), ("top_k", 99), ("router", "topk"), ("z_weight", -1.0)):
            yield Kind(f"{preset}: {name}: {value!r}", name, lambda make=make, given={name: value}: make(**given))


def _models() -> Iterator[Kind]:
    from .model_kinds import adapted, plain

    model, drawn = adapted("lora", routing="learned", num_experts=3), adapted("lora")
    table = adapted("lora", routing="learned", num_experts=3, router="task", num_tasks=2, mix="weights")

    def one(words: str, argument: str, call: Callable[[], object], *inputs: nn.Module) -> Kind:
        return Kind(f"gates of a model: {words}", argument, call, inputs)

    yield one("merged without a word", "model", lambda: ak.merge(model), model)
    yield one("merged by the sum", "gates", lambda: ak.merge(model, gates="sum"), model)
    yield one("merged before any training", "model", lambda: ak.merge(model, gates="mean"), model)
    yield one("mean gates of drawn experts", "gates", lambda: ak.merge(drawn, gates="mean"), drawn)
    yield one("losses of a bare model", "model", lambda: ak.gate_losses(plain()))
    for words, value in (("of no table", [0]), ("floating", [0.5]), ("outside", [2]), ("below", [-1]), ("none", []),
                         ("of two axes", [[0]])):  # fmt: skip
        of_table = words != "of no table"
        target, name = (table, "tasks") if of_table else (model, "model")
        yield one(f"tasks {words}", name, lambda t=target, v=value: ak.use_tasks(t, v).__enter__(), target)
    by_depth = dict(method="lora", routing="learned", target_modules=["0"], experts_pattern=[2, 4])
    call = lambda: ak.adapt(plain(), ak.AdaMixConfig(**by_depth))  # noqa: E731
    yield one("a list by depth where nothing has a number", "experts_pattern", call)
