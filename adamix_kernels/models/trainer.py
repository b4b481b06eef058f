"""AdaMixTrainer: transformers' Trainer with two passes, the consistency loss, and AdaMix checkpoints."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from ..modules._finite import checking
from .doubling import double_batch, find_batch_size, split_passes
from .finite import check_gradients, check_loss
from .gate_training import added_losses, keep_gradients, tasks_of, with_gates
from .gating import TASK_IDS
from .objectives import Objective
from .prefix import shared_prefix
from .proving import settle_backends
from .quantised import known_to_train
from .state import adamix_state
from .trainer_checkpoints import CheckpointMixin
from .trainer_checks import check_checkpointing, check_layout, check_unpacked, unsaved_parameters
from .watch import warn_of_dropout, warn_of_rounding, warn_of_standstill

logger = logging.getLogger(__name__)


class AdaMixTrainerMixin(CheckpointMixin):
    """loss = CE(pass 1) + weight * consistency(pass 1, pass 2), both passes in one forward of a doubled batch.

    Put it before Trainer or a subclass of it: `class T(AdaMixTrainerMixin, Seq2SeqTrainer)`, or TRL's SFTTrainer
    (whose data, arguments and evaluation stay; its training metrics, such as token accuracy, do not). It takes a model
    returned by adapt() and the arguments of that trainer; weight is model.adamix.config.consistency_weight.
    With weight 0 (or router.passes = 1) each batch passes once and the loss is the plain one.

    Training:
        The losses of all accumulation steps and processes are divided by the number of targets of the whole
        update (sequences, or tokens that are not ignored), so GA=4 x 2 is GA=1 x 8 also with ragged rows.
        Each log has `cross_entropy` and `consistency` beside `loss` (loss = cross_entropy + weight *
        consistency), averaged over the updates since the last log; they stay on the device in between.
        Label smoothing acts on the cross-entropy alone.
        With learned gates loss = cross_entropy + weight * consistency + balance_weight * balance_loss + z_weight *
        z_loss, the last two logged where their weight is not 0; router="task" takes `task_ids` [B] from each batch.
    Evaluation: that of the base trainer, on the merged experts.
    Checkpoints: what save_adamix writes, not the frozen weights; resuming and load_best_model_at_end read it. A file
        written last vouches for the whole folder: an unfinished or damaged checkpoint is refused, and
        resume_from_checkpoint=True passes over it.
    Several processes: DDP or FSDP2 (fsdp_config version 2, the frozen base sharded too). accelerate shards on
        accelerators only: on CPUs it runs DDP in its place, and a warning says so.

    Raises:
        ValueError: the model is not adapted, or merged; compute_loss_func is given; activation checkpointing
            without preserve_rng_state (fsdp_config's own has none: use args.gradient_checkpointing); more than
            one GPU in one process (nn.DataParallel); experts of a pass or a sample in a mixture's own
            experts, which are given tokens of all samples.
        NotImplementedError: a task without a rule here (see Objective), FSDP1 or DeepSpeed.

    Source: AdaMix section 3.2 and the reference project's training loops.

    Example:
        >>> from transformers import Trainer
        >>> class MyTrainer(AdaMixTrainerMixin, Trainer): ...  # as AdaMixTrainer is
    """

    # The loss is divided by the targets of the whole update, never by accumulation steps (transformers 5).
    loss_is_scaled_for_ga = True
    model: nn.Module
    _counts_targets = False
    _component_sums: torch.Tensor | None = None
    _summed_from = 0
    _loss_scale, _scaled_at = 1.0, -1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: got a function, expected None: AdaMixTrainer computes its own loss")
        model = kwargs.get("model", args[0] if args else None)
        with known_to_train(model) if model is not None else contextlib.nullcontext():
            super().__init__(*args, **kwargs)
        # TRL's mark below transformers 5.19, which nothing can call.
        if isinstance(getattr(self, "compute_loss_func", None), str):
            self.compute_loss_func = None
        self._check_trainable()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._check_trainable()
        resume_from_checkpoint = self._checked_resume(resume_from_checkpoint)
        if self.args.fsdp and not self.is_fsdp_enabled:
            logger.warning("args.fsdp: accelerate shards on accelerators only, and this run has none: it runs DDP")
        if str(self.accelerator.state.dynamo_plugin.backend.value) != "NO":
            Objective(self.model).before_compile()
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and self.accelerator.num_processes == 1:
            logger.warning(
                "this is one of %d launched processes, and each trains for itself: without a GPU, processes join only "
                "with use_cpu=True in TrainingArguments",
                launched,
            )
        self._component_sums = None
        keep_gradients(self.model, self.args)
        warn_of_dropout(self.model, adamix_state(self.model))
        warn_of_rounding(self.model)
        halves = {torch.bfloat16: self.args.bf16, torch.float16: self.args.fp16}
        settle_backends(self.model, [dtype for dtype, on in halves.items() if on])
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        warn_of_standstill(self.state.log_history, self.model, adamix_state(self.model))
        return result

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Training: the AdaMix loss; outputs are those of pass 1 (B rows). Evaluation: the base trainer's."""
        inputs = dict(inputs)
        tasks = tasks_of(self.model, inputs)
        if not model.training:
            with tasks:
                return super().compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )
        labels = inputs.pop("labels", None)
        objective = Objective(self.model)
        doubled = self._passes() == 2
        check_unpacked(self.model, inputs, doubled)
        if labels is None:
            raise ValueError(f"inputs: got {sorted(inputs)}, expected `labels` among them")
        batch = find_batch_size(labels)
        inputs = objective.prepare(inputs, labels)
        processes = 1
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The targets of all processes were counted, and the gradients will be averaged over them.
            processes = self.accelerator.num_processes // self.get_tp_size()
        # FSDP gathers a layer's weights inside a whole forward alone; a compiled model is not taken apart.
        whole = self.is_fsdp_enabled or str(self.accelerator.state.dynamo_plugin.backend.value) != "NO"
        shared = shared_prefix(self.model, inputs) if doubled and not whole else contextlib.nullcontext()
        with tasks, shared:
            result, outputs = objective.loss(
                model,
                double_batch(inputs, batch) if doubled else inputs,
                labels,
                doubled=doubled,
                weight=adamix_state(self.model).config.consistency_weight,
                label_smoothing=self.args.label_smoothing_factor,
                num_items=num_items_in_batch,
                # Under FSDP the head's weight is whole only inside the model's forward.
                fuse_head=not return_outputs and not self.is_fsdp_enabled,
                expected_grad=self._expected_grad(processes),
                autocast=self.accelerator.autocast,
            )
        if checking():
            check_loss(result)
        loss, components = result.loss, torch.stack([result.cross_entropy, result.consistency]).detach()
        if processes > 1:
            loss, components = loss * processes, components * processes
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        loss, more = with_gates(self.model, loss, steps)
        components = torch.stack([*components, *more]) if more else components
        if self._component_sums is None:
            self._component_sums, self._summed_from = torch.zeros_like(components), self.state.global_step
        self._component_sums += components
        if not return_outputs:
            return loss
        return loss, split_passes(outputs, batch)[0] if doubled else outputs

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        with tasks_of(self.model, inputs):  # the base trainer hands a batch without labels to the model as it is
            return super().prediction_step(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._own_normalisation():
            loss = super().training_step(*args, **kwargs)
        if checking() and getattr(self.accelerator, "scaler", None) is None:  # a scaler skips such a step
            check_gradients(self.model)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        if 0 < self.state.max_steps <= self.state.global_step:
            # Resumed after its last step, which the base trainer notices only behind one more.
            self.control.should_training_stop = True
            return [], None
        with self._own_normalisation():
            return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        if self._counts_targets and batch_samples and all("labels" in batch for batch in batch_samples):
            objective = Objective(self.model)
            rows = [objective.targets(batch["labels"]) for batch in batch_samples]
            batch_samples = [{"labels": r, "shift_labels": r} for r in rows]
        return super()._get_num_items_in_batch(batch_samples, device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds cross_entropy, consistency and what the gates add to a training log."""
        if "loss" in logs and "learning_rate" in logs and self._component_sums is not None:
            updates = max(1, self.state.global_step - self._summed_from)
            sums = self.accelerator.gather(self._component_sums.reshape(1, -1)).mean(0)
            names = ("cross_entropy", "consistency", *added_losses(self.model))
            first = {"loss": logs.pop("loss"), **dict(zip(names, (sums / updates).tolist(), strict=True))}
            rest = dict(logs)
            logs.clear()
            logs.update(first, **rest)
            self._component_sums = None
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        if adamix_state(self.model).config.num_tasks is not None and TASK_IDS not in columns:
            self._signature_columns = [*columns, TASK_IDS]  # type: ignore[assignment]  # declared by its first value

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """That of the base trainer, times the passes."""
        return super().floating_point_ops(inputs) * self._passes()

    def _passes(self) -> int:
        """Passes of a training batch; tells the router, which must still know in a recomputing backward."""
        state = adamix_state(self.model)
        if state.config.consistency_weight == 0:
            state.router.passes = 1
        if state.router.passes not in (1, 2):
            raise ValueError(f"router.passes: got {state.router.passes}, expected 1 or 2")
        return state.router.passes

    def _expected_grad(self, processes: int) -> float:
        """What accelerate's backward will send into the loss; the scaler, on a GPU, is asked once an update."""
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self._scaled_at != self.state.global_step:
            self._loss_scale, self._scaled_at = float(scaler.get_scale()), self.state.global_step
        return self._loss_scale * processes / int(self.accelerator.gradient_accumulation_steps)

    @contextlib.contextmanager
    def _own_normalisation(self) -> Iterator[None]:
        """The base trainer counts the targets of an update and does not divide the loss by its steps."""
        previous = self.model_accepts_loss_kwargs, self._counts_targets
        self.model_accepts_loss_kwargs = self._counts_targets = True
        try:
            yield
        finally:
            self.model_accepts_loss_kwargs, self._counts_targets = previous

    def _check_trainable(self) -> None:
        state = adamix_state(self.model)
        rule = getattr(self.args, "loss_type", "nll")  # of TRL's SFTConfig
        if rule not in ("nll", "chunked_nll"):
            raise ValueError(f"args.loss_type: got {rule!r}, expected 'nll': AdaMixTrainer computes its own loss")
        if state.merged:
            raise ValueError("model: got a merged model, expected one with its experts; call unmerge() first")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"args.n_gpu: got {self.args.n_gpu} GPUs in one process (nn.DataParallel), expected one process "
                "per GPU: start with torchrun, or set CUDA_VISIBLE_DEVICES"
            )
        if self.is_deepspeed_enabled:
            raise NotImplementedError("args: got DeepSpeed, expected a single process, DDP or FSDP2")
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version != 2:
            raise NotImplementedError(
                f"args.fsdp_config: got FSDP version {plugin.fsdp_version}, expected 2, or no FSDP"
            )
        check_checkpointing(self.model, self.args, plugin)
        check_layout(self.model)
        lost = unsaved_parameters(self.model)
        if lost and self.args.save_strategy != "no":
            raise ValueError(
                f"model: got trainable parameters that a checkpoint would not hold ({', '.join(lost[:4])}), expected "
                'their modules in modules_to_save, or save_strategy="no"'
            )


class AdaMixTrainer(AdaMixTrainerMixin, Trainer):
    """transformers.Trainer with AdaMix's loss: loss = CE(pass 1) + weight * consistency(pass 1, pass 2).

    Takes the arguments of Trainer and a model returned by adapt(). What it does with checkpoints, accumulation,
    several processes and evaluation, what it raises and its source: `AdaMixTrainerMixin`.

    Example:
        >>> from transformers import TrainingArguments
        >>> args = TrainingArguments("run", max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
        >>> rows = [{**{k: v[i] for k, v in batch.items()}, "labels": i} for i in range(2)]
        >>> AdaMixTrainer(adapt(model), args, train_dataset=rows).train().global_step  # doctest: +ELLIPSIS
        {...
        1
    """
