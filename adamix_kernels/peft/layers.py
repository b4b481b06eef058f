"""What stands in for the forward of PEFT's LoRA layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..modules._banks import as_batch
from .gates import add_update, arrow_output

_KEPT = 256  # indices of batches
HOOKS = "_enable_peft_forward_hooks"


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
                stack.enter_context(getattr(type(tuner), HOOKS)(tuner, *args, **kwargs))
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


class Indices:
    """Indices of batches into banks, each made once for all layers of a model that hold the same adapters."""

    def __init__(self) -> None:
        self._made: dict[Any, torch.Tensor] = {}

    def find(self, names: Sequence[str], adapters: tuple[str, ...], device: torch.device) -> torch.Tensor:
        """[B]: of each name its place among `adapters`; a name that is not among them: behind the last."""
        key = (tuple(names), adapters, device)
        found = self._made.get(key)
        if found is None:
            place = {name: number for number, name in enumerate(adapters)}
            found = torch.tensor([place.get(name, len(place)) for name in names], device=device)
            if not torch.compiler.is_compiling():
                if len(self._made) >= _KEPT:
                    self._made.clear()
                self._made[key] = found
        return found


class LoraForward:
    """The forward of one lora.Linear. indices: of the whole model."""

    def __init__(self, module: Any, backend: str, indices: Indices):
        self.module, self.backend, self.indices = module, backend, indices

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        module = self.module
        module._check_forward_args(x, *args, **kwargs)
        names: Sequence[str] | None = kwargs.get("adapter_names")
        used = None
        rest = {key: value for key, value in kwargs.items() if key not in ("adapter_names", "alora_offsets")}
        if x.dim() > 1 and x.is_floating_point() and kwargs.get("alora_offsets") is None:
            used = self._used(names)
            if used is None and names is None and not module.disable_adapters and not module.merged:
                gated = arrow_output(module, x, args, rest, self.backend)
                if gated is not None:
                    return gated
        if used is None:
            own: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
            return own
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
        out = add_update(module, rows, added, lora_a, lora_b, index, scaling, self.backend)
        return out.to(result.dtype).view(result.shape)

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
        if len(used) == 1 and all(name == used[0].name for name in names):
            return None
        return self.indices.find(names, tuple(one.name for one in used), device)


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
