"""Bad input of the modules, the router, the configuration and the reference project's constructors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from adamix_kernels import AdaMixConfig, AdaMixLoss, RoutedAdapter, RoutedLoRALinear, double_batch
from adamix_kernels.compat import AdamixMergedLinear, ExpertSoup
from adamix_kernels.routing import Router

from .kinds import Kind, instead, wrong_arguments

_NAN, _INF = float("nan"), float("inf")
_NO_SIZE = (0, -1, 1.5, "4", None, True)
_NO_PROBABILITY = (-0.1, 1.0, 2, _NAN, "0.1", None)


def kinds() -> list[Kind]:
    return [
        *_adapter(), *_lora(), *_config(), *_router(), *_compat(), *_forwards(),
        Kind("double_batch: inputs: no tensor", "inputs", lambda: double_batch({"text": "a"})),
        Kind("double_batch: inputs: a number", "inputs", lambda: double_batch(3)),
        Kind("double_batch: inputs: a tensor without an axis", "inputs", lambda: double_batch(torch.zeros(()))),
    ]  # fmt: skip


def constructed(maker: Callable, valid: Callable[[], dict], wrong: dict[str, tuple]) -> Iterator[Kind]:
    """A Kind for each (argument, value) that `maker` must refuse."""
    changes = [(name, f"{value!r}", instead(name, value)) for name, values in wrong.items() for value in values]
    return wrong_arguments(maker, valid, changes)


def _adapter():
    yield from constructed(
        RoutedAdapter,
        lambda: dict(hidden_size=4, bottleneck=2, num_experts=3),
        dict(
            hidden_size=_NO_SIZE, bottleneck=_NO_SIZE, num_experts=_NO_SIZE, share=("both", "", 1, True),
            activation=("GELU", "", 1), backend=("gpu", "", None), router=("batch", 1),
        ),
    )  # fmt: skip


def _lora():
    yield from constructed(
        RoutedLoRALinear,
        lambda: dict(
            base=nn.Linear(4, 6), in_features=4, out_features=6, r=2, alpha=4.0, num_experts=3, groups=2,
            output_offsets=(0, 3),
        ),
        dict(
            base=(None, "linear"), in_features=_NO_SIZE, out_features=_NO_SIZE, r=_NO_SIZE, num_experts=_NO_SIZE,
            alpha=(_NAN, _INF, "4", None), share=("both", 1), dropout=_NO_PROBABILITY, groups=_NO_SIZE,
            output_offsets=((0,), (0, 1, 2), (-1, 3), (0, 6), (0, 0), 0, None, ("0", "3")),
            group_features=(0, -1, 1.5), backend=("gpu", None), router=("batch",), fan_in_fan_out=("yes", None),
        ),
    )  # fmt: skip
    wrap = RoutedLoRALinear.from_linear
    layer = nn.Linear(4, 6)
    for words, argument, make in (
        ("a layer without sizes", "layer", lambda: wrap(nn.ReLU(), 2, 4.0, 3)),
        ("no layer", "layer", lambda: wrap(None, 2, 4.0, 3)),
        ("targets that are no names", "targets", lambda: wrap(layer, 2, 4.0, 3, targets=("a",))),
        ("no targets", "targets", lambda: wrap(layer, 2, 4.0, 3, targets=())),
        ("a target twice", "targets", lambda: wrap(layer, 2, 4.0, 3, targets=("q", "q"))),
        ("targets in a width that three do not divide", "targets",
         lambda: wrap(nn.Linear(4, 7), 2, 4.0, 3, targets=("q",))),
    ):  # fmt: skip
        yield Kind(f"from_linear: {words}", argument, make, (layer,))


def _config():
    yield from constructed(
        AdaMixConfig,
        dict,
        dict(
            method=("prefix", "", None, 1), num_experts=_NO_SIZE, bottleneck=_NO_SIZE, r=_NO_SIZE,
            alpha=(0.0, -1.0, _NAN, _INF, "4", None), dropout=_NO_PROBABILITY, share=("both", "", 1),
            activation=("tanh", "GELU", 1), routing=("expert", "", None, 1), 
            qkv=((), ("a",), ("q", "q"), "abc", 1), bias=("all", 1), use_rslora=("yes", 1), task_type=("POEM", 1),
            consistency_weight=(-1.0, _NAN, _INF, "1", None), layers_pattern=(["h"],), version=(0, 2, "1", None),
            target_modules=(1, [1], [None], {"q": 1}, "(["), exclude_modules=(1, [1], "(["),
            layers_to_transform=("1", [1.5], 2.5),
            modules_to_save=("classifier", 1, [1]),
        ),
    )  # fmt: skip
    read = AdaMixConfig.from_dict
    for words, argument, values in (
        ("a list", "config", []),
        ("None", "config", None),
        ("a key that is no field", "config", {"experts": 4}),
        ("another version", "version", {"version": 7, "unknown": 1}),
        ("a wrong value", "num_experts", {"num_experts": 0}),
    ):
        yield Kind(f"AdaMixConfig.from_dict: {words}", argument, lambda values=values: read(values))


def _router():
    yield from constructed(
        Router, dict, dict(level=("expert", "", None, 1, "merged"), passes=(0, -1, 1.5, "2", None, True))
    )
    for words, index, batch, tokens in (
        ("ids per token of another length", torch.zeros(2, 3, dtype=torch.int64), 2, 4),
        ("rows that do not divide the batch", torch.zeros(2, dtype=torch.int64), 3, 4),
        ("no rows", torch.zeros(0, dtype=torch.int64), 3, 4),
        ("a third of the rows of one token in training", torch.zeros(2, dtype=torch.int64), 6, 1),
    ):
        yield Kind(f"Router.draw: index: {words}", "index", lambda given=(index, batch, tokens): _drawn(*given))


def _drawn(index, batch, tokens):
    router = Router()
    router.experts = index
    return router.draw(3, batch, tokens, torch.device("cpu"), training=True)


def _compat():
    yield from constructed(
        ExpertSoup,
        lambda: dict(dim=4, r=2, act="gelu"),
        dict(
            dim=_NO_SIZE, r=_NO_SIZE, act=("tanh", "", 1), num_expert=_NO_SIZE, inference_level=(2, 4, -1, "3", None),
            sharing_down=(2, -1, "yes", None), sharing_up=(2, "yes", None),
        ),
    )  # fmt: skip
    yield from constructed(
        AdamixMergedLinear,
        lambda: dict(in_features=4, out_features=6, r=2, enable_lora=(True, False, True)),
        dict(
            num_experts=_NO_SIZE, r=_NO_SIZE, share_A=(2, "yes", None), share_B=(2, "yes", None),
            lora_dropout=_NO_PROBABILITY, enable_lora=((), (False,), (True,) * 4, 1, None),
            lora_alpha=(_NAN, _INF, "1", None), in_features=_NO_SIZE, out_features=_NO_SIZE,
        ),
    )  # fmt: skip


def _forwards():
    adapter, lora = RoutedAdapter(4, 2, 3), RoutedLoRALinear.from_linear(nn.Linear(4, 6), 2, 4.0, 3)
    soup, loss = ExpertSoup(4, 2, "gelu"), AdaMixLoss()
    x, labels = torch.randn(2, 3, 4), torch.zeros(1, 3, dtype=torch.int64)
    for words, argument, call in (
        ("RoutedAdapter: one axis", "x", lambda: adapter(torch.randn(4))),
        ("RoutedAdapter: another width", "x", lambda: adapter(torch.randn(2, 3, 5))),
        ("RoutedAdapter: no tensor", "x", lambda: adapter([1.0])),
        ("RoutedAdapter: integers", "x", lambda: adapter(torch.ones(2, 3, 4, dtype=torch.int64))),
        ("RoutedAdapter: another residual", "residual", lambda: adapter(x, torch.randn(2, 3, 5))),
        ("RoutedAdapter: a residual of other rows", "residual", lambda: adapter(x, torch.randn(2, 4, 4))),
        ("RoutedLoRALinear: one axis", "x", lambda: lora(torch.randn(4))),
        ("RoutedLoRALinear: another width", "x", lambda: lora(torch.randn(2, 3, 5))),
        ("RoutedLoRALinear: no tensor", "x", lambda: lora([1.0])),
        ("RoutedLoRALinear: integers", "x", lambda: lora(torch.ones(2, 3, 4, dtype=torch.int64))),
        ("ExpertSoup: another width", "x", lambda: soup(torch.randn(2, 3, 5), torch.randn(2, 3, 5))),
        ("ExpertSoup: another residual", "residual", lambda: soup(x, torch.randn(2, 3, 5))),
        ("AdaMixLoss: an odd batch", "logits", lambda: loss(torch.randn(3, 3, 4), labels)),
        ("AdaMixLoss: a label of no class", "labels", lambda: loss(x, labels + 4)),
        ("AdaMixLoss: weight -1", "weight", lambda: AdaMixLoss(weight=-1.0)(x, labels)),
        ("AdaMixLoss: label_smoothing 2", "label_smoothing", lambda: AdaMixLoss(label_smoothing=2.0)(x, labels)),
        ("AdaMixLoss: ignore_index None", "ignore_index", lambda: AdaMixLoss(ignore_index=None)(x, labels)),
        ("AdaMixLoss: backend", "backend", lambda: AdaMixLoss(backend="gpu")(x, labels)),
    ):
        yield Kind(f"forward of {words}", argument, call, (adapter, lora, soup, x, labels))
