"""Random modules: RoutedAdapter, RoutedLoRALinear and the reference project's two layers, routed and merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from adamix_kernels import RoutedAdapter, RoutedLoRALinear
from adamix_kernels.compat import AdamixMergedLinear, ExpertSoup
from adamix_kernels.routing import LEVELS, Router

from ..numerics import plain
from .case import bits

MODES = ("training", "training", "training", "learning the merging", "merged", "random per sample", "random per token")


@dataclass
class Layer:
    """A module with drawn sizes, parameters and routing, and its input. banks: parameter -> its side.

    definition(x, i, j): in float64, x [n, 1, K], each row through its experts [n] of both sides; None is the mean.
    """

    said: str
    module: nn.Module
    x: torch.Tensor
    definition: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
    seed: int
    banks: dict[str, int]

    def __repr__(self) -> str:
        return self.said


@st.composite
def layers(draw) -> Layer:
    size = st.integers(1, 5)
    kind = draw(st.sampled_from((_adapter, _lora, _soup, _merged_linear)))
    seed = draw(st.integers(0, 2**32 - 1))
    torch.manual_seed(seed)
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    experts, rank, features = draw(st.integers(1, 5)), draw(size), draw(size)
    share = draw(st.sampled_from(("up", "down", None)))
    mode = draw(st.sampled_from(MODES))
    router = Router(draw(st.sampled_from(LEVELS)), draw(st.integers(1, 3)))
    shape = draw(st.sampled_from(((0,), (1,), (4,), (6, 3), (2, 1), (3, 0), (4, 2, 2))))
    module, definition, banks = kind(draw, features, rank, experts, share, router)
    module = module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    if mode == "learning the merging":
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("score" in name)
    of_package = kind in (_adapter, _lora)
    if of_package and mode.startswith("random"):
        router.eval_level = mode.rpartition(" ")[2]
    module.train(mode.startswith(("training", "learning")))
    x = torch.randn(*shape, features, dtype=dtype)
    said = f"{type(module).__name__}({features}, {rank}, M={experts}, share={share}), x {tuple(x.shape)} {dtype}, "
    said += f"{mode}, {router.level} x {router.passes}, seed {seed}"
    return Layer(said, module, x, definition, seed, banks)


def _adapter(draw, features, rank, experts, share, router):
    activation = draw(st.sampled_from(tuple(plain.ACTIVATIONS)))
    module = RoutedAdapter(features, rank, experts, share, activation, router=router)

    def definition(x, i, j):
        return _adapter_by_definition(x, i, j, module.banks(), (module.down_score, module.up_score), activation)

    return module, definition, {"down_weight": 0, "down_bias": 0, "up_weight": 1, "up_bias": 1}


def _lora(draw, features, rank, experts, share, router):
    outputs = draw(st.integers(1, 3)) * 3
    conv = draw(st.booleans())
    base = Conv1D(outputs, features) if conv else nn.Linear(features, outputs, bias=draw(st.booleans()))
    targets = draw(st.sampled_from((None, ["q"], ["q", "v"], ["v", "k", "q"])))
    module = RoutedLoRALinear.from_linear(base, rank, 4.0, experts, share, targets=targets, router=router)

    def definition(x, i, j):
        banks, scores = (module.lora_a, module.lora_b), (module.a_score, module.b_score)
        return _lora_by_definition(x, i, j, module, banks, scores, conv)

    return module, definition, {"lora_a": 0, "lora_b": 1}


def _soup(draw, features, rank, experts, share, router):
    act = draw(st.sampled_from((None, "gelu", "gelu_new", "relu", "silu")))
    level = draw(st.sampled_from((0, 1, 3)))
    module = ExpertSoup(features, rank, act, experts, level, int(share == "down"), int(share == "up"))

    def definition(x, i, j):
        sides = module.MoA_A, module.MoA_B
        banks = [bank for s in sides for bank in (s.deepspeed_experts.weight, s.deepspeed_experts.bias)]
        scores = [s.expert_score_weight for s in sides]
        return _adapter_by_definition(x, i, j, banks, scores, {"gelu_new": "gelu_tanh"}.get(act, act))

    module.forward = lambda x, forward=module.forward: forward(x, x)
    names = {f"MoA_{'AB'[side]}.deepspeed_experts.{kind}": side for side in (0, 1) for kind in ("weight", "bias")}
    return module, definition, names


def _merged_linear(draw, features, rank, experts, share, router):
    enabled = draw(st.sampled_from(([True], [True, False, True], [False, True], [True, True])))
    conv = draw(st.booleans())
    module = AdamixMergedLinear(
        experts, int(share == "down"), int(share == "up"), in_features=features, out_features=2 * len(enabled),
        r=rank, lora_alpha=3, enable_lora=enabled, fan_in_fan_out=conv,
    )  # fmt: skip

    def definition(x, i, j):
        banks, scores = (module.experts_lora_A, module.experts_lora_B), [module.lora_expert_score_weight] * 2
        return _lora_by_definition(x, i, j, module, banks, scores, conv)

    return module, definition, {"experts_lora_A": 0, "experts_lora_B": 1}


def _adapter_by_definition(x, i, j, banks, scores, activation):
    sides = (scores[0], i), (scores[0], i), (scores[1], j), (scores[1], j)
    chosen = [_bank(bank, score, index) for bank, (score, index) in zip(banks, sides, strict=True)]
    return plain.adapter(x, *chosen, i, j, x, activation, False)


def _lora_by_definition(x, i, j, module, banks, scores, conv):
    weight = module.weight.detach().double()
    base = x @ (weight if conv else weight.T)
    if module.bias is not None:
        base = base + module.bias.detach().double()
    a, b = (_bank(bank, score, index) for bank, score, index in zip(banks, scores, (i, j), strict=True))
    offsets = module.output_offsets
    return plain.lora(x, a, b, base, i, j, module.scaling, len(offsets), offsets, None, 0.0)


def _bank(bank, score, index):
    """A bank in float64 for experts `index`: the bank itself, or for None its weighted mean as a bank of one."""
    bank = bank.detach().double()
    if index is not None or len(bank) == 1:
        return bank
    return plain.mean_of_experts(bank, score.detach().double()).unsqueeze(0)


def check_layer(case: Layer) -> None:
    """The output by definition with the experts that were drawn, in x's shape and dtype; the same bits from the same
    seed; a gradient of exactly zero for the experts not drawn; and the state dict carries all of it."""
    module, x = case.module, case.x.clone().requires_grad_()
    drawn, out = _watched(case, x)
    again, second = _watched(case, x)
    assert torch.equal(bits(out), bits(second)), f"{case}: other bits from the same seed"
    assert all(map(torch.equal, drawn, again)), f"{case}: other experts from the same seed"
    assert out.shape[:-1] == x.shape[:-1], f"{case}: {tuple(out.shape)}"
    assert out.dtype == x.dtype, f"{case}: {out.dtype}"
    want, used = _by_definition(case, drawn)
    tolerance = 1e-10 if x.dtype == torch.float64 else 2e-4
    scale = 1 + (want.abs().max().item() if want.numel() else 0)
    error = (out.detach().double().reshape(want.shape) - want).abs().max().item() if want.numel() else 0
    assert error <= tolerance * scale, f"{case}: {error} of {scale}"
    if out.requires_grad:
        out.sum().backward()
        parameters = dict(module.named_parameters())
        for name, side in case.banks.items():
            bank = parameters[name]
            if bank.grad is None or used[side] is None:
                continue
            idle = torch.ones(len(bank), dtype=torch.bool)
            idle[used[side]] = False
            assert bank.grad[idle].eq(0).all(), f"{case}: a gradient for an expert of {name} that was not drawn"
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(module.state_dict())
    torch.manual_seed(case.seed)
    assert torch.equal(bits(out), bits(twin(x))), f"{case}: another output after the state dict's way"


def _watched(case: Layer, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(what was drawn, in order; the output)."""
    seen: list[torch.Tensor] = []
    routers = [m.router for m in case.module.modules() if isinstance(getattr(m, "router", None), Router)]
    for router in routers:
        draw = router.draw

        def watched(*args, draw=draw):
            index = draw(*args)
            if index is not None:
                seen.append(index.clone())
            return index

        router.draw = watched
    torch.manual_seed(case.seed)
    try:
        return seen, case.module(x)
    finally:
        for router in routers:
            del router.draw


