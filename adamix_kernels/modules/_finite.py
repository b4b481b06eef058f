"""ADAMIX_CHECK=1: an adapted layer whose output is not finite names itself, the expert and the cause."""

from __future__ import annotations

import torch
from torch import nn

from .._environment import checks_values


def checking() -> bool:
    """False under torch.compile, whose graph holds no such look at the values."""
    return not torch.compiler.is_compiling() and checks_values()


@torch.no_grad()
def check_output(
    layer: nn.Module,
    out: torch.Tensor,
    x: torch.Tensor,
    added: torch.Tensor | None,
    index: dict[str, torch.Tensor | None],
    merged: bool,
    gated: bool = False,
) -> None:
    """Nothing where `out` is finite.

    Args:
        layer: a RoutedAdapter or RoutedLoRALinear. out: what it gave, [B, S, N]. x: what it was given, [B, S, K].
        added: what the update was added to, where that is not x, [B, S, N].
        index: per side ("down" and "up", or "a" and "b") the experts drawn, [B'] or [B', S'] with the rows of x in the
            same order, or None for a bank of one. merged: the merged experts served. gated: all did, by their gates.

    Raises FloatingPointError, which names the layer, the first wrong element, its experts and the likely cause.
    """
    if out.isfinite().all():
        return
    sample, token, column = (~out.isfinite()).nonzero()[0].tolist()
    row = sample * out.shape[1] + token
    experts = {side: _expert_of(row, out.shape[0] * out.shape[1], drawn) for side, drawn in index.items()}
    together = "the experts by their gates" if gated else "the merged experts" if merged else ""
    chosen = together or " and ".join(f"expert {e} ({side})" for side, e in experts.items())
    cause = _cause(layer, x, added, (sample, token), None if together else experts)
    raise FloatingPointError(
        f"{layer.place or type(layer).__name__}: got {out[sample, token, column].item()} in sample {sample}, token "
        f"{token}, column {column}, from {chosen}, expected finite numbers: {cause}"
    )


def _expert_of(row: int, rows: int, index: torch.Tensor | None) -> int:
    return 0 if index is None else int(index.flatten()[row * index.numel() // rows].item())


def _cause(
    layer: nn.Module, x: torch.Tensor, added: torch.Tensor | None, at: tuple[int, int], experts: dict[str, int] | None
) -> str:
    for what, values in (("its input", x), ("its base layer's output", added)):
        if values is not None and not values[at].isfinite().all():
            return f"{what} has {_first_wrong(values[at])} there already"
    for name, bank in layer.named_parameters(recurse=False):
        if experts is not None and name.endswith("_score"):
            continue
        side = name.removeprefix("lora_").partition("_")[0]
        for number in range(bank.shape[0]) if experts is None else [experts[side]]:
            if not bank[number].isfinite().all():
                return f"{name} of expert {number} holds {_first_wrong(bank[number])}"
    return f"input and experts are finite, so {x.dtype} cannot hold a value in between"


def _first_wrong(values: torch.Tensor) -> float:
    values = values.flatten()
    return values[~values.isfinite()][0].item()
