"""The cases that every backend of routed_adapter is compared on, and the loop that they are held against."""

import itertools

import torch
import torch.nn.functional as F
from poison import poisoned_memory

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

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    None: lambda z: z,
}


def by_loop(x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual=None, activation="gelu"):
    """Every token by itself, in plain indexing."""
    batch, tokens, _ = x.shape
    rows = []
    for b, s in itertools.product(range(batch), range(tokens)):
        i, j = (0 if t is None else int(t[b] if t.dim() == 1 else t[b, s]) for t in (down_index, up_index))
        h = down_weight[i] @ x[b, s] + (0 if down_bias is None else down_bias[i])
        y = up_weight[j] @ ACTIVATIONS[activation](h) + (0 if up_bias is None else up_bias[j])
        rows.append(y if residual is None else y + residual[b, s])
    if not rows:
        return x.sum() * x.new_zeros(batch, tokens, up_weight.shape[1])
    return torch.stack(rows).view(batch, tokens, -1)


def inputs(batch=4, tokens=3, hidden=5, r=2, down=3, up=1, out=None, bias=True, dtype=torch.double, requires_grad=True):
    out = out or hidden
    make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)  # noqa: E731
    banks = [make(down, r, hidden), make(down, r) if bias else None, make(up, out, r), make(up, out) if bias else None]
    return make(batch, tokens, hidden), *banks


def index(kind, experts, batch=4, tokens=3, dtype=torch.long):
    if kind is None:
        return None
    shape = (batch,) if kind == "sample" else (batch, tokens)
    return torch.randint(experts, shape, dtype=dtype)


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
