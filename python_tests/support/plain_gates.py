"""Gated LoRA and adapters written once more, token by token and slot by slot, and the cases they are compared on."""

import torch
import torch.nn.functional as F

from adamix_kernels.ops._dropout import keep_mask

# What gates may be: dense or chosen, by sample or by token.
FORMS = ("dense, sample", "dense, token", "chosen, sample", "chosen, token")
# Experts of the first and the second side.
BANKS = ((4, 4), (1, 4), (4, 1), (1, 1))
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    None: lambda z: z,
}


class Drawn:
    """Numbers of a seed, all requiring grad, in a dtype, on a device."""

    def __init__(self, seed=0, dtype=torch.float64, device="cpu"):
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(seed), dtype, device

    def randn(self, *shape, dtype=None, scale=1.0):
        made = scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return made.to(self.device, dtype or self.dtype).requires_grad_()

    def choice(self, form, banks, slots, batch, tokens, index_dtype=torch.int64, gates_dtype=None, used=0):
        """(gates, first index, second index) of a form; used: how many experts of a bank are chosen from, 0 for all."""
        lead = (batch,) if "sample" in form else (batch, tokens)
        if form.startswith("dense"):
            return self.randn(*lead, max(banks), dtype=gates_dtype), None, None
        indices = [
            None if experts == 1 else torch.randint(used or experts, (*lead, slots), generator=self.generator)
            for experts in banks
        ]
        if banks == (1, 1):
            indices[1] = torch.zeros(*lead, slots, dtype=torch.int64)
        moved = (i if i is None else i.to(self.device, index_dtype) for i in indices)
        return self.randn(*lead, slots, dtype=gates_dtype), *moved


def gated_lora_case(
    form="dense, token", banks=(4, 4), slots=2, mix="outputs", groups=1, with_base=True, scales=False, batch=3,
    tokens=2, features=4, rank=2, per_group=3, seed=0, **how,
):  # fmt: skip
    """Positional and keyword arguments of routed_lora."""
    kinds = {k: how.pop(k) for k in ("index_dtype", "gates_dtype", "used") if k in how}
    d = Drawn(seed, **how)
    x = d.randn(batch, tokens, features)
    a = d.randn(banks[0], groups * rank, features)
    b = d.randn(banks[1], groups * per_group, rank)
    gates, i, j = d.choice(form, banks, slots, batch, tokens, **kinds)
    offsets = tuple(2 * g * per_group for g in range(groups))
    width = (2 * groups - 1) * per_group + (1 if groups > 1 else 0)
    scaling = torch.linspace(0.5, 2, max(banks) if banks[1] > 1 else banks[0], device=d.device) if scales else 1.7
    base = d.randn(batch, tokens, width) if with_base else None
    options = dict(gates=gates, mix=mix, base=base, scaling=scaling, groups=groups, output_offsets=offsets)
    return (x, a, b, i, j), options


def gated_adapter_case(
    form="dense, token", banks=(4, 4), slots=2, mix="outputs", biases=True, residual="other", activation="gelu",
    batch=3, tokens=2, features=4, rank=2, out=4, seed=0, **how,
):  # fmt: skip
    """Positional and keyword arguments of routed_adapter."""
    kinds = {k: how.pop(k) for k in ("index_dtype", "gates_dtype", "used") if k in how}
    d = Drawn(seed, **how)
    x = d.randn(batch, tokens, features)
    down, up = d.randn(banks[0], rank, features), d.randn(banks[1], out, rank)
    down_bias, up_bias = (d.randn(banks[0], rank), d.randn(banks[1], out)) if biases else (None, None)
    gates, i, j = d.choice(form, banks, slots, batch, tokens, **kinds)
    added = {"none": None, "input": x, "other": d.randn(batch, tokens, out) if residual == "other" else None}[residual]
    args = x, down, down_bias, up, up_bias, i, j
    return args, dict(gates=gates, mix=mix, residual=added, activation=activation)


