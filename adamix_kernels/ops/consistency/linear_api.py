"""Public linear_adamix_loss: documentation and argument checks."""

from __future__ import annotations

import torch

from ..._backends import check_request
from .._checks import autocast, check_dims, check_shape, check_tensor, fail
from .._passes import looked
from ._arguments import as_mask, as_num_items, check_doubled, check_labels, check_options
from .autograd import linear_adamix_loss_op
from .output import AdaMixLossOutput


def linear_adamix_loss(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mask: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    detach_target: bool = True,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> AdaMixLossOutput:
    """adamix_loss(hidden lm_head_weight^T + bias, labels), without ever holding all [2B, ..., V] logits.

    Pairs of rows (one row of each pass) are taken a chunk at a time; a chunk's logits, its loss and, where
    a gradient is needed, the gradients of hidden, lm_head_weight and bias are made together in the forward.

    Args:
        hidden: [2B, ..., D], floating: pass 1 of the whole batch, then pass 2. Nothing is shifted here: a
            causal model's caller passes hidden[:, :-1] and labels[:, 1:].
        lm_head_weight: [V, D], hidden's dtype, V >= 1. bias: [V], hidden's dtype, or None.
        labels: [B, ...], int32 or int64 classes. Regression has one logit and needs no chunks: `adamix_loss`.
        weight, ignore_index, label_smoothing, mask, num_items, detach_target, backend: as in `adamix_loss`.
            Rows outside the mask may hold NaN in hidden; no gradient sees them.
        chunk_rows: row pairs a chunk, >= 1. None: on a CPU as many as make 64 MiB of float32 logits, several tensors
            of which live at once; on a GPU as many as keep the products at their speed (at D = 768 and V = 50,257
            415, for a trained head 1,921), in at most 1/256 of its memory. The last bits of the gradients of
            lm_head_weight and bias, which are summed chunk by chunk, depend on it.

    Returns:
        AdaMixLossOutput as `adamix_loss`. The gradients of lm_head_weight and bias are summed in float32
        (float64 for float64 inputs) and rounded once at the end.

    Memory at the peak, in bytes beyond the arguments, for R rows a pass, C of them a chunk, with gradients of hidden
    and lm_head_weight, which are included; vectors are left out:
        triton, cuda, float32: forward `4 * (2 * C * V + V * D + 2 * (R + C) * D)`, backward `4 * (V + 2 * R) * D`
        reference, float32, P rows at once: forward `4 * (2 * C * V + 6 * P * V + V * D + 2 * (R + C) * D)`,
            backward `4 * (V + 2 * R) * D`
    P is at most C, on a CPU 2^17 // V rows (at least one) for each thread, on a GPU 2^26 // V.

    Under autocast hidden, lm_head_weight and bias (float64 excepted) are cast to the autocast dtype, as
    F.linear does; the losses are float32 all the same.

    Raises: as `adamix_loss`; with ADAMIX_CHECK=1 a loss that is not finite names hidden, lm_head_weight or bias.

    Source: AdaMix (arXiv 2205.12410), section 3.2, on the language-model head.

    Example:
        >>> hidden, head = torch.randn(4, 6, 8), torch.randn(100, 8)  # two passes of 2 x 6 tokens, 100 classes
        >>> labels = torch.randint(100, (2, 6))
        >>> out = linear_adamix_loss(hidden, head, labels)
        >>> torch.allclose(out.loss, adamix_loss(hidden @ head.mT, labels).loss)
        True
    """
    looked()
    check_tensor("hidden", hidden)
    hidden, lm_head_weight, bias = autocast(hidden, *_floating(lm_head_weight, bias))
    check_tensor("lm_head_weight", lm_head_weight, hidden)
    check_doubled("hidden", hidden, 2, "[2B, ..., D]")
    check_dims("lm_head_weight", lm_head_weight, "[V, D]")
    vocab = lm_head_weight.shape[0]
    check_shape("lm_head_weight", lm_head_weight, "[V, D]", vocab, hidden.shape[-1])
    if vocab < 1:
        fail("lm_head_weight", f"shape {tuple(lm_head_weight.shape)}", "[V, D] with V >= 1")
    if bias is not None:
        check_tensor("bias", bias, hidden)
        check_shape("bias", bias, "[V]", vocab)
    check_options(weight, ignore_index, label_smoothing, detach_target)
    check_labels(labels, hidden.shape[:-1], hidden)
    mask = as_mask(mask, labels.shape, hidden)
    num_items = as_num_items(num_items, hidden)
    if chunk_rows is None:
        chunk_rows = 0  # the op's word for its own rule
    elif not isinstance(chunk_rows, int) or isinstance(chunk_rows, bool) or chunk_rows < 1:
        fail("chunk_rows", repr(chunk_rows), "an int >= 1, or None")
    check_request(backend)
    needs = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, lm_head_weight, bias))
    tensors = hidden, lm_head_weight, bias, labels, mask, num_items
    options = weight, ignore_index, label_smoothing, bool(detach_target), chunk_rows
    return AdaMixLossOutput(*linear_adamix_loss_op(*tensors, *options, *needs, backend)[:3])


def _floating(lm_head_weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The head's tensors, checked before autocast would cast them."""
    check_tensor("lm_head_weight", lm_head_weight)
    if bias is not None:
        check_tensor("bias", bias)
    return lm_head_weight, bias
