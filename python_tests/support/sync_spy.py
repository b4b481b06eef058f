"""Sees, on the CPU, the calls of PyTorch that would make a GPU wait, or that a captured graph cannot hold."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# On a GPU each of these reads a value back (item, a size that depends on values), or copies from memory that is not
# pinned (lift_fresh is what torch.tensor and torch.as_tensor of numbers end in).
WAITING = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero",
    "aten::nonzero_numpy", "aten::argwhere", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave.Tensor", "aten::_assert_async",
    "aten::lift_fresh", "aten::_pin_memory", "aten::allclose", "aten::histc",
}  # fmt: skip


class SyncSpy(TorchDispatchMode):
    """`with SyncSpy() as spy: ...`: spy.found are the calls of WAITING within, inside this package's ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.seen.append(name)
        if name in WAITING or f"{name}.{func._overloadname}" in WAITING or _indexes_by_mask(name, args):
            self.found.append(name)
        if _crosses_devices(name, args, kwargs or {}):
            self.found.append(f"{name} from another device")
        if func.namespace.startswith("adamix"):
            # With the spy on: the op's own calls pass it as well.
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _indexes_by_mask(name, args):
    if name not in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"):
        return False
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _crosses_devices(name, args, kwargs):
    if name == "aten::_to_copy":
        return kwargs.get("device") not in (None, args[0].device)
    return name == "aten::copy_" and args[0].device != args[1].device
