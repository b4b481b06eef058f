"""LoRA written once more, token by token, and the cases routed_lora is compared on."""

import torch
from poison import poisoned_memory

from adamix_kernels.functional import routed_lora
from adamix_kernels.ops._dropout import keep_mask

INDEX_KINDS = ("none", "sample", "token")


def _index(kind, num_experts, batch, tokens, dtype, generator):
    if kind == "none":
        return None
    shape = (batch,) if kind == "sample" else (batch, tokens)
    return torch.randint(num_experts, shape, dtype=dtype, generator=generator)


def lora_case(
    a_kind="sample", b_kind="none", groups=1, with_base=True, batch=3, tokens=2, dtype=torch.float64,
    index_dtype=torch.int64, features=4, rank=2, per_group=3, seed=0,
):  # fmt: skip
    """x, lora_a, lora_b, a_index, b_index and the keyword arguments; the last expert is never used."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    experts_a, experts_b = (1 if kind == "none" else 4 for kind in (a_kind, b_kind))
    offsets = (0,) if groups == 1 else tuple(2 * g * per_group for g in range(groups))
    width = (2 * groups - 1) * per_group + (1 if groups > 1 else 0)
    args = (
        randn(batch, tokens, features),
        randn(experts_a, groups * rank, features),
        randn(experts_b, groups * per_group, rank),
        _index(a_kind, 3, batch, tokens, index_dtype, generator),
        _index(b_kind, 3, batch, tokens, index_dtype, generator),
    )
    base = randn(batch, tokens, width) if with_base else None
    return args, dict(base=base, scaling=1.7, groups=groups, output_offsets=offsets)


def _to(device, t):
    return t.detach().to(device) if isinstance(t, torch.Tensor) else t


def draw_lora(device, a_kind="sample", b_kind="none", groups=1, with_base=True, **sizes):
    """[x, A, B, base or None, dy] and the keyword arguments of the op, all on the device."""
    args, options = lora_case(a_kind, b_kind, groups, with_base, **sizes)
    base = options.pop("base")
    per_group = args[2].shape[1] // groups
    width = max(options["output_offsets"]) + per_group if base is None else base.shape[2]
    dy = torch.randn(*args[0].shape[:2], width, dtype=args[0].dtype)
    options |= dict(a_index=_to(device, args[3]), b_index=_to(device, args[4]))
    return [_to(device, t) for t in (*args[:3], base, dy)], options


def run_lora(backend, tensors, options, dropout_p=0.0, seed=11):
    """A function of the tensors that are not None, giving the output and every gradient; kernels get poison."""
    present = [t is not None for t in tensors]

    def run(*given):
        it = iter(given)
        *leaves, dy = [next(it) if there else None for there in present]
        leaves = [t if t is None else t.clone().requires_grad_() for t in leaves]
        with poisoned_memory(backend != "reference"):
            out = routed_lora(*leaves[:3], base=leaves[3], **options, dropout_p=dropout_p, seed=seed, backend=backend)
            return out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], dy)

    return run


def per_token_lora(
    x, lora_a, lora_b, a_index, b_index, *, base=None, scaling=1.0, groups=1, output_offsets=(0,), dropout_p=0.0,
    seed=None,
):  # fmt: skip
    """The definition, one token and one group at a time."""
    batch, tokens, features = x.shape
    rank, per_group = lora_b.shape[2], lora_b.shape[1] // groups
    width = max(output_offsets) + per_group if base is None else base.shape[2]
    if dropout_p:
        keep = keep_mask(torch.tensor(seed), batch * tokens, features, dropout_p).view(x.shape)
        x = x * keep / (1 - dropout_p)

    def pick(bank, index, b, s):
        return bank[0] if index is None else bank[index[b] if index.dim() == 1 else index[b, s]]

    rows = []
    for b in range(batch):
        for s in range(tokens):
            row = x.new_zeros(width) if base is None else base[b, s]
            a, up = pick(lora_a, a_index, b, s), pick(lora_b, b_index, b, s)
            for g, offset in enumerate(output_offsets):
                delta = up[g * per_group : (g + 1) * per_group] @ (a[g * rank : (g + 1) * rank] @ x[b, s])
                padded = [delta.new_zeros(offset), delta, delta.new_zeros(width - offset - per_group)]
                row = row + scaling * torch.cat(padded)
            rows.append(row)
    return torch.stack(rows).view(batch, tokens, width)


def leaves_of(args, options):
    return [t for t in (*args[:3], options["base"]) if t is not None]


def gradients(out, leaves, weight_seed=5):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(weight_seed), dtype=torch.float64)
    return torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)
