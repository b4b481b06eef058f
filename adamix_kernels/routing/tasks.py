"""Gates by task: Polytropon's table, and its many heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops._checks import INDEX_DTYPES, check_positive, fail
from .gates import GateRouter, Gates

_EPS = 1e-12


class TaskRouter(GateRouter):
    """g = s / sum s, s = sigmoid(Z[task]); in training s is drawn: sigmoid(Z[task] + log u - log(1 - u)), u uniform.

    Args:
        num_tasks: rows of the table. num_experts: M (skills). splits: heads of Polytropon's MHR variant, each with its
            own gates, in which case the gates are [B, splits * M], for banks of spread_heads(). dtype: of the table.
        balance, z: have no meaning here. device: see GateRouter.

    Parameters: logits [num_tasks, splits * M], drawn from U(-0.001, 0.001).

    Shapes: tasks int64 [B] -> gates [B, splits * M]; a batch of k * B rows takes each task k times: pass after pass in
    training, beside each other (beams) in evaluation.

    Raises:
        ValueError: sizes below 1; at the call, no tasks, or of another number. TypeError: tasks are no integers.
        IndexError: a task outside the table (on a GPU, as torch reports it).

    Source: Polytropon and MHR (arXiv 2202.13914, 2211.03831), mixed as weights (mix="weights").

    Example:
        >>> from adamix_kernels.routing import TaskRouter
        >>> TaskRouter(3, 4).eval()(torch.randn(2, 5, 8), tasks=torch.tensor([0, 2])).gates.shape
        torch.Size([2, 4])
    """

    per_token = False

    def __init__(
        self, num_tasks: int, num_experts: int, splits: int = 1, *, dtype: torch.dtype | None = None, **more: Any
    ):  # fmt: skip
        check_positive(num_tasks=num_tasks, splits=splits)
        super().__init__(num_experts, **more)
        self.num_tasks, self.splits = num_tasks, splits
        if splits > 1:
            self.mean_gates = self.mean_gates.new_zeros(splits * num_experts)
        shape = (num_tasks, splits * num_experts)
        self.logits = nn.Parameter(torch.empty(shape, dtype=dtype, device=self.mean_gates.device))
        nn.init.uniform_(self.logits, -1e-3, 1e-3)

    def gates(self, x: torch.Tensor, mask: torch.Tensor | None, tasks: torch.Tensor | None) -> Gates:
        batch = x.shape[0]
        if tasks is None:
            raise ValueError("tasks: got None, expected a task id [B] a sample: task_ids in the batch, or use_tasks")
        if not isinstance(tasks, torch.Tensor):
            fail("tasks", type(tasks).__name__, "a torch.Tensor", TypeError)
        if tasks.dtype not in INDEX_DTYPES:
            fail("tasks", tasks.dtype, "int32 or int64", TypeError)
        if tasks.dim() != 1 or not tasks.shape[0] or batch % tasks.shape[0]:
            raise ValueError(f"tasks: got shape {tuple(tasks.shape)} for a batch of {batch}, expected [{batch}]")
        table = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
        copies, tasks = batch // tasks.shape[0], tasks.to(table.device)
        tasks = tasks.repeat(copies) if self.training else tasks.repeat_interleave(copies, output_size=batch)
        rows = table[tasks].view(batch, self.splits, -1)
        if self.training:
            uniform = torch.rand_like(rows).clamp(torch.finfo(rows.dtype).tiny, 1 - torch.finfo(rows.dtype).eps)
            rows = rows + uniform.log() - (-uniform).log1p()
        chosen = rows.sigmoid()
        return Gates((chosen / (chosen.sum(-1, keepdim=True) + _EPS)).flatten(1), None)

    def _note(self, found: Gates, mask: torch.Tensor | None) -> None:
        super()._note(found, None)


def spread_heads(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Banks of MHR's blocks as banks of whole experts, zero outside their block, for mix="weights".

    Head s reads the s-th block of x and writes the s-th block of the output, with gates of its own:
    y_s = (sum_e g[s, e] B[s, e]) sum_t sum_f g[t, f] A[t, f] x_t.

    Args: lora_a [splits, M, r, K / splits]. lora_b [splits, M, N / splits, r].

    Returns ([splits * M, r, K], [splits * M, N, r]): the same result with gates [B, splits * M].

    Source: Multi-Head Routing (arXiv 2211.03831).

    Example:
        >>> from adamix_kernels.routing import spread_heads
        >>> [bank.shape for bank in spread_heads(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 5, 1))]
        [torch.Size([6, 1, 8]), torch.Size([6, 10, 1])]
    """
    splits, experts, rank, columns = lora_a.shape
    rows = lora_b.shape[2]
    eye = torch.eye(splits, dtype=lora_a.dtype, device=lora_a.device)
    wide = lora_a.unsqueeze(3) * eye[:, None, None, :, None]  # [splits, M, r, splits, K / splits]
    tall = lora_b.unsqueeze(2) * eye[:, None, :, None, None]  # [splits, M, splits, N / splits, r]
    a = wide.reshape(splits * experts, rank, splits * columns)
    return a, tall.reshape(splits * experts, splits * rows, rank)
