"""ADAMIX_CHECK=1: a loss that is not finite is an error that names its cause."""

from __future__ import annotations

import torch

from ..._environment import checks_values

checking = checks_values


def check_pair_loss(
    loss: torch.Tensor,
    passes: tuple[tuple[str, torch.Tensor], ...],
    selected: torch.Tensor | None,
    labels: torch.Tensor | None = None,
) -> None:
    """Nothing where ADAMIX_CHECK is not 1 or the loss is finite.

    passes: (argument, logits [..., V]) of pass 1 and of pass 2. selected: [...], the rows that count, or None for
    all. labels: [...], classes; those out of range have no cross-entropy.

    Raises FloatingPointError, which names argument, pass, row and class of the first wrong logit.
    """
    if not checking() or loss.isfinite().all():
        return
    for number, (name, logits) in enumerate(passes, 1):
        wrong = logits.isnan() | (logits == torch.inf) | (logits == -torch.inf).all(-1, keepdim=True)
        _report(name, number, logits, wrong, selected, "numbers, or -inf for some classes of a row")
    (first, a), (second, b) = passes
    closed = a == -torch.inf, b == -torch.inf
    wanted = "-inf in both passes or in neither, else the consistency is infinite"
    _report(first, 1, a, closed[0] & ~closed[1], selected, wanted)
    _report(second, 2, b, closed[1] & ~closed[0], selected, wanted)
    if labels is not None:
        classes = torch.arange(a.shape[-1], device=a.device)
        _report(first, 1, a, closed[0] & (classes == labels.unsqueeze(-1)), selected, "a finite logit of the label")
        _report(first, 1, a, closed[0], selected, "finite logits, since label_smoothing spreads over all classes")
    raise FloatingPointError(f"{first}: got finite values whose loss is {_value(loss)}, expected a finite loss")


def check_linear_loss(
    loss: torch.Tensor,
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    bias: torch.Tensor | None,
    selected: torch.Tensor | None,
) -> None:
    """As check_pair_loss; hidden [2B, ..., D], selected [B, ...] or None."""
    if not checking() or loss.isfinite().all():
        return
    half = hidden.shape[0] // 2
    for number, states in enumerate((hidden[:half], hidden[half:]), 1):
        _report("hidden", number, states, ~states.isfinite(), selected, "finite numbers")
    for name, values in (("lm_head_weight", lm_head_weight), ("bias", bias)):
        if values is None:
            continue
        wrong = ~values.isfinite()
        if name == "bias":
            wrong &= values != -torch.inf
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise FloatingPointError(f"{name}: got {values[at].item()} at {at}, expected finite numbers")
    raise FloatingPointError(
        f"hidden: got finite values whose loss is {_value(loss)}, expected logits that {hidden.dtype} can hold, "
        "and a label's class that bias leaves open"
    )


def check_scalar_loss(
    loss: torch.Tensor, predictions: torch.Tensor, labels: torch.Tensor, selected: torch.Tensor | None
) -> None:
    """As check_pair_loss, for regression; predictions [2B, ...], labels [B, ...]."""
    if not checking() or loss.isfinite().all():
        return
    half = labels.shape[0]
    for number, values in enumerate((predictions[:half], predictions[half:]), 1):
        values = values.unsqueeze(-1)
        _report("logits", number, values, ~values.isfinite(), selected, "finite numbers")
    values = labels.unsqueeze(-1)
    _report("labels", 1, values, ~values.isfinite(), selected, "finite numbers")
    raise FloatingPointError(f"logits: got finite values whose loss is {_value(loss)}, expected a finite loss")


def _report(
    name: str, number: int, values: torch.Tensor, wrong: torch.Tensor, selected: torch.Tensor | None, expected: str
) -> None:
    """Raises at the first element of `wrong` in a selected row; values, wrong: [..., V], selected: [...]."""
    if selected is not None:
        wrong = wrong & selected.unsqueeze(-1)
    if wrong.any():
        *row, column = wrong.nonzero()[0].tolist()
        place = (*row, column)
        got = values[place].item()
        raise FloatingPointError(
            f"{name}: got {got} in pass {number}, row {tuple(row)}, column {column}, expected {expected}"
        )


def _value(loss: torch.Tensor) -> float:
    return loss[~loss.isfinite()][0].item() if loss.dim() else loss.item()
