"""What AdaMixTrainer writes, and what it goes on from."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ._files import one_writer, remove_unnamed, replace_file, write_sealed_json
from ._staging import write_tokenizer
from .card import adamix_card, write_card
from .checkpoint import load_adamix
from .header import CHECKPOINT_NAME, read_header
from .manifest import check_manifest, newest_whole_checkpoint, remove_manifest, write_manifest
from .saving import save_folder

logger = logging.getLogger(__name__)

TRAINING_ARGS_NAME = "training_args.bin"
SCHEDULER_NAME = "scheduler.pt"

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # that of the class which mixes this in


@contextlib.contextmanager
def _full_disk_told(folder: str) -> Iterator[None]:
    """torch.save has no OSError for a full disk: its writer says "unexpected pos", or "iostream error"."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not any(word in text for word in ("inline_container", "PytorchStreamWriter", "iostream")):
            raise
        line = text.strip().splitlines()[0]
        raise OSError(errno.EIO, f"torch could not write a whole file ({line}): is the disk full?", folder) from error


class CheckpointMixin(_Trainer):
    """The part of AdaMixTrainerMixin that reads and writes files."""

    model: nn.Module
    lr_scheduler: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what model.save_pretrained writes, the tokenizer and the arguments.

        Under FSDP every process must call it.
        """
        if not self.is_fsdp_enabled:
            with _full_disk_told(str(self.args.output_dir if output_dir is None else output_dir)):
                super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not (self.args.should_save or self.is_fsdp_enabled):
            return
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        os.makedirs(folder, exist_ok=True)
        save_folder(self.model, folder)
        if not self.args.should_save:
            return
        tokenizer = self.processing_class
        if tokenizer is None:
            tokenizer = getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            write_tokenizer(Path(folder), tokenizer)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        # The base trainer would write the frozen weights as well.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """That of the base trainer; then the file that vouches for the folder; then older checkpoints may go."""
        run_folder = self._get_output_dir(trial=trial)
        folder = os.path.join(run_folder, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            remove_manifest(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with _full_disk_told(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self.args.push_to_hub:
            self._finish_checkpoint(folder)
        if self.args.should_save:
            self._delete_old_checkpoints(run_folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._finish_checkpoint(checkpoint_folder)
        # The base trainer pushes its output folder, into which it copies the files that it knows. Other processes push
        # nothing, and have no such attribute.
        running = getattr(self, "push_in_progress", None)
        if self.is_world_process_zero() and self.args.hub_strategy != "end" and (running is None or running.is_done()):
            output = Path(str(self.args.output_dir))
            _copy_checkpoint(Path(checkpoint_folder), output)
            write_card(output, adamix_card(self.model))
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_checkpoint(self, folder: str) -> None:
        # Each process wrote its own random state.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder)

    def _find_best(self, run_folder: str) -> None:
        """The best checkpoint is called by where it was: a run that was moved, or is called by another path now, has
        it beside the others."""
        best = self.state.best_model_checkpoint
        here = None if best is None else os.path.join(run_folder, os.path.basename(best))
        if here is not None and os.path.isdir(here):
            self.state.best_model_checkpoint = here

    def _delete_old_checkpoints(self, run_folder: str) -> None:
        self._find_best(run_folder)
        # As transformers decides it, with a warning: checkpoints of one second are in the order of their steps.
        times = [path.stat().st_mtime for path in Path(run_folder).glob("checkpoint-*")]
        by_time = bool(times) and max(times) - min(times) >= 1
        if hasattr(self, "_rotate_checkpoints"):  # transformers 4
            self._rotate_checkpoints(use_mtime=by_time, output_dir=run_folder)
            return
        from transformers.trainer_utils import rotate_checkpoints

        rotate_checkpoints(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=by_time)

    def _checked_resume(self, resume_from_checkpoint: str | bool | None) -> str | bool | None:
        """The folder to go on from. Raises ValueError where it is not a whole checkpoint."""
        if resume_from_checkpoint is True:
            folder = str(self.args.output_dir)
            newest = newest_whole_checkpoint(folder)
            if newest is None:
                raise ValueError(f"resume_from_checkpoint: {folder!r} holds no checkpoint to go on from that is whole")
            return newest
        if resume_from_checkpoint:
            check_manifest(resume_from_checkpoint)
        return resume_from_checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adamix(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._find_best(str(self.args.output_dir))
        best = self.state.best_model_checkpoint
        if not os.path.isdir(str(best)):
            logger.warning("%s, the best checkpoint, is not there any more: the last weights are kept", best)
            return
        logger.info("Loading best model from %s (score: %s)", best, self.state.best_metric)
        load_adamix(self.model, str(best))


def _copy_checkpoint(source: Path, target: Path) -> None:
    """The tensors and the JSON that commits them, without the way to a local base, which begins elsewhere."""
    header = read_header(source / CHECKPOINT_NAME)
    header["base_model"]["folder"] = None
    name = header["tensors"]["file"]
    with one_writer(target):
        replace_file(target / name, lambda temporary: shutil.copyfile(source / name, temporary))
        write_sealed_json(target / CHECKPOINT_NAME, header)
        remove_unnamed(target / CHECKPOINT_NAME, "adamix")
