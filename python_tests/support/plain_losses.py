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


def frozen(logits, at, labels, weight=1.0, mask=None, label_smoothing=0.0):
    """The loss of adamix() with the consistency's targets held where `at` is, as detach_target=True has it."""
    kept = labels != -100 if mask is None else mask
    (a, b), (p, q) = (x.log_softmax(-1).chunk(2) for x in (logits, at))
    rows = sum(
        F.kl_div(mine, target, reduction="none", log_target=True).sum(-1) / 2 for mine, target in ((a, q), (b, p))
    )
    entropy = adamix(logits, labels, mask=mask, label_smoothing=label_smoothing)[1]
    return entropy + weight * rows[kept].mean()


def checkable(loss, value):
    """For gradcheck: a function with the value of the one and the gradient of the other."""

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return value(*tensors)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                return torch.autograd.grad(loss(*leaves) * grad, leaves)

    return Both.apply
