"""Who draws the routing indices, and when.

Indices are drawn on the device, inside the layer's forward, from the global random generator: then
activation checkpointing, which restores that generator, redraws the same experts when it recomputes.
An index kept on a shared object, or a private generator, would give other experts in silence. On a GPU, within one
forward of an adapted model, all its layers' indices are drawn in one launch by the first that asks; layers that may be
recomputed (`_is_recomputed`) draw their own.

The threads of a process share that generator: two that train at once draw valid experts, but which ones depends on who
comes first (use_experts fixes them). For reproducible runs, or activation checkpointing, train one model per process.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from ..ops._checks import check_positive
from ..ops._node import ROUTERS
from .forwards import Told, node_of_backward
from .notes import Notes
from .samples import Samples

Ahead = dict[tuple[int, tuple[int, ...], torch.device], list[torch.Tensor]]
LEVELS = ("batch", "sample", "token")
LEARNED = "learned"
# Of those that saved tensors go through; torch 2.6 does not tell.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_DISTRIBUTED = dist.is_available()


class Router:
    """Uniform draws for the layers that share this object: i ~ U{0, ..., M-1}, each side and place on its own.

    Args:
        level: granularity of a training draw. "batch": one expert per pass; "sample": per sample; "token": per token.
            "learned": nothing is drawn, gates weigh the experts.
        passes: how many passes ride in one training batch (its first B/passes samples are pass 1). A batch
            that passes does not divide holds one pass.

    Attributes:
        eval_level: "merged" (default), or a level to route at random in evaluation (the reference project's
            inference levels 0 "token" and 1 "sample").
        experts: the caller's choice (see use_experts), an index [B] or [B, S], or None.
        enabled: False while the adaptation is switched off (see disable).
        force_merged: True while generate() runs on a model in training mode.
        attention_mask, decoder_mask: of the forward that is under way, [B, S], for the gates' means over tokens.
        samples: B of it, or of one that a backward recomputes, for layers whose rows are several a sample.
        tasks: the caller's task ids [B] (see use_tasks).
        rank: shifts the draw, so that ranks that share a seed draw different experts; None means the
            process's rank in torch.distributed. Ranks that hold the same samples (tensor parallel) need one value.

    Source: AdaMix section 3.1, `MixtureSoup.forward` of the reference project.

    Example:
        >>> router = Router("sample")
        >>> RoutedAdapter(8, 2, num_experts=4, router=router)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    # Of a model: how many banks there are of each number of experts. What was drawn and not yet asked for, within one
    # of its forwards.
    sides: Mapping[int, int] = MappingProxyType({})
    _ahead: Ahead | None = None
    # None: nothing was noted, or an earlier version pickled this.
    notes: Notes[Told] | None = None

    def __init__(self, level: str = "batch", passes: int = 2):
        check_level("level", level, LEARNED)
        check_positive(passes=passes)
        self.level = level
        self.passes = passes
        self.eval_level = "merged"
        self.experts: torch.Tensor | None = None
        self.enabled = True
        self.force_merged = False
        self.rank: int | None = None
        self.attention_mask: torch.Tensor | None = None
        self.decoder_mask: torch.Tensor | None = None
        self.tasks: torch.Tensor | None = None
        self.samples = Samples()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of any release."""
        self.__dict__.update({"samples": Samples(), **state})

    def note(
        self, begins: bool = True, masks: tuple[torch.Tensor | None, torch.Tensor | None] | None = None
    ) -> None:  # fmt: skip
        """A forward with these masks and tasks begins, which a backward may recompute. begins=False: none does yet.

        masks: attention_mask and decoder_mask, which another thread may set meanwhile.
        """
        if torch.compiler.is_compiling():
            return
        notes: Notes[Told] = self.notes or self.__dict__.setdefault("notes", Notes())
        notes.begin(Told(*(masks or (self.attention_mask, self.decoder_mask)), self.tasks), begins)

    def told(self) -> Told:
        """Masks and tasks of the forward that is under way in this thread, or that a backward recomputes."""
        found = None
        if not torch.compiler.is_compiling() and self.notes is not None:
            if _is_recomputed():
                self.notes.keep()
            found = self.notes.recomputed() or self.notes.here()
        return found or Told(self.attention_mask, self.decoder_mask, self.tasks)

    def uses_gates(self, training: bool) -> bool:
        """Whether a layer with gates computes with them, and not with the caller's experts, or some at random."""
        return self.experts is None and (training or self.eval_level == "merged")

    def uses_merged(self, training: bool, learning: bool) -> bool:
        """Whether a layer computes with its merged experts. learning: its merge scores are being trained."""
        if self.experts is not None:
            return False
        if training:
            return learning or self.force_merged
        return self.eval_level == "merged"

    def passes_in(self, batch: int, training: bool) -> int:
        """How many runs of whole samples share one draw each at batch level; 0 when draws are finer than that.

        A layer then takes [B, S, H] for [passes, B/passes * S, H] and an index of one expert per pass.
        """
        if self.experts is not None or (self.level if training else self.eval_level) != "batch":
            return 0
        return self.passes if training and batch % self.passes == 0 else 1

    def is_by_sample(self, training: bool) -> bool:
        """Whether an expert, where the merged ones do not serve, is that of a sample or of one of several passes."""
        if self.experts is not None:
            return self.experts.dim() > 0
        level = self.level if training else self.eval_level
        return level == "sample" or (level == "batch" and training and self.passes > 1)

    def samples_in(self, rows: int) -> int:
        """Of how many samples `rows` rows of a layer are, as far as the model's forward tells; else `rows`."""
        samples = self.samples.known()
        return rows if not samples or rows % samples else samples

    def draw(
        self, num_experts: int, batch: int, tokens: int, device: torch.device, training: bool
    ) -> torch.Tensor | None:
        """An index [B] or [B, S] (int64) into a bank of num_experts; None for a bank of one."""
        if num_experts == 1:
            return None
        if self.experts is not None:
            return self._chosen(batch, tokens, device, training and not self.force_merged)
        level = self.level if training else self.eval_level
        if level == "token":
            return self._randint(num_experts, (batch, tokens), device)
        if level == "sample":
            return self._drawn(num_experts, (batch,), device)
        passes = self.passes_in(batch, training)
        index = self._drawn(num_experts, (passes,), device)
        return index if passes == batch else index.repeat_interleave(batch // passes, output_size=batch)

    def draw_sides(
        self, experts: tuple[int, int], rows: torch.Tensor, training: bool, paired: bool
    ) -> tuple[int, torch.Tensor | None, torch.Tensor | None]:
        """(passes_in, the index of either bank) for rows [B, S, H]. paired: two banks of several draw one expert."""
        batch, tokens, _ = rows.shape
        passes = self.passes_in(batch, training)
        if passes:
            batch, tokens = passes, batch // passes * tokens
        first = self.draw(experts[0], batch, tokens, rows.device, training)
        if paired and 1 not in experts:
            return passes, first, first
        return passes, first, self.draw(experts[1], batch, tokens, rows.device, training)

    def tasks_of(self, rows: int, training: bool) -> torch.Tensor | None:
        """The caller's task ids; in training one for each row, where a sample is several, one after the other."""
        tasks = self.told().tasks
        if tasks is None or tasks.numel() == rows:
            return tasks
        samples = self.samples_in(rows)
        if not training or self.force_merged or samples == rows or not tasks.numel() or samples % tasks.numel():
            return tasks
        return tasks.repeat(samples // tasks.numel()).repeat_interleave(rows // samples)

    def begin_forward(self) -> None:
        """From here to end_forward, layers share draws: each still has its own, all of them of one launch."""
        self._ahead = {}

    def end_forward(self) -> None:
        """What was drawn and not asked for is dropped: a seed set between two forwards decides the second."""
        self._ahead = None
        if self.notes is not None:
            self.notes.end()

    def _drawn(self, num_experts: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        ahead, key = self._ahead, (num_experts, shape, device)
        if ahead is None or torch.compiler.is_compiling() or _is_recomputed():
            return self._randint(num_experts, shape, device)
        left = ahead.get(key) or self._draw_all(ahead, key)
        return self._randint(num_experts, shape, device) if left is None else left.pop()

    def _draw_all(self, ahead: Ahead, key: tuple[int, tuple[int, ...], torch.device]) -> list[torch.Tensor] | None:
        """The indices of all banks of so many experts, put into `ahead`; None where each layer draws its own."""
        num_experts, shape, device = key
        if _top_hooks is None or not draws_ahead(device):
            return None
        rows = self.sides.get(num_experts, 1)
        ahead[key] = list(self._randint(num_experts, (rows, *shape), device).unbind())
        return ahead[key]

    def _randint(self, num_experts: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        index = torch.randint(num_experts, shape, device=device)
        rank = process_rank() if self.rank is None else self.rank
        return (index + rank) % num_experts if rank else index

    def _chosen(self, batch: int, tokens: int, device: torch.device, stacked: bool) -> torch.Tensor:
        """The caller's index for this layer. stacked: a larger batch is whole passes, one after the other."""
        assert self.experts is not None  # draw() asked
        index = self.experts.to(device)
        if index.dim() == 0:
            return index.expand(batch)
        if index.dim() == 2 and index.shape[1] != tokens:
            raise ValueError(
                f"use_experts index: got experts for {index.shape[1]} tokens in a forward of {tokens}, expected one "
                "expert per sample, [B]; generate() passes on one token at a time"
            )
        rows = index.shape[0]
        if rows == 0 or batch % rows:
            raise ValueError(f"use_experts index: got {rows} rows for a batch of {batch}, expected a divisor of it")
        copies = batch // rows
        if copies == 1:
            return index
        if not stacked:  # beams repeat each sample in place, and so does a layer that sees tokens as rows
            return index.repeat_interleave(copies, 0)
        samples = self.samples_in(batch)
        if samples < batch and samples % rows == 0:  # a sample of several rows, one after the other
            whole = index.repeat(samples // rows, *[1] * (index.dim() - 1))
            return whole.repeat_interleave(batch // samples, 0)
        if tokens == 1 and copies > self.passes and self.samples.under_way() is None:
            raise ValueError(
                f"use_experts index: got {rows} rows for {batch} rows of one token in training, expected {batch} or "
                f"{batch // self.passes}"
            )
        return index.repeat(copies, *[1] * (index.dim() - 1))


# csrc/autograd/draws.cpp takes what is in _ahead and asks for more, as _drawn does.
ROUTERS.add(Router)


def draws_ahead(device: torch.device) -> bool:
    """Whether a draw costs a launch: on a CPU a seed gives the same experts whether a model is whole or in parts."""
    return device.type != "cpu"


def _is_recomputed() -> bool:
    """Whether this forward may be run again, or is run again: activation checkpointing, of either kind.

    The reentrant kind runs without gradients first, and again in a backward; the other saves by hooks, both times.
    """
    return (
        not torch.is_grad_enabled()
        or torch._C._current_graph_task_id() != -1
        or _top_hooks is None
        or _top_hooks(True) is not None
    )


def runs_in_backward() -> bool:
    """Whether a backward runs this for a backward within it: reentrant checkpointing's second forward, or a hook's."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1 or not torch.is_grad_enabled():
        return False
    reentrant = type(node_of_backward()).__name__ == "CheckpointFunctionBackward"
    return reentrant or (_top_hooks is not None and _top_hooks(True) is None)


def check_level(name: str, level: str, *more: str) -> None:
    """Raises ValueError unless level is "batch", "sample", "token" or one of `more`."""
    if level not in (*LEVELS, *more):
        raise ValueError(f"{name}: got {level!r}, expected one of {', '.join(map(repr, (*LEVELS, *more)))}")


def process_rank() -> int:
    """This process's rank in torch.distributed, 0 without it."""
    return dist.get_rank() if _DISTRIBUTED and dist.is_initialized() else 0