def by_slot_lora(
    x, lora_a, lora_b, a_index, b_index, *, gates, mix="outputs", base=None, scaling=1.0, groups=1,
    output_offsets=(0,), dropout_p=0.0, seed=None,
):  # fmt: skip
    """The definition, one token, group and slot at a time."""
    batch, tokens, features = x.shape
    rank, per_group = lora_b.shape[2], lora_b.shape[1] // groups
    width = max(output_offsets) + per_group if base is None else base.shape[2]
    if dropout_p:
        keep = keep_mask(torch.tensor(seed), batch * tokens, features, dropout_p).view(x.shape)
        x = x * keep / (1 - dropout_p)
    sizes = len(lora_a), len(lora_b)
    rows = []
    for n, s in ((n, s) for n in range(batch) for s in range(tokens)):
        weights, (firsts, seconds) = _slots(gates, (a_index, b_index), sizes, n, s)
        own = [_scale(scaling, f if sizes[1] == 1 else e) for f, e in zip(firsts, seconds, strict=True)]
        row = x.new_zeros(width) if base is None else base[n, s]
        for g, offset in enumerate(output_offsets):
            a, b = lora_a[:, g * rank : (g + 1) * rank], lora_b[:, g * per_group : (g + 1) * per_group]
            delta = x.new_zeros(per_group)
            if mix == "outputs" or sizes == (1, 1):
                for weight, scale, f, e in zip(weights, own, firsts, seconds, strict=True):
                    delta = delta + weight * scale * (b[e] @ (a[f] @ x[n, s]))
            elif sizes[1] == 1:
                mean = sum((w * c * a[f] for w, c, f in zip(weights, own, firsts, strict=True)), torch.zeros_like(a[0]))
                delta = b[0] @ (mean @ x[n, s])
            else:
                mean = a[0]
                if sizes[0] > 1:
                    mean = sum((w * a[f] for w, f in zip(weights, firsts, strict=True)), torch.zeros_like(a[0]))
                up = sum((w * c * b[e] for w, c, e in zip(weights, own, seconds, strict=True)), torch.zeros_like(b[0]))
                delta = up @ (mean @ x[n, s])
            row = row + torch.cat([x.new_zeros(offset), delta, x.new_zeros(width - offset - per_group)])
        rows.append(row)
    return torch.stack(rows).view(batch, tokens, width) if rows else x.new_zeros(batch, tokens, width)


def by_slot_adapter(
    x, down, down_bias, up, up_bias, down_index, up_index, *, gates, mix="outputs", residual=None, activation="gelu"
):
    """The definition, one token and slot at a time."""
    act, sizes = ACTIVATIONS[activation], (len(down), len(up))
    down_bias = x.new_zeros(down.shape[:2]) if down_bias is None else down_bias
    up_bias = x.new_zeros(up.shape[:2]) if up_bias is None else up_bias
    rows = []
    for n, s in ((n, s) for n in range(x.shape[0]) for s in range(x.shape[1])):
        weights, (firsts, seconds) = _slots(gates, (down_index, up_index), sizes, n, s)
        row = x.new_zeros(up.shape[1]) if residual is None else residual[n, s]
        if mix == "outputs" or sizes == (1, 1):
            for w, f, e in zip(weights, firsts, seconds, strict=True):
                row = row + w * (up[e] @ act(down[f] @ x[n, s] + down_bias[f]) + up_bias[e])
        else:
            pairs = [(w, f) for w, f in zip(weights, firsts, strict=True)] if sizes[0] > 1 else [(1, 0)]
            h = act(sum((w * (down[f] @ x[n, s] + down_bias[f]) for w, f in pairs), x.new_zeros(down.shape[1])))
            for w, e in zip(weights, seconds, strict=True) if sizes[1] > 1 else [(1, 0)]:
                row = row + w * (up[e] @ h + up_bias[e])
        rows.append(row)
    return torch.stack(rows).view(*x.shape[:2], up.shape[1])


def _slots(gates, indices, sizes, n, s):
    """What one token's slots weigh, and their experts of both sides."""
    weights = gates[n] if gates.dim() == 2 else gates[n, s]
    ids = []
    for index, experts in zip(indices, sizes, strict=True):
        if experts == 1:
            ids.append([0] * len(weights))
        elif index is None:
            ids.append(list(range(experts)))
        else:
            ids.append((index[n] if index.dim() == 2 else index[n, s]).tolist())
    return weights, ids


def _scale(scaling, expert):
    return scaling[expert].item() if isinstance(scaling, torch.Tensor) else scaling


def leaves_of(args, options):
    """Every floating tensor that is differentiated by, each once."""
    given = [*args, options["gates"], options.get("base"), options.get("residual")]
    found = {id(t): t for t in given if t is not None and t.is_floating_point()}
    return list(found.values())


def gradients(out, leaves, seed=5):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((out * weight.to(out)).sum(), leaves, allow_unused=True, materialize_grads=True)


def run(function, args, options, backend, seed=5):
    """(out, every gradient) of routed_lora or routed_adapter."""
    out = function(*args, **options, backend=backend)
    return [out.detach(), *gradients(out, leaves_of(args, options), seed)]
