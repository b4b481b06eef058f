"""Public functions of merging: documentation and argument checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..._backends import check_request
from .._checks import check_device, check_dims, check_flag, check_shape, check_tensor, fail
from .._groups import check_groups, check_scaling
from .autograd import merge_experts_op, merge_lora_op
from .op import banks_directly, lora_banks_directly, merge_banks_op, merge_loras_op


def merge_experts(
    bank: torch.Tensor, scores: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:  # fmt: skip
    """out = sum over m of softmax(scores)[m] * bank[m]; the uniform mean when scores is None.

    Args:
        bank: [M, ...], floating, M >= 1; one side's parameters, the experts on the first axis.
        scores: [M], floating of any dtype, or None.
        backend: "auto", "reference", "triton" or "cuda", which takes an M whose shares a GPU's shared memory holds,
            1,800 at least; "auto" takes the reference beyond.

    Returns:
        A new tensor, bank's shape without the first axis, bank's dtype. Accumulated in float32 (float64
        when an argument is float64) and rounded once. Differentiable once in both. Autocast changes nothing.

    Memory at the peak, in bytes beyond the arguments, for D elements of e bytes an expert; results included:
        triton, cuda: forward `e * D`, backward `e * M * D`
        reference, float32: forward `e * D`, backward `e * (M + 1) * D`
        reference, float32, scores: forward `e * D`, backward `e * M * D`

    Raises:
        TypeError, ValueError: an argument's type, dtype, device or shape is wrong; the message names it.
        BackendUnavailableError: an explicit backend cannot serve the call.

    Source: AdaMix (arXiv 2205.12410), section 3.3; `expert_score_weight` in the reference project's expert_soup.py.

    Example:
        >>> merge_experts(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([2., 3.])
    """
    _check_bank("bank", bank, "scores", scores)
    check_request(backend)
    return merge_experts_op(bank, scores, backend)


def merge_banks(
    banks: Sequence[torch.Tensor], scores: Sequence[torch.Tensor | None], *, backend: str = "auto"
) -> list[torch.Tensor]:
    """[merge_experts(bank, score) for each pair], one launch for all banks of a device and dtype on a GPU.

    For whole models, so internal and not differentiable. banks, scores: as many of the one as of the other,
    each as in `merge_experts`; shapes may differ. The results may share one allocation, never an element.

    Raises: as `merge_experts`; ValueError when there are not as many scores as banks.
    """
    banks, scores = list(banks), list(scores)
    check_request(backend)

    def check() -> None:
        if len(scores) != len(banks):
            fail("scores", f"{len(scores)} of them", f"one, or None, for each of the {len(banks)} banks")
        for n, (bank, score) in enumerate(zip(banks, scores, strict=True)):
            _check_bank(f"banks[{n}]", bank, f"scores[{n}]", score)

    merged = banks_directly(banks, scores, backend, check)
    if merged is None:
        check()
        with torch.no_grad():
            merged = merge_banks_op(banks, scores, backend)
    return merged


def merge_lora(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scaling: float,
    groups: int = 1,
    output_offsets: Sequence[int] = (0,),
    fan_in_fan_out: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """out[o_g : o_g+Ng] = weight[o_g : o_g+Ng] + scaling * B_g A_g for every group g, as a new tensor.

    Args:
        weight: [N, K], floating; [K, N] with fan_in_fan_out (Hugging Face's Conv1D). Never written.
        lora_a: [groups * r, K], or a bank [Ma, groups * r, K]. lora_b: [groups * Ng, r], or a bank
            [Mb, groups * Ng, r]; the dtype of lora_a, which may differ from weight's. A bank is first
            replaced by its uniform mean, A and B separately.
        scaling: alpha / r, a finite number.
        groups, output_offsets: the column ranges of the output the factors serve, as in routed_lora.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        weight's shape and dtype. Accumulated in float32 (float64 when an argument is float64) and rounded
        once; what no group touches keeps its bits. Differentiable once in weight, lora_a and lora_b.
        Autocast changes nothing.

    Memory at the peak, in bytes beyond the arguments, for e bytes an element and one group; results included:
        triton, float32: forward `e * (N*K + r * (N + K))`, backward `e * r * ((Ma + 1) * K + (Mb + 2) * N)`
        cuda, float32: forward `e * N * K`, backward `e * r * ((Ma + 1) * K + (Mb + 2) * N)`
        reference, float32: forward `e * (2 * N*K + r * (N + K))`, backward `e * r * ((Ma + 1) * K + (Mb + 2) * N)`

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong; the message names it.
        BackendUnavailableError: an explicit backend cannot serve the call.

    Source: AdaMix (arXiv 2205.12410), section 3.3; `MergedLinear.eval` of the reference project's NLG/loralib.

    Example:
        >>> weight, a, b = torch.zeros(2, 3), torch.ones(1, 3), torch.tensor([[1.0], [2.0]])
        >>> merge_lora(weight, a, b, scaling=0.5)
        tensor([[0.5000, 0.5000, 0.5000],
                [1.0000, 1.0000, 1.0000]])
    """
    layer = _checked(LoraLayer(weight, lora_a, lora_b, scaling, groups, output_offsets, fan_in_fan_out))
    check_request(backend)
    return merge_lora_op(*layer, backend)


class LoraLayer(NamedTuple):
    """What `merge_lora` takes of one layer."""

    weight: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    groups: int = 1
    output_offsets: Sequence[int] = (0,)
    fan_in_fan_out: bool = False


def merge_loras(layers: Sequence[LoraLayer], *, backend: str = "auto") -> list[torch.Tensor]:
    """[merge_lora(...) for each layer]; one launch for all that are alike but for where they lie, on a GPU.

    For whole models, so internal and not differentiable. The results of layers that are alike (shapes, dtypes, device,
    options) share one allocation, never an element.

    Raises: as `merge_lora`, the arguments named as in "layers[3].lora_a"; nothing is merged then.
    """
    check_request(backend)
    checked = [_checked(layer, f"layers[{n}].") for n, layer in enumerate(layers)]
    merged: list[torch.Tensor] = [torch.empty(0)] * len(checked)
    with torch.no_grad():
        for which in _alike(checked):
            tensors = ([getattr(checked[n], name) for n in which] for name in ("weight", "lora_a", "lora_b"))
            out = merge_loras_op(*tensors, *checked[which[0]][3:], backend)
            for n, one in zip(which, out.unbind(), strict=True):
                merged[n] = one
    return merged


Scores = tuple[torch.Tensor | None, torch.Tensor | None]


def merge_lora_banks(
    layers: Sequence[LoraLayer], scores: Sequence[Scores], *, backend: str = "auto"
) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """(merge_lora of each layer with its banks' means, those means (A, B) of each layer).

    A mean is merge_experts(bank, score), in the bank's dtype; of a bank of one expert it is that expert. Layers that
    are alike but for where they lie take one launch on a GPU for both where matrix units take their means, else the
    means of all are a launch, and merge_loras follows. The bits are the same.

    For whole models, so internal and not differentiable. scores: of A and of B for each layer, each as in
    `merge_experts`. The results may share one allocation, never an element.

    Raises: as `merge_loras`; ValueError when there are not as many scores as layers, "scores[3][0]" names one.
    """
    check_request(backend)
    scores = list(scores)
    checked = [_checked(layer, f"layers[{n}].") for n, layer in enumerate(layers)]
    if len(scores) != len(checked):
        fail("scores", f"{len(scores)} of them", f"those of A and of B for each of the {len(checked)} layers")
    for n, (layer, pair) in enumerate(zip(checked, scores, strict=True)):
        for side, (bank, score) in enumerate(zip((layer.lora_a, layer.lora_b), pair, strict=True)):
            _check_bank(f"layers[{n}]", bank, f"scores[{n}][{side}]", score)
    merged, means = [torch.empty(0)] * len(checked), [(layer.lora_a, layer.lora_b) for layer in checked]
    rest: list[int] = []
    with torch.no_grad():
        for which in _alike(checked, [[None if s is None else s.dtype for s in pair] for pair in scores]):
            sides = [[getattr(checked[n], name) for n in which] for name in ("weight", "lora_a", "lora_b")]
            of_scores = [[s for n in which if (s := scores[n][side]) is not None] for side in (0, 1)]
            made = None
            if max(bank.shape[0] for bank in (sides[1][0], sides[2][0])) > 1:
                made = lora_banks_directly(sides, of_scores, checked[which[0]][3:], backend)
            if made is None:
                rest += which
                continue
            for n, weight, a, b in zip(which, *made, strict=True):
                merged[n], means[n] = weight, (a, b)
        banks = [(n, side) for n in rest for side in (0, 1) if means[n][side].shape[0] > 1]
        found = merge_banks(
            [means[n][side] for n, side in banks], [scores[n][side] for n, side in banks], backend=backend
        )
        of = dict(zip(banks, found, strict=True))
        for n in rest:
            a, b = (of[n, side] if (n, side) in of else means[n][side][0] for side in (0, 1))
            means[n] = a, b
        layers = [checked[n]._replace(lora_a=means[n][0], lora_b=means[n][1]) for n in rest]
        for n, weight in zip(rest, merge_loras(layers, backend=backend), strict=True):
            merged[n] = weight
    return merged, means


def _alike(checked: Sequence[LoraLayer], more: Sequence[Any] = ()) -> list[list[int]]:
    """Which layers are alike but for where they lie, in `more` of each, too."""
    alike: dict[Any, list[int]] = {}
    for n, (weight, lora_a, lora_b, scaling, groups, offsets, fan) in enumerate(checked):
        shapes = weight.shape, lora_a.shape, lora_b.shape
        key = weight.device, weight.dtype, lora_a.dtype, shapes, scaling, groups, tuple(offsets), fan
        alike.setdefault((key, tuple(more[n]) if more else None), []).append(n)
    return list(alike.values())


def _checked(layer: LoraLayer, where: str = "") -> LoraLayer:
    """The same with banks for factors, a float and a list; `where`: what a message puts before a name."""
    weight, lora_a, lora_b, scaling, groups, output_offsets, fan_in_fan_out = layer
    names = f"{where}weight", f"{where}lora_a", f"{where}lora_b"
    check_tensor(names[0], weight)
    check_flag(f"{where}fan_in_fan_out", fan_in_fan_out)
    check_dims(names[0], weight, "[K, N]" if fan_in_fan_out else "[N, K]")
    rows, cols = (weight.shape[1], weight.shape[0]) if fan_in_fan_out else weight.shape
    lora_a = _as_bank(names[1], lora_a, weight, "[groups*r, K]")
    lora_b = _as_bank(names[2], lora_b, weight, "[groups*Ng, r]")
    if lora_b.dtype != lora_a.dtype:
        fail(names[2], lora_b.dtype, f"{lora_a.dtype}, the dtype of lora_a", TypeError)
    if lora_a.shape[2] != cols:
        fail(names[1], f"a last axis of {lora_a.shape[2]}", f"K = {cols}, weight's input features")
    try:
        check_scaling(scaling)
        offsets = check_groups(lora_a, lora_b, groups, output_offsets, rows)
    except (TypeError, ValueError) as error:
        raise (type(error)(f"{where}{error}") if where else error) from None
    return LoraLayer(weight, lora_a, lora_b, scaling, groups, offsets, fan_in_fan_out)


def _check_bank(name: str, bank: torch.Tensor, scores_name: str, scores: torch.Tensor | None) -> None:
    check_tensor(name, bank)
    if bank.dim() == 0 or bank.shape[0] == 0:
        fail(name, f"shape {tuple(bank.shape)}", "[M, ...] with at least one expert")
    if scores is not None:
        check_tensor(scores_name, scores)
        check_device(scores_name, scores, bank)
        check_shape(scores_name, scores, "[M]", bank.shape[0])


def _as_bank(name: str, factor: torch.Tensor, weight: torch.Tensor, layout: str) -> torch.Tensor:
    check_tensor(name, factor)
    check_device(name, factor, weight)
    if factor.dim() == 2:
        return factor.unsqueeze(0)
    if factor.dim() != 3 or factor.shape[0] == 0:
        fail(name, f"shape {tuple(factor.shape)}", f"{layout}, or a bank of at least one of them")
    return factor
