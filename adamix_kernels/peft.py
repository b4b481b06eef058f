"""accelerate: the LoRA layers of Hugging Face PEFT through routed_lora, mixed batches in training too."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ._backends import check_request
from ._extras import needed
from .functional import routed_lora
from .modules._banks import as_batch
from .modules.lora import may_overwrite

logger = logging.getLogger(__name__)

_BASE = "__base__"  # PEFT's word for a sample without adapter
_KEPT = 32  # indices of batches, of one layer's banks
_HOOKS = "_enable_peft_forward_hooks"


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
            if isinstance(vars(module).get("forward"), LoraForward):
                del module.forward
        if isinstance(vars(self._tuner).get(_HOOKS), MixedHooks):
            delattr(self._tuner, _HOOKS)
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

    Args:
        model: of PEFT, with LoRA of linear layers; several active adapters, mixed ranks and scalings, "__base__".
            What PEFT itself computes otherwise stays with it, call by call: DoRA and other variants, trained biases,
            merged or disabled adapters, several active adapters with dropout in training; and layers of another class
            than its Linear (quantised, embeddings, convolutions), which `left` names.
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

    if not isinstance(model, peft.PeftModel):
        raise TypeError(f"model: got {type(model).__name__}, expected a PeftModel: get_peft_model, or from_pretrained")
    tuner: Any = model.base_model
    if not isinstance(tuner, LoraModel):
        raise ValueError(f"model: got a PeftModel of {type(tuner).__name__}, expected one of LoRA")
    if _HOOKS in vars(tuner):
        raise ValueError("model: got one that is accelerated already, expected restore() first")
    layers: dict[str, nn.Module] = {}
    left = {}
    for path, module in model.named_modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        if type(module) is lora.Linear and "forward" not in vars(module):
            layers[path] = module
        else:
            left[path] = "its forward was replaced" if type(module) is lora.Linear else type(module).__name__
    if not layers:
        raise ValueError(f"model: got no LoRA of a plain linear layer, only {sorted(set(left.values()))}")
    for module in layers.values():
        owner: Any = module
        owner.forward = LoraForward(module, backend)
    setattr(tuner, _HOOKS, MixedHooks(tuner))
    if left:
        logger.warning("accelerate: %d LoRA layers stay PEFT's: %s", len(left), ", ".join(sorted(set(left.values()))))
    return Accelerated(model, layers, left, tuner)


def restore(model: nn.Module) -> nn.Module:
    """Undoes accelerate(model); see Accelerated.restore. Returns `model`; one that is not accelerated stays."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), LoraForward):
            del module.forward
        if isinstance(vars(module).get(_HOOKS), MixedHooks):
            delattr(module, _HOOKS)
    return model


class MixedHooks:
    """PEFT's hooks that hand adapter_names to the layers, in training mode as well."""

    def __init__(self, tuner: Any):
        self.tuner = tuner

    @contextlib.contextmanager
    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        tuner = self.tuner
        training, names = tuner.training, kwargs.get("adapter_names")
        if training and names is not None and any(getattr(m, "gradient_checkpointing", False) for m in tuner.modules()):
            raise RuntimeError(
                "adapter_names: got a training forward under activation checkpointing, expected no checkpointing: the "
                "layers are recomputed in backward, without the names"
            )
        with contextlib.ExitStack() as stack:
            tuner.training = False  # of this one module, which alone is asked
            try:
                stack.enter_context(getattr(type(tuner), _HOOKS)(tuner, *args, **kwargs))
            finally:
                tuner.training = training
            yield