def _by_definition(case: Layer, drawn: list[torch.Tensor]):
    """([rows, N] in float64, the experts used of each side or None where the mean was)."""
    rows = case.x.double().reshape(-1, 1, case.x.shape[-1])
    batch, tokens = _samples(case)
    parameters = dict(case.module.named_parameters())
    sizes = {side: len(parameters[name]) for name, side in case.banks.items()}
    waiting = iter(drawn)
    ids = [_per_row(next(waiting, None), batch, tokens) if sizes[side] > 1 else None for side in (0, 1)]
    assert next(waiting, None) is None, f"{case}: drawn more often than there are sides"
    return case.definition(rows, *ids).squeeze(1), [None if i is None else i.unique() for i in ids]


def _samples(case: Layer) -> tuple[int, int]:
    """(B, S) of x [..., K]: the first axis and the others; of the reference project's layers the last two are S, K."""
    rows = case.x.numel() // case.x.shape[-1]
    if isinstance(case.module, (RoutedAdapter, RoutedLoRALinear)):
        return len(case.x), rows // max(1, len(case.x))
    tokens = case.x.shape[-2]
    return rows // max(1, tokens), tokens


def _per_row(index: torch.Tensor | None, batch: int, tokens: int) -> torch.Tensor | None:
    """An index of one expert a pass, a sample or a token as one a row [B*S]."""
    if index is None:
        return None
    if index.dim() == 2:
        return index.reshape(-1)
    if len(index) and batch % len(index) == 0 and len(index) != batch:
        index = index.repeat_interleave(batch // len(index))
    return index.repeat_interleave(tokens)
