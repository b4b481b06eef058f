"""Every public op once more in PyTorch's own operations: in the dtype under test the unit, in float64 the truth.

Where float64 itself cancels (GELU's tail, the divergence of nearly equal rows), `exact=True` takes the formula that
does not. Functions take and return tensors of one dtype; labels and indices are arguments of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    None: lambda z: z,
}


def adapter(x, down_weight, down_bias, up_weight, up_bias, down_index, up_index, residual, activation, exact):
    """residual + act(x Wd[i]^T + bd[i]) Wu[j]^T + bu[j]; x [B, S, H], index [B] or [B, S]."""
    i, j = _per_token(down_index, x), _per_token(up_index, x)
    pre = torch.einsum("bsh,bsrh->bsr", x, down_weight[i]) + down_bias[i]
    act = _gelu_by_erfc if exact and activation == "gelu" else ACTIVATIONS[activation]
    out = torch.einsum("bsr,bshr->bsh", act(pre), up_weight[j]) + up_bias[j]
    return out if residual is None else residual + out


def lora(x, lora_a, lora_b, base, a_index, b_index, scaling, groups, offsets, keep, dropout_p):
    """base[..., o_g : o_g+Ng] + scaling * (dropout(x) A[i]_g^T) B[j]_g^T; keep: bool like x, or None."""
    if keep is not None:
        x = torch.where(keep, x / (1 - dropout_p), 0)
    t = torch.einsum("bsk,bsrk->bsr", x, lora_a[_per_token(a_index, x)]).chunk(groups, 2)
    factors = lora_b[_per_token(b_index, x)].chunk(groups, 2)
    width = factors[0].shape[2]
    out = base.clone()
    for t_g, b_g, offset in zip(t, factors, offsets, strict=True):
        out[..., offset : offset + width] += scaling * torch.einsum("bsr,bsnr->bsn", t_g, b_g)
    return out


def gated_lora(x, lora_a, lora_b, base, gates, indices, scaling, groups, offsets, keep, dropout_p, mix):
    """`lora` with gates [B, slots] or [B, S, slots], indices alike or None; scaling: a number, or one an expert."""
    if keep is not None:
        x = torch.where(keep, x / (1 - dropout_p), 0)
    sizes = len(lora_a), len(lora_b)
    i, j = (_slots(index, experts, gates, x) for index, experts in zip(indices, sizes, strict=True))
    gates = gates.unsqueeze(1).expand(-1, x.shape[1], -1) if gates.dim() == 2 else gates
    own = scaling[i if sizes[1] == 1 else j].to(gates.dtype) if isinstance(scaling, torch.Tensor) else scaling
    t = torch.einsum("bsc,bskrc->bskr", x, lora_a[i]).chunk(groups, 3)
    out = base.clone()
    for t_g, b_g, offset in zip(t, lora_b[j].chunk(groups, 3), offsets, strict=True):
        up = gates * own
        if mix == "weights" and sizes != (1, 1):
            down = up if sizes[1] == 1 else gates
            z = (t_g * down.unsqueeze(-1)).sum(2, keepdim=True) if sizes[0] > 1 else t_g[:, :, :1]
            t_g, b_g, up = (z, b_g[:, :, :1], None) if sizes[1] == 1 else (z, b_g, up)
            if sizes[1] == 1 and b_g.shape[2] == 0:
                continue  # no slot
        h = (t_g if up is None else t_g * up.unsqueeze(-1)).to(x.dtype)
        out[..., offset : offset + b_g.shape[3]] += torch.einsum("bskr,bsknr->bsn", h, b_g)
    return out


def gated_adapter(x, down, down_bias, up, up_bias, gates, indices, residual, activation, exact, mix):
    """`adapter` with gates [B, slots] or [B, S, slots], indices alike or None."""
    sizes, act = (len(down), len(up)), _gelu_by_erfc if exact and activation == "gelu" else ACTIVATIONS[activation]
    i, j = (_slots(index, experts, gates, x) for index, experts in zip(indices, sizes, strict=True))
    gates = (gates.unsqueeze(1).expand(-1, x.shape[1], -1) if gates.dim() == 2 else gates).unsqueeze(-1)
    averaged = mix == "weights" and sizes != (1, 1)
    if averaged and sizes[0] == 1:
        i = i.new_zeros(*x.shape[:2], 1)
    if averaged and sizes[1] == 1:
        j = j.new_zeros(*x.shape[:2], 1)
    pre = torch.einsum("bsh,bskrh->bskr", x, down[i]) + down_bias[i]
    z = (pre * gates).sum(2, keepdim=True).to(x.dtype) if averaged and sizes[0] > 1 else pre
    h = act(z)
    weights = torch.ones_like(h[..., :1]) if averaged and sizes[1] == 1 else gates
    out = torch.einsum("bskr,bskor->bso", (h * weights).to(x.dtype), up[j]) + (weights * up_bias[j]).sum(2).to(x.dtype)
    return out if residual is None else residual + out


def mean_of_experts(bank, scores):
    if scores is None:
        return bank.mean(0)
    return (bank * scores.softmax(0).view(-1, *[1] * (bank.dim() - 1))).sum(0)


def merged_lora(weight, lora_a, lora_b, scaling, groups, offsets):
    """weight[o_g : o_g+Ng] + scaling * B_g A_g, of the banks' means."""
    a, b = lora_a.mean(0).chunk(groups), lora_b.mean(0).chunk(groups)
    out = weight.clone()
    for a_g, b_g, offset in zip(a, b, offsets, strict=True):
        out[offset : offset + len(b_g)] += scaling * (b_g @ a_g)
    return out


