"""The check behind the step benchmark: AdaMix computes what the published way computes with the same experts."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from adamix_kernels.routing import Router

from .contenders import ADAMIX, ORIGINAL, Contender, Inputs, Workload, build, trainable_outside
from .original import original_lm_loss, original_loss

logger = logging.getLogger(__name__)

DRAWS = 3
# What a bank of ours holds: (attribute, side of the published layer, "weight" or "bias").
_ADAPTER_BANKS = tuple((f"{side}_{kind}", side, kind) for side in ("down", "up") for kind in ("weight", "bias"))
_LORA_BANKS = (("lora_a", "down", "weight"), ("lora_b", "up", "weight"))


def agreement_problem(base: nn.Module, workload: Workload, backend: str = "auto") -> str | None:
    """What is wrong, or None: loss and every gradient of the AdaMix step against the published way.

    The AdaMix step runs as it is timed, its draws are recorded and replayed in the published way; dropout
    off, float32, at most 4 x 16 tokens, three draws. The published way in float64 is the truth; the AdaMix
    step may err at most 4 times what the published way errs in float32. base: on the device to check on.
    backend: of the AdaMix ops.
    """
    small = Workload(**{**vars(workload), "batch": min(4, workload.batch), "tokens": min(16, workload.tokens)})
    base = copy.deepcopy(base)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    contender = build(ADAMIX, base, small, backend=backend)
    ours, published = contender.model, build(ORIGINAL, base, small).model
    _make_passes_differ(ours)
    _copy_trained(ours, published)
    truth = copy.deepcopy(published).double()
    (inputs, labels), = small.batches(base.config.vocab_size, 1)  # fmt: skip
    device = next(base.parameters()).device
    inputs, labels = {name: value.to(device) for name, value in inputs.items()}, labels.to(device)
    for _ in range(DRAWS):
        with _recorded() as draws:
            found = _our_gradients(contender, inputs, labels)
        drawn = [index.flatten().tolist() for index in draws]
        if [len(experts) for experts in drawn] != [2] * len(ours.adamix.paths):
            return f"drew experts {drawn}, expected one for each pass in each of {len(ours.adamix.paths)} layers"
        experts = ([first for first, _ in drawn], [second for _, second in drawn])
        right = _published_gradients(truth, inputs, labels, experts, ours)
        floor = torch.finfo(torch.float32).eps
        allowed = 4 * max(_error(_published_gradients(published, inputs, labels, experts, ours), right), floor)
        error = _error(found, right)
        logger.info("experts %s: error %.2e, allowed %.2e", drawn, error, allowed)
        if not error <= allowed:
            return f"with experts {drawn} the loss or a gradient errs by {error:.2e} of its size, allowed {allowed:.2e}"
    return None


class _Watched(TorchFunctionMode):
    """Changes nothing; autograd's nodes in C++, which draw for themselves, leave alone what is watched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _recorded() -> Iterator[list[torch.Tensor]]:
    """What the router gave each layer, in their order: on a GPU all of it is drawn in one launch."""
    draws: list[torch.Tensor] = []
    real = Router._drawn

    def drawn(router: Router, *arguments) -> torch.Tensor:
        draws.append(real(router, *arguments))
        return draws[-1]

    with mock.patch.object(Router, "_drawn", drawn), _Watched():
        yield draws


def _make_passes_differ(model: nn.Module) -> None:
    """Weights at the scale of their inputs: fresh experts are too alike for a missing consistency loss to show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _copy_trained(ours: nn.Module, published: nn.Module) -> None:
    with torch.no_grad():
        for name in trainable_outside(ours):
            published.get_parameter(name).copy_(ours.get_parameter(name))
        for path, layer, banks in _layers(ours):
            for bank, side, kind in banks:
                for m, expert in enumerate(getattr(published.get_submodule(path), side).experts):
                    getattr(expert, kind).copy_(getattr(layer, bank)[m])


def _layers(ours: nn.Module):
    """(path, module with the banks, its banks) of every adapted place."""
    for path in ours.adamix.paths:
        layer = ours.get_submodule(path)
        yield (path, layer.adapter, _ADAPTER_BANKS) if hasattr(layer, "adapter") else (path, layer, _LORA_BANKS)


def _our_gradients(contender: Contender, inputs: Inputs, labels: torch.Tensor) -> Inputs:
    model = contender.model
    model.zero_grad()
    loss = contender.loss(inputs, labels)
    loss.backward()
    found = {name: model.get_parameter(name).grad for name in trainable_outside(model)}
    for path, layer, banks in _layers(model):
        for bank, _, _ in banks:
            found[f"{path}.{bank}"] = getattr(layer, bank).grad
    return {"loss": loss.detach(), **found}


def _published_gradients(
    model: nn.Module, inputs: Inputs, labels: torch.Tensor, experts: tuple[list[int], list[int]], ours: nn.Module
) -> Inputs:
    """Under the names of `_our_gradients`: experts stacked, zeros for one that was not used."""
    model.zero_grad()
    loss = (original_lm_loss if labels.dim() == 2 else original_loss)(model, inputs, labels, experts)
    loss.backward()
    found = {name: model.get_parameter(name).grad for name in trainable_outside(ours)}
    for path, _, banks in _layers(ours):
        for name, side, kind in banks:
            bank = [getattr(e, kind) for e in getattr(model.get_submodule(path), side).experts]
            found[f"{path}.{name}"] = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in bank])
    return {"loss": loss.detach(), **found}


def _error(found: Inputs, right: Inputs) -> float:
    """Largest error of any tensor, relative to that tensor's largest entry; inf where one is missing."""
    errors = []
    for name, truth in right.items():
        value = found[name]
        if value is None or not value.isfinite().all():
            return float("inf")
        scale = truth.abs().max().clamp_min(torch.finfo(truth.dtype).tiny)
        errors.append(((value.double() - truth).abs().max() / scale).item())
    return max(errors)
