"""accelerate: the LoRA layers of Hugging Face PEFT through routed_lora, mixed batches in training too."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ._backends import check_request
from ._extras import needed
from .functional import routed_lora
from .modules._banks import as_batch
from .modules.lora import may_overwrite

logger = logging.getLogger(__name__)

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


class _Adapter(NamedTuple):
    """One adapter of a layer. drops: its probability of dropping now; 0 in evaluation."""

    name: str
    lora_a: torch.Tensor  # [r, K]
    lora_b: torch.Tensor  # [N, r]
    scaling: float
    drops: float


class LoraForward:
    """The forward of one lora.Linear."""

    def __init__(self, module: Any, backend: str):
        self.module, self.backend = module, backend
        self._indices: dict[Any, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        module = self.module
        module._check_forward_args(x, *args, **kwargs)
        names: Sequence[str] | None = kwargs.get("adapter_names")
        used = None
        if x.dim() > 1 and x.is_floating_point() and kwargs.get("alora_offsets") is None:
            used = self._used(names)
        if used is None:
            own: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
            return own
        rest = {key: value for key, value in kwargs.items() if key not in ("adapter_names", "alora_offsets")}
        result: torch.Tensor = module.base_layer(x, *args, **rest)
        return self._added(x, result, used, names) if used else result

    def _used(self, names: Sequence[str] | None) -> list[_Adapter] | None:
        """The adapters that serve here; None where PEFT's own forward must."""
        module = self.module
        if module.disable_adapters or module.merged:
            return None
        # Looked up once: nn.Module's attribute access would take longer than the products of few tokens.
        downs, ups, dropouts = module.lora_A._modules, module.lora_B._modules, module.lora_dropout._modules
        variants, scaling = module.lora_variant, module.scaling
        used: list[_Adapter] = []
        for name in dict.fromkeys(names if names is not None else module.active_adapters):
            if name not in downs:
                continue
            down, up, dropout = downs[name], ups[name], dropouts[name]
            if name in variants or type(down) is not nn.Linear or type(up) is not nn.Linear or up.bias is not None:
                return None
            drops = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            used.append(_Adapter(name, down.weight, up.weight, float(scaling[name]), drops))
        if len({(one.lora_a.dtype, one.lora_a.device) for one in used}) > 1:
            return None
        several = names is None and len(used) > 1
        return None if several and any(one.drops for one in used) else used

    def _added(
        self, x: torch.Tensor, result: torch.Tensor, used: list[_Adapter], names: Sequence[str] | None
    ) -> torch.Tensor:  # fmt: skip
        module = self.module
        dtype = used[0].lora_a.dtype
        x = module._cast_input_dtype(x, dtype) if names is None else x.to(dtype)
        if any(one.drops for one in used):
            x = self._dropped(x, used, names)
        index = None if names is None else self._index(used, names, x.device)
        lora_a, lora_b, scaling = _stacked(used, names)
        rows, added = as_batch(x), as_batch(result)
        same = rows.dtype == added.dtype
        out = routed_lora(
            rows,
            lora_a,
            lora_b,
            index,
            index,
            base=added if same else None,
            scaling=scaling,
            inplace=same and may_overwrite(module.base_layer, rows, added),
            backend=self.backend,
        )
        out = out if same else (added + out).to(result.dtype)
        return out.view(result.shape)

    def _dropped(self, x: torch.Tensor, used: list[_Adapter], names: Sequence[str] | None) -> torch.Tensor:
        """PEFT's own draw where one probability serves; else one mask, each sample with its adapter's."""
        rates = {one.name: one.drops for one in used}
        if len(set(rates.values())) == 1:
            dropped: torch.Tensor = self.module.lora_dropout[used[0].name](x)
            return dropped
        assert names is not None  # several active adapters with dropout are PEFT's
        kept = [1.0 - rates.get(name, 0.0) for name in names]
        keep = torch.tensor(kept, device=x.device, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
        return x * (torch.rand_like(x) < keep) / keep

    def _index(self, used: list[_Adapter], names: Sequence[str], device: torch.device) -> torch.Tensor | None:
        """[B] into the bank of `used` and, for samples without an adapter here, its last row of zeros."""
        place = {one.name: number for number, one in enumerate(used)}
        if len(place) == 1 and all(name in place for name in names):
            return None
        key = (tuple(names), tuple(place), device)
        found = self._indices.get(key)
        if found is None:
            found = torch.tensor([place.get(name, len(place)) for name in names], device=device)
            if not torch.compiler.is_compiling():
                if len(self._indices) >= _KEPT:
                    self._indices.clear()
                self._indices[key] = found
        return found


def _stacked(used: list[_Adapter], names: Sequence[str] | None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(A [M, r, K], B [M, N, r], scaling), B with what the adapters' scalings differ by; of several active adapters one
    of all their ranks.

    Made anew at each call: what writes to a weight through .data leaves no trace to keep them by.
    """
    downs, ups = [one.lora_a for one in used], [one.lora_b for one in used]
    scalings = [one.scaling for one in used]
    common = scalings[0] if len(set(scalings)) == 1 else 1.0
    if names is None:
        ups = [b if s == common else b * s for b, s in zip(ups, scalings, strict=True)]
        return torch.cat(downs).unsqueeze(0), torch.cat(ups, 1).unsqueeze(0), common
    rank = max(a.shape[0] for a in downs)
    downs = [a if a.shape[0] == rank else F.pad(a, (0, 0, 0, rank - a.shape[0])) for a in downs]
    ups = [b if b.shape[1] == rank else F.pad(b, (0, rank - b.shape[1])) for b in ups]
    here = {one.name for one in used}
    if any(name not in here for name in names):
        downs.append(downs[0].new_zeros(downs[0].shape))
        ups.append(ups[0].new_zeros(ups[0].shape))
        scalings.append(1.0)
    lora_b = torch.stack(ups)
    if any(s != common for s in scalings[: len(used)]):
        lora_b = lora_b * torch.tensor(scalings, dtype=lora_b.dtype, device=lora_b.device).view(-1, 1, 1)
    return torch.stack(downs), lora_b, common


__all__ = ["Accelerated", "accelerate", "restore"]
