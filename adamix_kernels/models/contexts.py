"""Temporary changes of how an adapted model routes: disable, use_experts, eval_routing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn

from ..modules import AdaptedLayer, RoutedLoRALinear
from ..routing import check_level
from .gating import routed_layers
from .merging import check_experts, merge, unmerge
from .state import adamix_state, check_no_pack, device_of


@contextlib.contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes what its base computes (its trained head stays).

    A LoRA model whose weights are merged is unmerged on entry and merged again on exit.

    Raises ValueError: `model` is not adapted, or is a LoRA model whose update is in its weights for good: it was
        loaded merged, or merged with keep=False.

    Example:
        >>> base = model.eval()(**batch).logits
        >>> with disable(adapt(model)):
        ...     print(torch.equal(model(**batch).logits, base))
        True
    """
    state = adamix_state(model)
    in_weights = any(not isinstance(model.get_submodule(p), (AdaptedLayer, RoutedLoRALinear)) for p in state.paths)
    remerge = state.merged and in_weights
    spread = state.gate_spread
    if remerge:
        check_experts(model, "disable")
        unmerge(model)
    previous, state.router.enabled = state.router.enabled, False
    try:
        yield model
    finally:
        state.router.enabled = previous
        if remerge:
            merge(model, gates="mean" if spread else None)


@contextlib.contextmanager
def use_experts(
    model: nn.Module,
    index: int | str | Sequence[int] | Sequence[str] | torch.Tensor,
    *,
    threshold: float | str | None = None,
) -> Iterator[nn.Module]:
    """Within the context the caller says which expert serves which sample, on every layer and side.

    Args:
        index: an expert id for all, or ids [B] per sample or [B, S] per token (int32 or int64). A batch of k * B
            rows takes each id k times: whole passes in training, k beams or returned sequences per sample in
            generate(), where ids are per sample.
            Of a pack: a name for all, or names, one a sample (no fewer in a classifier); "nearest" (each sample's
            name by its text, see nearest()); or "arrow" (each token's LoRA of each layer by its input: argmax_e |x .
            v_e|, v_e the leading right singular vector of B_e A_e).
        threshold: with "nearest", the least cosine, or "auto"; a sample below it ends the forward with ValueError.

    A pack serves one thread at a time: the context waits until no other thread is in one.

    Raises:
        ValueError, TypeError: `model` is not adapted or is merged, or an id is no expert of it, a name none of the
            pack. At a forward, ValueError: `index` does not fit the batch.

    Source of "arrow": Ostapenko et al., arXiv 2405.11157.

    Example:
        >>> adapt(model).eval()  # doctest: +ELLIPSIS
        Bert...
        >>> with use_experts(model, [0, 2]):  # expert 0 for the first sample, 2 for the second
        ...     model(**batch).logits.shape
        torch.Size([2, 2])
    """
    state = adamix_state(model)
    if state.pack is not None:
        if not isinstance(index, str) and not (
            isinstance(index, Sequence) and all(isinstance(name, str) for name in index)
        ):
            raise TypeError(f"index: got {index!r} for a pack, expected a name, or names, one a sample")
        with state.pack.use(model, cast("str | Sequence[str]", index), threshold):
            yield model
        return
    if threshold is not None:
        raise ValueError(f'threshold: got {threshold!r}, expected it for a pack and "nearest" alone')
    if state.merged:
        raise ValueError("model: got a merged model, expected one that still has its experts")
    if isinstance(index, str) or (isinstance(index, Sequence) and any(isinstance(name, str) for name in index)):
        raise TypeError(f"index: got {index!r} for a model that is no pack, expected expert ids [], [B] or [B, S]")
    try:
        index = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"index: got {index!r}, expected expert ids [], [B] or [B, S] ({error})") from error
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index: got {index.dtype}, expected int32 or int64")
    if index.dim() > 2:
        raise ValueError(f"index: got shape {tuple(index.shape)}, expected [], [B] or [B, S]")
    experts = min(part.num_experts for part in routed_layers(model).values())
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < experts:
        raise ValueError(f"index: got ids from {int(index.min())} to {int(index.max())}, expected 0 <= id < {experts}")
    # Moved once here: each layer's own copy from the host would wait for the device.
    previous, state.router.experts = state.router.experts, index.to(device_of(model), torch.int64)
    try:
        yield model
    finally:
        state.router.experts = previous


@contextlib.contextmanager
def eval_routing(model: nn.Module, level: str) -> Iterator[nn.Module]:
    """Within the context evaluation routes at `level`: "merged", or at random per "batch", "sample" or "token".

    Random per token and per sample are the reference project's inference levels 0 and 1, merged is 3.

    Raises ValueError: `model` is not adapted, or `level` is none of these.

    Example:
        >>> adapt(model).eval()  # doctest: +ELLIPSIS
        Bert...
        >>> with eval_routing(model, "sample"):  # experts drawn at random, as in training
        ...     model(**batch).logits.shape
        torch.Size([2, 2])
    """
    check_level("level", level, "merged")
    check_no_pack(model, "route at random in")
    router = adamix_state(model).router
    previous, router.eval_level = router.eval_level, level
    try:
        yield model
    finally:
        router.eval_level = previous
