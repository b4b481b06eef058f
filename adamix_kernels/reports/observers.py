"""Watching an AdaMix model train: which experts are drawn, and how often the two passes agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..models.gating import is_learned, usage
from ..models.state import adamix_state
from ..modules import AdaptedLayer


class DrawCounter:
    """Counts the experts drawn in training, by layer, both sides together, on the model's device.

    A draw is one index: one a pass, sample or token, as the routing has it. A shared side draws nothing. Activation
    checkpointing counts its layers twice. Between start() and stop() the model must not be compiled.
    Learned gates draw nothing: their shares are the mean gates.
    """

    def __init__(self, model: nn.Module):
        state = adamix_state(model)
        layers = [model.get_submodule(path) for path in state.paths]
        self._layers = [layer.adapter if isinstance(layer, AdaptedLayer) else layer for layer in layers]
        self._router, self._model = state.router, model
        self._counts = torch.zeros(len(layers), state.config.num_experts, dtype=torch.int64)
        self._handles: list[Any] = []
        self._current = 0

    def start(self) -> None:
        for number, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(lambda *_args, n=number: self._enter(n)))
        draw = self._router.draw

        def counted(num_experts: int, batch: int, tokens: int, device: torch.device, training: bool) -> Any:
            index = draw(num_experts, batch, tokens, device, training)
            if training and index is not None:
                self._add(index)
            return index

        self._router.draw = counted  # type: ignore[method-assign]  # for as long as it watches

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._router.__dict__.pop("draw", None)

    def shares(self) -> list[list[float]]:
        """[layers][experts], each layer's shares of its draws, or its mean gates; empty before any."""
        if is_learned(self._model):
            return usage(self._model)
        totals = self._counts.sum(1, keepdim=True)
        if not bool(totals.all()):
            return []
        return (self._counts / totals).tolist()

    def _enter(self, number: int) -> None:
        self._current = number

    @torch.no_grad()
    def _add(self, index: torch.Tensor) -> None:
        if self._counts.device != index.device:
            self._counts = self._counts.to(index.device)
        experts = torch.arange(self._counts.shape[1], device=index.device)
        self._counts[self._current] += (index.reshape(-1, 1) == experts).sum(0)


class Agreement:
    """Share of samples that both passes of a training batch give the same class; for logits [2B, C], C > 1."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._same: torch.Tensor | None = None
        self._batches = 0
        self._handle: Any = None

    def start(self) -> None:
        self._handle = self._model.register_forward_hook(self._note)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def take(self) -> float | None:
        """The mean over the batches since the last call; None where there was none to compare."""
        if not self._batches:
            return None
        value = None if self._same is None else float((self._same / self._batches).item())
        self._same, self._batches = None, 0
        return value

    @torch.no_grad()
    def _note(self, model: nn.Module, _args: Any, output: Any) -> None:
        logits = output.get("logits") if isinstance(output, dict) else None
        if not model.training or adamix_state(model).router.passes != 2 or logits is None:
            return
        if logits.dim() != 2 or logits.shape[1] < 2 or logits.shape[0] % 2:
            return
        first, second = logits.argmax(-1).chunk(2)
        same = (first == second).float().mean()
        self._same = same if self._same is None else self._same + same
        self._batches += 1