def symmetric_kl(a, b, detach_target, exact):
    """1/2 [KL(b||a) + KL(a||b)] a row, a and b [rows, V]."""
    log_p, log_q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    targets = (log_q.detach(), log_p.detach()) if detach_target else (log_q, log_p)
    rows = sum(
        F.kl_div(mine, target, reduction="none", log_target=True).sum(-1) / 2
        for mine, target in zip((log_p, log_q), targets, strict=True)
    )
    if not exact:
        return rows
    value = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).detach() / 2
    # The value that does not cancel, with the gradient of the definition.
    return value + (rows - rows.detach())


def losses(logits, labels, weight, label_smoothing, detach_target, exact):
    """(loss, cross-entropy, consistency) of logits [2B, V] and labels [B], -100 where there is none."""
    a, b = logits.chunk(2)
    entropy = F.cross_entropy(a, labels, label_smoothing=label_smoothing)
    divergence = symmetric_kl(a, b, detach_target, exact)[labels != -100].mean()
    return entropy + weight * divergence, entropy.detach(), divergence.detach()


def regression(predictions, targets, weight):
    """(loss, mean (a - y)^2, mean 1/2 (a - b)^2 with constant targets) of predictions [2B] and targets [B]."""
    a, b = predictions.chunk(2)
    error = (a - targets).square().mean()
    gap = ((a - b.detach()).square() + (b - a.detach()).square()).mean() / 4
    return error + weight * gap, error.detach(), gap.detach()


def _per_token(index, x):
    """Expert ids [B, S] from [B], [B, S] or None."""
    if index is None:
        return x.new_zeros(x.shape[:2], dtype=torch.int64)
    return index if index.dim() == 2 else index.unsqueeze(1).expand(x.shape[:2])


def _slots(index, experts, gates, x):
    """Expert ids [B, S, slots]: of the index, of all experts in turn, or of the only one."""
    if experts == 1:
        return x.new_zeros(*x.shape[:2], gates.shape[-1], dtype=torch.int64)
    if index is None:
        return torch.arange(experts).expand(*x.shape[:2], experts)
    index = index.long()
    return index if index.dim() == 3 else index.unsqueeze(1).expand(-1, x.shape[1], -1)


def _gelu_by_erfc(z):
    return 0.5 * z * torch.special.erfc(z * -(0.5**0.5))
