"""Gates: the weight of each expert for each token or sample, what is learned from them and what is kept of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..ops._checks import INDEX_DTYPES, check_device, check_tensor, fail

# Of the running means in training, as in batch normalisation.
_MOMENTUM = 0.01


class Gates(NamedTuple):
    """What a GateRouter gives: gates of K chosen experts, or dense gates of all.

    gates: [B, S, K] or [B, K] for the chosen, [B, S, M] or [B, M] where dense; float32 (float64 for float64).
    chosen: int64 expert ids of gates' shape, routed_lora's and routed_adapter's index; None where dense.
    """

    gates: torch.Tensor
    chosen: torch.Tensor | None


class _Losses:
    """Of a router's last training forward. A copy of the model starts without: a graph's tensors cannot be copied."""

    def __init__(self) -> None:
        self.balance: torch.Tensor | None = None
        self.z: torch.Tensor | None = None
        # Of tokens, for the running means, until the end of the forward.
        self.weights: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type[_Losses], tuple[()]]:
        return _Losses, ()


class GateRouter(nn.Module):
    """What every router of gates has: g = router(x), its losses and its running means.

    Args:
        num_experts: M, at least 2. balance, z: whether forward() in training leaves balance_loss() and z_loss() in
            `last`, for gate_losses(). device: of its tensors.

    Buffers, which checkpoints hold: mean_gates [M] and mean_square [], the running means over training batches of g
    and of |g|^2 over tokens that are no padding (momentum 0.01; plain means of the first 100 batches); batches [], how
    many.

    Raises ValueError for a number of experts below 2.

    A subclass implements gates(x, mask, tasks).
    """

    per_token = True  # False: one set of gates a sample
    backend = "auto"  # of its ops, if it has some; set by the layer that it serves
    mean_gates: torch.Tensor
    mean_square: torch.Tensor
    batches: torch.Tensor

    def __init__(
        self, num_experts: int, *, balance: bool = False, z: bool = False, device: torch.device | None = None
    ):  # fmt: skip
        super().__init__()
        if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 2:
            raise ValueError(f"num_experts: got {num_experts!r}, expected an int of at least 2: gates weigh several")
        self.num_experts, self.balance, self.z = num_experts, balance, z
        self.last = _Losses()
        for name, shape in (("mean_gates", (num_experts,)), ("mean_square", ()), ("batches", ())):
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=torch.float32))

    @property
    def width(self) -> int | None:
        """K, the features that it reads; None: any."""
        return None

    def gates(self, x: torch.Tensor, mask: torch.Tensor | None, tasks: torch.Tensor | None) -> Gates:
        raise NotImplementedError

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, tasks: torch.Tensor | None = None
    ) -> Gates:  # fmt: skip
        """The gates of x.

        Args:
            x: [B, S, K]. mask: [B, S], 0 or False where a token is padding; None: none is. tasks: int64 [B].

        Raises TypeError, ValueError: a type, dtype, device or width is wrong; the message names the argument.
        """
        self._begin(x, mask)
        found = self.gates(x, mask, tasks)
        self._end(found, mask)
        return found

    def _begin(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Before the gates of x: its checks; the last call's losses are gone."""
        check_tensor("x", x)
        if self.width is not None and (x.dim() < 1 or x.shape[-1] != self.width):
            fail("x", f"shape {tuple(x.shape)}", f"[..., K] with K = {self.width}, the router's features")
        _check_mask(mask, x)
        if not _recomputes():
            self.last.balance = self.last.z = self.last.weights = None

    def _end(self, found: Gates, mask: torch.Tensor | None) -> None:
        """Behind the gates: the running means."""
        if self.training and not _recomputes():
            self._note(found, mask)
            self.last.weights = None

    def _leave(self, logits: torch.Tensor, index: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        """Keeps the losses of these logits that are asked for. What recomputes makes them, too, and forgets them."""
        if not self.training or not (self.balance or self.z):
            return
        kept = _Losses() if _recomputes() else self.last
        wide = _wide(logits)
        weights = kept.weights = token_weights(wide, mask)
        if self.balance:
            used = None if index is None else torch.zeros_like(wide).scatter_(-1, index, 1.0)
            kept.balance = _balance(_softmax(logits), used, weights)
        if self.z:
            kept.z = _z(wide, weights)

    @torch.no_grad()
    def _note(self, found: Gates, mask: torch.Tensor | None) -> None:
        gates, chosen = found.gates.float(), found.chosen
        weights = token_weights(gates, mask) if self.last.weights is None else self.last.weights.float()
        dense = gates
        if chosen is not None:
            dense = gates.new_zeros(*gates.shape[:-1], self.num_experts).scatter_(-1, chosen, gates)
        self.batches += 1
        share = self.batches.reciprocal().clamp_min(_MOMENTUM)
        mean, square = (dense * weights).sum(tuple(range(gates.dim() - 1))), (gates.square() * weights).sum()
        # A model may have been cast as a whole.
        self.mean_gates.lerp_(mean.to(self.mean_gates.dtype), share)
        self.mean_square.lerp_(square.to(self.mean_square.dtype), share)


def balance_loss(
    probabilities: torch.Tensor, index: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """M sum_e f_e P_e: K where the K chosen experts (1 where all are used) serve alike, more where they do not.

    P_e is the mean over tokens of probabilities[..., e]; f_e the share of tokens that chose e, without a gradient; with
    dense gates f_e = P_e.

    Args:
        probabilities: [..., M], rows that sum to 1. index: [..., K], the chosen experts, or None: dense.
        mask: of the leading dimensions, 0 or False where a token does not count; None, or of another shape: all count.

    Returns a scalar, differentiable in probabilities.

    Raises TypeError, ValueError: an argument's type, dtype, device or shape is wrong; the message names it.

    Source: Switch Transformer (arXiv 2101.03961), equation 4, as MixLoRA and MoLA use it.

    Example:
        >>> from adamix_kernels.routing import balance_loss
        >>> balance_loss(torch.full((3, 4), 0.25)).item()
        1.0
    """
    check_tensor("probabilities", probabilities)
    _check_mask(mask, probabilities)
    if index is not None:
        _check_chosen(index, probabilities)
    used = None
    if index is not None:
        used = dense_gates(Gates(torch.ones_like(index, dtype=probabilities.dtype), index), probabilities.shape[-1])
    return _balance(probabilities, used, token_weights(probabilities, mask))


def _balance(probabilities: torch.Tensor, used: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
    """used: [..., M], 1 where a token chose the expert; None: dense."""
    over = tuple(range(probabilities.dim() - 1))
    mean = (probabilities * weights).sum(over)
    share = mean.detach() if used is None else (used * weights).sum(over)
    return probabilities.shape[-1] * (share * mean).sum()


def z_loss(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """mean over tokens of logsumexp(logits)^2: keeps a router's logits small.

    Args: logits [..., M]; mask as in balance_loss.

    Raises TypeError, ValueError: an argument's type, dtype or device is wrong; the message names it.

    Source: ST-MoE (arXiv 2202.08906), equation 5.

    Example:
        >>> from adamix_kernels.routing import z_loss
        >>> z_loss(torch.zeros(3, 1)).item()
        0.0
    """
    check_tensor("logits", logits)
    _check_mask(mask, logits)
    wide = _wide(logits)
    return _z(wide, token_weights(wide, mask))


def _z(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (logits.logsumexp(-1, keepdim=True).square() * weights).sum()


def dense_gates(found: Gates, num_experts: int) -> torch.Tensor:
    """[..., K] chosen gates as [..., M], zero where an expert was not chosen; dense ones as they are."""
    if found.chosen is None:
        return found.gates
    experts = torch.arange(num_experts, device=found.chosen.device)
    return ((found.chosen.unsqueeze(-1) == experts) * found.gates.unsqueeze(-1)).sum(-2)


def token_weights(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """1 / tokens for each token of values [..., M] that counts, 0 for padding: [..., 1], or [] where all count."""
    if mask is not None and mask.shape == values.shape[:-1]:
        counted = (mask != 0).to(values.dtype)
        return (counted / counted.sum().clamp_min(1)).unsqueeze(-1)
    return values.new_full((), 1 / max(1, values.shape[:-1].numel()))  # made on the device


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 for float64."""
    return logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def choose(scores: torch.Tensor, top_k: int | None) -> Gates:
    """softmax over the top_k scores [..., M] (the same as top_k of the softmax, divided by their sum), or over all."""
    if top_k is None or top_k == scores.shape[-1]:
        return Gates(_softmax(scores), None)
    best, index = scores.topk(top_k, dim=-1)
    return Gates(_softmax(best), index)


def check_top_k(top_k: int | None, num_experts: int) -> int | None:
    wrong = isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts
    if top_k is not None and wrong:
        raise ValueError(f"top_k: got {top_k!r}, expected None (all experts) or 1 <= top_k <= {num_experts}")
    return top_k


def _check_mask(mask: object, values: torch.Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        fail("mask", type(mask).__name__, "a torch.Tensor or None", TypeError)
    check_device("mask", mask, values)


def _check_chosen(index: object, probabilities: torch.Tensor) -> None:
    if not isinstance(index, torch.Tensor):
        fail("index", type(index).__name__, "a torch.Tensor or None", TypeError)
    if index.dtype not in INDEX_DTYPES:
        fail("index", index.dtype, "int32 or int64", TypeError)
    check_device("index", index, probabilities)
    if index.dim() != probabilities.dim() or index.shape[:-1] != probabilities.shape[:-1]:
        fail("index", f"shape {tuple(index.shape)}", f"{[*probabilities.shape[:-1], 'K']}, the chosen of each row")


def _recomputes() -> bool:
    """Whether this is activation checkpointing's second forward, inside a backward: its losses have been taken."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
