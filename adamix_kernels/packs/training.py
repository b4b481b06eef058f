"""PackTrainer: many names trained in one model, each as if it were alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models._files import make_folder
from ..models.checkpoint import save_adamix
from ..models.merging import merge
from ..models.objectives import Objective
from ..models.quantised import let_gradients_through
from ..models.state import AdaMixState, replace_module
from ..routing import process_rank
from . import training_folder
from .banks import OwnHeads, TrainedBank, bank_shapes
from .job import PackJob
from .mix import Mix
from .own import Own, PackStep, base_of, swapped
from .reading import Folder, called
from .state import PackRouter, check_name
from .training_room import Jobs, NoNames, alone, check_batch_size, check_room, checked, free_slot, is_over, job_of
from .training_step import StepOptions, accumulate, sum_over_processes, wait_for_all


class PackTrainer:
    """Trains several adaptations of one frozen model together: one batch mixes their rows, each learns from its own.

    loss = sum_n loss_n, loss_n the AdaMix loss (or, with consistency_weight 0, the plain one) over the rows of name n
    alone. Each name has its own experts, head, AdamW, schedule, clipping, counter and random numbers, so that it
    becomes what it would become in a PackTrainer by itself, whatever else is in the batch: on the CPU's reference
    backend bit for bit, where max_rank and the padded length are the same and the base's products give a row the same
    bits among many rows as among few (docs/packs.md). All names' rows go through the base together, and through one
    launch a layer.

    Args:
        model: a bare Transformers model on its device; it is changed until close().
        jobs: name -> a PackJob, or a folder of save() with which that name goes on; or the folder of all names, which
            save() was given.
        capacity: names that there is room for (default: as many as jobs). max_rank, max_experts: room of each of them
            at least, for names that come later.
        autocast: a dtype for the forward, torch.bfloat16 say; None: that of the model.
        backend: as in adapt().

    Dropout of the base is drawn for each name apart, in attention too. Several processes (torchrun): call the same
    methods in each, with its own rows; gradients are summed over the targets of all of them, without DDP around.

    Raises:
        TypeError, ValueError: an argument is no such thing, or a job does not fit the model or the other jobs; the
            message begins with its name, and nothing is changed.

    Source: AdaMix section 3 for each name.

    Example:
        >>> jobs = {"leases": PackJob(AdaMixConfig(bottleneck=4)), "patents": PackJob(AdaMixConfig(), lr=3e-4, seed=1)}
        >>> trainer = PackTrainer(model, jobs)
        >>> done = trainer.step({**batch, "labels": torch.tensor([0, 1])}, ["patents", "leases"])
        >>> done["leases"].step
        1
        >>> folder = trainer.finish("leases", "runs/leases")  # merged: load_adamix, load and pack read it
        >>> list(trainer.names)
        ['patents']
    """

    def __init__(
        self,
        model: nn.Module,
        jobs: Jobs | Folder,
        *,
        capacity: int | None = None,
        max_rank: int = 1,
        max_experts: int = 1,
        autocast: torch.dtype | None = None,
        backend: str = "auto",
    ):
        jobs, self.capacity = checked(model, jobs, capacity, max_rank, max_experts, backend)
        self.model, self.backend = model, backend
        mix = Mix()
        owns, saved = {}, {}
        for slot, (name, job) in enumerate(jobs.items()):
            with called(check_name(name)):
                saved[name] = None if isinstance(job, PackJob) else training_folder.read(job)
                owns[name] = Own(name, slot, job_of(job, saved[name]), model, backend)
        self.experts = max(max_experts, *(own.job.config.num_experts for own in owns.values()))
        shapes = bank_shapes(model, {name: own.layers for name, own in owns.items()}, max_rank)
        # One expert's product would be another one than that of several, with other bits.
        slots = max(2, self.capacity * self.experts)
        self.banks = {
            path: TrainedBank(path, model.get_submodule(path), shape, slots, mix, backend)
            for path, shape in shapes.items()
        }
        whole = [path for path, _ in model.named_modules() if any(path in own.heads for own in owns.values())]
        self.own_heads = {path: model.get_submodule(path) for path in whole}
        self.names: dict[str, Own] = {}
        self._options = StepOptions(mix, self.experts, autocast)
        Objective(model)  # raises for a task without a loss

        # Nothing of the model was changed so far.
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._mode = model.training
        let_gradients_through(model)
        model.requires_grad_(False)
        for path, bank in self.banks.items():
            replace_module(model, path, bank)
        for path in whole:
            replace_module(model, path, OwnHeads(path, mix))
        self._owner.adamix = AdaMixState(
            next(iter(owns.values())).job.config, PackRouter(), list(self.banks), whole, pack=NoNames()
        )
        try:
            for name, own in owns.items():
                with called(name):
                    self._enter(own, saved[name])
        except BaseException:
            self.close()
            raise

    @property
    def _owner(self) -> Any:
        return self.model

    def add(self, name: str, job: PackJob | Folder) -> None:
        """Another name joins: a PackJob begins, a folder of save() goes on. The other names do not notice.

        Raises ValueError: the name is taken, there is no room for it (see the class's capacity, max_rank and
            max_experts), or it adapts a layer that no job did at the start; nothing is changed.
        """
        if check_name(name) in self.names:
            raise ValueError(f"name: got {name!r}, which is being trained, expected a new name")
        slot = free_slot(name, self.names.values(), self.capacity)
        with called(name):
            saved = None if isinstance(job, PackJob) else training_folder.read(job)
            with swapped(self.model, self._bare()):
                own = Own(name, slot, job_of(job, saved), self.model, self.backend)
            check_room(own, self.banks, self.own_heads, self.experts)
            self._enter(own, saved)

    def pause(self, name: str) -> None:
        """Rows of this name are refused until resume(); the train() of others goes on without it."""
        self._own(name).paused = True

    def resume(self, name: str) -> None:
        """The name goes on where pause() stopped it."""
        self._own(name).paused = False

    def remove(self, name: str) -> None:
        """The name leaves, unsaved; its place is free."""
        for cut in self._own(name).cuts:
            cut.clear()
        del self.names[name]

    def finish(self, name: str, folder: Folder, *, merged: bool = True) -> Path:
        """Merges the name's experts, writes them as save_adamix does, and lets the name leave; returns the folder.

        merged: False writes the experts as they are, for more training. Raises what save_adamix raises; the name stays
            then.
        """
        with self.alone(name) as model:
            if process_rank() == 0:
                save_adamix(merge(model) if merged else model, folder)
        wait_for_all()
        self.remove(name)
        return Path(folder)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[nn.Module]:
        """Within it the model is what adapt() gave for this name, with the values so far: evaluate it, store_centroid,
        export or save it. A merge is undone at the end; merge(model, keep=False) is refused. What is written into its
        parameters counts.

        Raises ValueError for a name that is not trained.
        """
        own = self._own(name)
        with alone(self.model, own, self._bare()):
            yield self.model
        own.write()

    def step(self, batch: Mapping[str, Any], names: Sequence[str]) -> dict[str, PackStep]:
        """accumulate() and update(): one batch, one update of each name in it."""
        self.accumulate(batch, names)
        return self.update()

    def accumulate(self, batch: Mapping[str, Any], names: Sequence[str]) -> None:
        """Forward and backward of one (micro-)batch; its gradients wait for update().

        Args:
            batch: as the model takes it, with labels [B, ...]; those of one name are of its own label set.
            names: whose each of the B rows is. Any order; a name that is absent is left as it is.

        Raises ValueError: a name is not trained, or is paused; the batch has no labels or not as many rows as names.
            After any error what was accumulated since the last update is dropped, and no parameter has changed.
        """
        try:
            accumulate(self.model, self.names, self.banks, self.own_heads, self._options, dict(batch), names)
        except BaseException:
            self._forget()
            raise

    def update(self) -> dict[str, PackStep]:
        """One AdamW step of every name that has rows since its last one, by the mean over its own targets.

        Returns {name: PackStep}; a name's schedule and counter move with its own updates alone.
        """
        sum_over_processes(self.names, self.banks)
        done = {name: own.update() for name, own in self.names.items() if own.rows}
        self._forget()
        return done

    def train(
        self,
        rows: Mapping[str, Sequence[Any]],
        collate: Callable[[list[Any]], Mapping[str, Any]],
        *,
        batch_size: int = 16,
        on_step: Callable[[dict[str, PackStep]], object] | None = None,
    ) -> None:
        """Trains every name that is not paused until its total_steps: each update takes batch_size rows of each.

        A name goes through its rows again and again, in an order drawn from its seed; what it sees depends on its own
        counter alone, so that it goes on after add() of a saved folder. Of several processes each takes its share.

        Args:
            rows: of each name, as collate takes them. collate: a list of rows to a batch with labels, as
                tasks.collator gives.
            on_step: called with what update() returned; it may add, pause and finish names.

        Raises ValueError: batch_size is below the number of processes; a name has no rows, or its job no total_steps.
        """
        check_batch_size(batch_size)
        while active := [name for name, own in self.names.items() if not own.paused and not is_over(name, own)]:
            absent = [name for name in active if name not in rows or not len(rows[name])]
            if absent:
                raise ValueError(f"rows: got none of {absent[0]!r}, expected some of every name, or pause() it")
            picked = {name: self.names[name].next_rows(len(rows[name]), batch_size) for name in active}
            whose = [name for name in active for _ in picked[name]]
            done = self.step(collate([rows[name][n] for name in active for n in picked[name]]), whose)
            if on_step is not None:
                on_step(done)

    def save(self, folder: Folder) -> Path:
        """Writes every name into folder/<name>: values, AdamW's state, schedule, counter; returns the folder.

        A name is written whole or not at all, and its earlier state stays until then. PackTrainer(model, folder) and
        add(name, folder/<name>) go on with it, bit for bit.

        Raises ValueError between accumulate() and update(); OSError where a file could not be written.
        """
        if any(own.rows for own in self.names.values()):
            raise ValueError("save: got gradients that wait, expected update() first")
        place = make_folder(folder)
        for name, own in self.names.items():
            with self.alone(name) as model:
                if process_rank() == 0:
                    training_folder.write(own, model, place / name)
        wait_for_all()
        return place

    def close(self) -> nn.Module:
        """Gives the bare model back, as it was; the names are no longer trained."""
        for path, module in self._bare().items():
            replace_module(self.model, path, module)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        del self._owner.adamix
        self.model.train(self._mode)
        self.names = {}
        return self.model

    def _own(self, name: str) -> Own:
        if name not in self.names:
            known = ", ".join(self.names) or "none: nothing is trained"
            raise ValueError(f"name: got {name!r}, expected one of {known}")
        return self.names[name]

    def _bare(self) -> dict[str, nn.Module]:
        """The base's own modules, by path, where banks and heads stand now."""
        return {**self.own_heads, **{path: base_of(bank) for path, bank in self.banks.items()}}

    def _enter(self, own: Own, saved: training_folder.Saved | None) -> None:
        own.enter(self.banks, self.experts)
        self.names[own.name] = own
        if saved is None:
            return
        try:
            with self.alone(own.name) as model:
                training_folder.restore(own, model, saved)
        except BaseException:
            self.remove(own.name)
            raise

    def _forget(self) -> None:
        for own in self.names.values():
            own.forget()
        for bank in self.banks.values():
            bank.zero_grad(set_to_none=True)