class LoraForward:
    """The forward of one lora.Linear."""

    def __init__(self, module: Any, backend: str):
        self.module, self.backend = module, backend
        self._indices: dict[Any, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        module = self.module
        module._check_forward_args(x, *args, **kwargs)
        names: Sequence[str] | None = kwargs.get("adapter_names")
        used = self._used(names)
        if used is None or x.dim() < 2 or not x.is_floating_point() or kwargs.get("alora_offsets") is not None:
            own: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
            return own
        rest = {key: value for key, value in kwargs.items() if key not in ("adapter_names", "alora_offsets")}
        result: torch.Tensor = module.base_layer(x, *args, **rest)
        return self._added(x, result, used, names) if used else result

    def _used(self, names: Sequence[str] | None) -> list[str] | None:
        """The adapters that serve here; None where PEFT's own forward must."""
        module = self.module
        if module.disable_adapters or module.merged:
            return None
        wanted = list(dict.fromkeys(names)) if names is not None else list(module.active_adapters)
        used = [name for name in wanted if name in module.lora_A]
        weights = [module.lora_A[name].weight for name in used]
        odd = any(
            name in module.lora_variant
            or getattr(module.lora_B[name], "bias", None) is not None
            or type(module.lora_A[name]) is not nn.Linear
            or type(module.lora_B[name]) is not nn.Linear
            for name in used
        )
        if odd or len({(weight.dtype, weight.device) for weight in weights}) > 1:
            return None
        if names is None and len(used) > 1 and self._drops(used):
            return None
        return used

    def _drops(self, used: Sequence[str]) -> bool:
        return any(self._rate(name) > 0 for name in used)

    def _rate(self, name: str) -> float:
        dropout = self.module.lora_dropout[name]
        return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _added(
        self, x: torch.Tensor, result: torch.Tensor, used: list[str], names: Sequence[str] | None
    ) -> torch.Tensor:  # fmt: skip
        module = self.module
        dtype = module.lora_A[used[0]].weight.dtype
        x = module._cast_input_dtype(x, dtype) if names is None else x.to(dtype)
        if self._drops(used):
            x = self._dropped(x, used, names)
        lora_a, lora_b = self._stacked(used, names)
        index = None if names is None else self._index(used, names, x.device)
        rows, added = as_batch(x), as_batch(result)
        if names is not None and lora_a.shape[0] == 1:
            index = None
        same = rows.dtype == added.dtype
        out = routed_lora(
            rows,
            lora_a,
            lora_b,
            index,
            index,
            base=added if same else None,
            inplace=same and may_overwrite(module.base_layer, rows, added),
            backend=self.backend,
        )
        out = out if same else (added + out).to(result.dtype)
        return out.view(result.shape)

    def _dropped(self, x: torch.Tensor, used: list[str], names: Sequence[str] | None) -> torch.Tensor:
        """PEFT's own draw where one adapter serves; else one mask, each sample with its adapter's probability."""
        rates = {self._rate(name) for name in used}
        if len(used) == 1 or len(rates) == 1:
            dropped: torch.Tensor = self.module.lora_dropout[used[0]](x)
            return dropped
        assert names is not None  # several active adapters with dropout are PEFT's
        kept = [1.0 - (self._rate(name) if name in used else 0.0) for name in names]
        keep = torch.tensor(kept, device=x.device, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
        return x * (torch.rand_like(x) < keep) / keep

    def _index(self, used: list[str], names: Sequence[str], device: torch.device) -> torch.Tensor:
        """[B] into the bank of `used` and, for samples without an adapter here, its last row of zeros."""
        key = (tuple(names), tuple(used), device)
        found = self._indices.get(key)
        if found is None:
            place = {name: number for number, name in enumerate(used)}
            found = torch.tensor([place.get(name, len(used)) for name in names], device=device)
            if not torch.compiler.is_compiling():
                if len(self._indices) >= _KEPT:
                    self._indices.clear()
                self._indices[key] = found
        return found

    def _stacked(self, used: list[str], names: Sequence[str] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [M, r, K], B [M, N, r] with the scaling in it); of several active adapters, one of all their ranks.

        Made anew at each call: what writes to a weight through .data leaves no trace to keep them by.
        """
        module = self.module
        scaled = [(module.lora_A[n].weight, module.lora_B[n].weight * module.scaling[n]) for n in used]
        if names is None:
            return torch.cat([a for a, _ in scaled]).unsqueeze(0), torch.cat([b for _, b in scaled], 1).unsqueeze(0)
        rank = max(a.shape[0] for a, _ in scaled)
        lora_a = [F.pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in scaled]
        lora_b = [F.pad(b, (0, rank - b.shape[1])) for _, b in scaled]
        if any(name not in used for name in names):
            lora_a.append(lora_a[0].new_zeros(lora_a[0].shape))
            lora_b.append(lora_b[0].new_zeros(lora_b[0].shape))
        return torch.stack(lora_a), torch.stack(lora_b)


__all__ = ["Accelerated", "accelerate", "restore"]
