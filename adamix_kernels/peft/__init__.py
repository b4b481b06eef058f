"""accelerate: the LoRA layers of Hugging Face PEFT through routed_lora, mixed batches in training too."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from .._backends import check_request
from .._extras import needed
from .gates import XLoraForward
from .layers import HOOKS, Indices, LoraForward, MixedHooks

logger = logging.getLogger(__name__)


class Accelerated:
    """What accelerate() did to a model.

    Attributes:
        model: the PeftModel. layers: paths of the layers that go through routed_lora.
        left: path -> why, of the LoRA layers that stay PEFT's.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], left: dict[str, str], tuner: nn.Module):
        self.model, self.layers, self.left = model, list(layers), left
        self._modules, self._tuner = list(layers.values()), tuner

    def restore(self) -> nn.Module:
        """Gives every layer PEFT's own forward again, and returns the model. More than once does no harm."""
        for module in self._modules:
            _give_back(module)
        if isinstance(vars(self._tuner).get(HOOKS), MixedHooks):
            delattr(self._tuner, HOOKS)
        return self.model

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_error: object) -> None:
        self.restore()


def accelerate(model: nn.Module, *, backend: str = "auto") -> Accelerated:
    """Sends the LoRA layers of a PeftModel through routed_lora, until .restore().

    y = base(x) + s_i B_i A_i x, i the adapter of the sample: one call for all adapters of a batch, where PEFT loops
    over them, cuts the batch and adds the pieces. What is computed, the parameters, their names, saving, set_adapter,
    merging and unloading stay PEFT's. `adapter_names=[...]` works in training, too: every adapter gets the gradients of
    its own samples, and None where it has none.

    X-LoRA's scalings and Arrow's coefficients are gates: y = base(x) + sum_k g_k s_k B_k A_k x, one call where PEFT
    loops over the adapters (X-LoRA) or makes a [tokens, adapters, N] tensor (Arrow). Differentiable in the gates.

    Args:
        model: of PEFT: with LoRA of linear layers, X-LoRA, or LoRA with an Arrow router; several active adapters, mixed
            ranks and scalings, "__base__". What PEFT itself computes otherwise stays with it, call by call: DoRA and
            other variants, trained biases, merged or disabled adapters, several active adapters, X-LoRA or Arrow with
            dropout in training; and layers of another class than its Linear (quantised, embeddings, convolutions),
            which `left` names.
        backend: as in routed_lora.

    In training with dropout, one mask is drawn for a mixed batch.

    Returns an Accelerated, also a context manager: `with accelerate(model): ...`.

    Example:
        >>> fast = accelerate(peft_model)  # doctest: +SKIP
        >>> loss = peft_model(**batch, adapter_names=["a", "b", "a", "__base__"]).loss  # doctest: +SKIP
        >>> fast.restore()  # doctest: +SKIP

    Raises:
        TypeError: `model` is no PeftModel. ValueError: it has no LoRA, or is accelerated already; backend is none.
            At a forward, RuntimeError: adapter_names in training under activation checkpointing, which would recompute
            the layers without the names.
        ModuleNotFoundError: PEFT is not installed.
    """
    check_request(backend)
    with needed("accelerate"):
        import peft
        from peft.tuners.lora import layer as lora
        from peft.tuners.lora.model import LoraModel
        from peft.tuners.xlora import XLoraModel
        from peft.tuners.xlora.layer import XLoraLinearLayer

    if not isinstance(model, peft.PeftModel):
        raise TypeError(f"model: got {type(model).__name__}, expected a PeftModel: get_peft_model, or from_pretrained")
    tuner: Any = model.base_model
    if not isinstance(tuner, (LoraModel, XLoraModel)):
        raise ValueError(f"model: got a PeftModel of {type(tuner).__name__}, expected one of LoRA or X-LoRA")
    replaced = {path: vars(module)["forward"] for path, module in model.named_modules() if "forward" in vars(module)}
    if HOOKS in vars(tuner) or any(isinstance(forward, XLoraForward) for forward in replaced.values()):
        raise ValueError("model: got one that is accelerated already, expected restore() first")
    layers: dict[str, nn.Module] = {}
    left = {}
    for path, module in model.named_modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        gated = isinstance(getattr(replaced.get(path), "__self__", None), XLoraLinearLayer)
        if type(module) is lora.Linear and (gated or path not in replaced):
            layers[path] = module
        else:
            left[path] = "its forward was replaced" if type(module) is lora.Linear else type(module).__name__
    if not layers:
        raise ValueError(f"model: got no LoRA of a plain linear layer, only {sorted(set(left.values()))}")
    indices = Indices()
    for path, module in layers.items():
        owner: Any = module
        own = replaced.get(path)
        owner.forward = LoraForward(module, backend, indices) if own is None else XLoraForward(module, own, backend)
    if isinstance(tuner, LoraModel):
        setattr(tuner, HOOKS, MixedHooks(tuner))
    if left:
        logger.warning("accelerate: %d LoRA layers stay PEFT's: %s", len(left), ", ".join(sorted(set(left.values()))))
    return Accelerated(model, layers, left, tuner)


def restore(model: nn.Module) -> nn.Module:
    """Undoes accelerate(model); see Accelerated.restore. Returns `model`; one that is not accelerated stays."""
    for module in model.modules():
        _give_back(module)
        if isinstance(vars(module).get(HOOKS), MixedHooks):
            delattr(module, HOOKS)
    return model


def _give_back(module: Any) -> None:
    """PEFT's own forward."""
    forward = vars(module).get("forward")
    if isinstance(forward, LoraForward):
        del module.forward
    elif isinstance(forward, XLoraForward):
        module.forward = forward.own


__all__ = ["Accelerated", "accelerate", "restore"]
