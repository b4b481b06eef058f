"""The losses written once more with PyTorch's own functions: what the ops are compared with."""

import torch
import torch.nn.functional as F


def symmetric_kl(a, b, mask=None, detach_target=True, reduction="batchmean"):
    """1/2 [KL(b||a) + KL(a||b)], masked rows removed; in the logits' dtype."""
    if mask is not None:
        a, b = a[mask.bool()], b[mask.bool()]
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    log_p, log_q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    target_p, target_q = (log_p.detach(), log_q.detach()) if detach_target else (log_p, log_q)
    rows = sum(
        F.kl_div(mine, target, reduction="none", log_target=True).sum(-1) / 2
        for mine, target in ((log_p, target_q), (log_q, target_p))
    )
    if reduction == "none":
        return rows
    return rows.sum() / (len(rows) if reduction == "batchmean" else 1)


def adamix(
    logits, labels, weight=1.0, ignore_index=-100, label_smoothing=0.0, mask=None, num_items=None, detach_target=True
):
    """(loss, cross-entropy, consistency) with F.cross_entropy and F.kl_div."""
    a, b = logits.chunk(2)
    kept = labels != ignore_index if mask is None else mask.bool()
    counted = kept & (labels != ignore_index)
    flat = torch.where(counted, labels, -100).reshape(-1).long()
    entropy = F.cross_entropy(a.reshape(-1, a.shape[-1]), flat, reduction="sum", label_smoothing=label_smoothing)
    divergence = symmetric_kl(a, b, kept, detach_target, "sum")
    entropy = entropy / (counted.sum() if num_items is None else num_items)
    divergence = divergence / (kept.sum() if num_items is None else num_items)
    return entropy + weight * divergence, entropy, divergence
