"""The cases that every backend of routed_adapter is compared on."""

import torch
from poison import poisoned_memory
from test_routed_adapter import index, inputs

from adamix_kernels.functional import routed_adapter

# (batch, tokens, hidden, r, Md, Mu, down's index, up's index[, out[, bias]])
SIDES = {
    "shared-up": (4, 17, 37, 5, 3, 1, "sample", None),
    "shared-down": (3, 16, 37, 8, 1, 3, None, "sample"),
    "both-routed": (4, 18, 20, 4, 3, 2, "sample", "sample"),
    "per-token": (2, 19, 20, 6, 3, 2, "token", "token"),
    "mixed": (3, 20, 23, 7, 3, 2, "token", "sample"),
    "plain": (2, 21, 20, 4, 1, 1, None, None),
    "no-bias": (3, 17, 20, 4, 3, 1, "sample", None, None, False),
    "other-width": (2, 18, 19, 16, 2, 2, "sample", "token", 41),
    "few-tokens": (7, 3, 20, 5, 3, 2, "sample", "token"),
}


def draw_adapter(device, dtype, batch, tokens, hidden, r, down, up, down_kind, up_kind, out=None, bias=True):
    """(x, banks..., dy) on the device and both indices."""
    x, *banks = (t if t is None else t.detach() for t in inputs(batch, tokens, hidden, r, down, up, out, bias, dtype))
    dy = torch.randn(batch, tokens, banks[2].shape[1], dtype=dtype)
    tensors = [t if t is None else t.to(device) for t in (x, *banks, dy)]
    indices = [index(kind, m, batch, tokens) for kind, m in ((down_kind, down), (up_kind, up))]
    return tensors, [t if t is None else t.to(device) for t in indices]


def run_adapter(backend, tensors, indices, residual="input", activation="gelu"):
    """A function of the tensors that are not None, giving the output and every gradient; kernels get poison."""
    present = [t is not None for t in tensors]

    def run(*given):
        it = iter(given)
        full = [next(it).clone() if there else None for there in present]
        *leaves, dy = full
        leaves = [t if t is None else t.requires_grad_() for t in leaves]
        other = dy.flip(0).clone().requires_grad_() if residual == "other" else None
        added = {"none": None, "input": leaves[0], "other": other}[residual]
        with poisoned_memory(backend != "reference"):
            out = routed_adapter(*leaves, *indices, residual=added, activation=activation, backend=backend)
            wanted = [t for t in (*leaves, other) if t is not None]
            return out.detach(), *torch.autograd.grad(out, wanted, dy)

    return run
